"""What a step costs: FLOPs as they run and as they are needed, bytes read to decode, seconds.

FLOPs follow from shapes. Counted are the products with the layers' matrices, the attention and the
head; a multiply-add is two. The optimizer is not counted. As they run: padding, whole squares of
attention, recomputation and all. As they are needed ("causal"): no padding, and of attention only
the pairs of a query and a key that it may see.
"""

import time
from collections import Counter

import torch

from nanorl.runtime import dist

# Where FLOPs run, in the order of a step of RL.
PARTS = ("prefill", "decode", "reference", "forward", "backward", "recompute")
# What else is counted of a step. row_steps: tokens decoded; slot_steps: those there was room for.
OTHER = ("causal/rollout", "causal/learner", "bytes", "row_steps", "slot_steps")


# ---- FLOPs from shapes ---------------------------------------------------------------------------


def forward_flops(config, tokens, pairs, head_tokens):
    """Of a forward pass: `tokens` go through the layers, `head_tokens` through the head.

    pairs: (query, key) pairs that attention computes, in each layer.
    """
    _, multiplied = config.n_params()
    layers = multiplied - config.vocab_size * config.n_embd
    attention = 4 * config.n_layer * config.n_head * config.head_dim * pairs
    head = 2 * config.n_tokens * config.n_embd * head_tokens
    return 2 * layers * tokens + attention + head


def learning_flops(config, tokens, pairs, head_tokens, recompute=False, adapters=None):
    """-> {forward, backward, recompute}, of a forward and backward pass as they run.

    Backward takes two products for each of forward's, one for what came in and one for the weights,
    and the head's logits once more (gpt.TokenLogprobs). adapters: a LoRA. Under it the weights have
    no gradient, nor has what enters the first layer.
    """
    if adapters is None:
        backward = forward_flops(config, 2 * tokens, 2 * pairs, 3 * head_tokens)
    else:
        qkv_width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        into_the_first_layer = 2 * config.n_embd * qkv_width * tokens
        backward = forward_flops(config, tokens, 2 * pairs, 2 * head_tokens)
        backward += adapter_flops(adapters, tokens) - into_the_first_layer

    again = 0
    if recompute:
        again = forward_flops(config, tokens, pairs, 0)
        if adapters is None:
            # A block's last product is not needed again: nothing in backward asks for its result.
            again -= 2 * config.n_layer * config.n_embd * config.n_inner * tokens
    forward = forward_flops(config, tokens, pairs, head_tokens)
    return dict(forward=forward, backward=backward, recompute=again)


def adapter_flops(adapters, tokens):
    """Of the gradients of LoRA's A and B: the four products in LowRank.backward."""
    numbers = sum(p.numel() for _, p in adapters.named_parameters())
    return 4 * numbers * tokens


def times_forward(adapters):
    """How many forwards a forward and a backward cost.

    The gradient of the activations costs one forward, and that of the weights another. LoRA's
    adapters are so small that their gradient is left out.
    """
    return 2 if adapters else 3


def sampling_flops(engine):
    """-> {prefill, decode}, of the engine's last call as it ran."""
    flops = {}
    for part, work in engine.stats["work"].items():
        shapes = work["tokens"], work["pairs"], work["head_tokens"]
        flops[part] = forward_flops(engine.learner.config, *shapes)
    return flops


def causal_sampling_flops(engine):
    """That the completions of the engine's last call needed."""
    stats = engine.stats
    tokens = stats["prompt_tokens"] + stats["row_steps"]
    head_tokens = stats["rows"] + stats["row_steps"]
    return forward_flops(engine.learner.config, tokens, stats["pairs"], head_tokens)


# ---- bytes ---------------------------------------------------------------------------------------


def bytes_decoded(engine):
    """That the decode steps of the engine's last call had to read: what memory bandwidth bounds.

    Every weight once a step, a prompt's cache once a step for all its rows, and each row's own as
    long as it ran, however many rows there are.
    """
    model = engine.learner
    _, weights = model.config.n_params()
    numbers = len(engine.stats["live"]) * weights
    numbers += cache_numbers(model.config, engine.stats["cached"])
    return numbers * model.compute_dtype.itemsize


def cache_numbers(config, tokens):
    """A key and a value for each layer and kv head."""
    return 2 * tokens * config.n_layer * config.n_kv_head * config.head_dim


# ---- a run's meter -------------------------------------------------------------------------------


class Meter:
    """Counts what the steps of a run cost, on this rank, and says it over all ranks.

    model, adapters: what is trained. flops: {train, causal, eval} so far, of a run that is resumed.
    flop_rate, copy_rate: what the device can do (rates.device_rates); for mfu and mbu.

    total: {train, causal, eval}, the run's FLOPs over all ranks.
    """

    def __init__(self, model, adapters, flops, flop_rate=None, copy_rate=None):
        self.config, self.recompute, self.adapters = model.config, model.recompute, adapters
        self.device = model.cos.device
        self.total = Counter(flops)
        self.flop_rate, self.copy_rate = flop_rate, copy_rate
        self.step = Counter()
        self.steps = 0  # since the process started
        self.begun = None  # when the first of them began

    def start(self):
        """A step begins."""
        self.step_begun = time.time()
        self.begun = self.begun or self.step_begun
        self.steps += 1

    # ---- base and SFT

    def rows(self, computed, needed, trained):
        """A step has gone over rows of text, forward and backward; all numbers over all ranks.

        computed, needed: (tokens, pairs). trained: tokens that the loss is of.
        """
        ran = learning_flops(self.config, *computed, trained, self.recompute, self.adapters)
        self.step.update(ran)
        self.total["train"] += sum(ran.values())
        self.needed = times_forward(self.adapters) * forward_flops(self.config, *needed, trained)
        self.total["causal"] += self.needed

    def mfu(self):
        """FLOPs that the step's rows needed, as a share of what the devices could do until now."""
        return self.needed / self.seconds() / dist.world_size() / self.flop_rate

    # ---- a step of RL, in its order

    def rollout(self, engine):
        """The engine has sampled."""
        stats = engine.stats
        self.step.update(sampling_flops(engine))
        self.step["causal/rollout"] += causal_sampling_flops(engine)
        self.step["bytes"] += bytes_decoded(engine)
        self.step["row_steps"] += stats["row_steps"]
        self.step["slot_steps"] += len(stats["live"]) * stats["row_slots"]

    def sampled(self):
        """All of the step is sampled and judged."""
        self.sampled_at = time.time()

    def reference(self, batch, outputs):
        """The reference has gone over a Batch; outputs: its learner.Forward."""
        slots, sampled = batch.ids.numel(), len(batch.targets)
        ran = forward_flops(self.config, slots, outputs.computed_pairs, sampled)
        self.step["reference"] += ran
        needed = forward_flops(self.config, slots, batch.visible_pairs, sampled)
        self.step["causal/learner"] += needed

    def learner(self, batch, outputs):
        """The policy has gone over a Batch, forward and backward."""
        slots, sampled = batch.ids.numel(), len(batch.targets)
        shapes = slots, outputs.computed_pairs, sampled
        self.step.update(learning_flops(self.config, *shapes, self.recompute, self.adapters))
        needed = forward_flops(self.config, slots, batch.visible_pairs, sampled)
        self.step["causal/learner"] += times_forward(self.adapters) * needed

    def learnt(self):
        """The step's updates are done."""
        dist.synchronize(self.device)
        self.learnt_at = time.time()

    def rollout_and_learner(self, tokens, learnt_tokens):
        """The metrics of a step of RL so far, over all ranks.

        tokens: sampled. learnt_tokens: seen by one update.
        """
        done = dist.totals({name: self.step[name] for name in PARTS + OTHER})
        self.step.clear()
        self.total["train"] += sum(done[part] for part in PARTS)
        self.total["causal"] += done["causal/rollout"] + done["causal/learner"]

        # Seconds of the slowest rank.
        rollout_time = dist.total(self.sampled_at - self.step_begun, "max")
        whole = dist.total(self.learnt_at - self.step_begun, "max")
        learner_time = whole - rollout_time

        row = {"occupancy": done["row_steps"] / max(done["slot_steps"], 1)}
        for part in PARTS:
            row[f"flops/{part}"] = done[part]
        row["tok_per_s/rollout"] = tokens / rollout_time
        row["tok_per_s/learner"] = learnt_tokens / learner_time
        ranks = dist.world_size()
        row["mbu"] = done["bytes"] / rollout_time / ranks / self.copy_rate
        row["mfu"] = done["causal/learner"] / learner_time / ranks / self.flop_rate
        row["time/rollout"] = rollout_time
        row["time/learner"] = learner_time
        row["time/outside"] = 1 - whole / (time.time() - self.step_begun)
        return row

    # ---- all stages

    def forward_only(self, tokens, pairs, head_tokens):
        """An evaluation has gone over text; all numbers over all ranks."""
        self.total["eval"] += forward_flops(self.config, tokens, pairs, head_tokens)

    def evaluation(self, engine):
        """The engine has sampled for an evaluation. Every rank takes part."""
        self.total["eval"] += dist.total(sum(sampling_flops(engine).values()))

    def seconds(self):
        """Of the step, until now."""
        return time.time() - self.step_begun

    def end_of_step(self):
        """The metrics that all stages have at the end of a step, after an evaluation."""
        row = self.flops_so_far()
        # Of base and SFT. RL's are in its row already.
        for part, flops in self.step.items():
            row[f"flops/{part}"] = flops
        self.step.clear()
        row["time/step"] = self.seconds()
        row["memory/peak_gb"] = dist.peak_memory(self.device) / 1e9
        row.update(gpu_load(self.device))
        return row

    def flops_so_far(self):
        """The run's FLOPs over all ranks, under the names that all stages log."""
        return {
            "flops_total": self.total["train"],
            "flops_causal_total": self.total["causal"],
            "flops_eval_total": self.total["eval"],
        }

    def seconds_left(self, steps):
        """How long so many more steps will take."""
        return (time.time() - self.begun) / self.steps * steps


def gpu_load(device):
    """{gpu/utilization, a share; gpu/watts} of now, where the driver's library tells them."""
    if device.type != "cuda":
        return {}
    try:
        utilization = torch.cuda.utilization(device) / 100
        return {"gpu/utilization": utilization, "gpu/watts": torch.cuda.power_draw(device) / 1000}
    except Exception:  # the library is not installed, or the GPU does not tell: no run needs them
        return {}
