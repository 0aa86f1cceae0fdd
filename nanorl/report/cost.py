"""What a step cost: FLOPs as they ran and as they were needed, bytes read to decode, seconds."""

import time
from collections import Counter

from nanorl.runtime import dist
from nanorl.runtime.log import flops_so_far

# Where FLOPs ran, in a step's order.
PARTS = ("prefill", "decode", "reference", "forward", "backward", "recompute")
# What else is counted. causal: FLOPs that are needed, without padding and pairs that are not seen.
# row_steps: tokens decoded; slot_steps: those that there was room for.
OTHER = ("causal/rollout", "causal/learner", "bytes", "row_steps", "slot_steps")


class Meter:
    """Counts one rank's step. `total` {train, causal, eval} sums FLOPs of the run over ranks."""

    def __init__(self, config, recompute, adapters, flop_rate, copy_rate, total=()):
        self.config, self.recompute, self.adapters = config, recompute, adapters
        # What mfu and mbu are shares of: the device's FLOP/s and bytes/s.
        self.flop_rate, self.copy_rate = flop_rate, copy_rate
        self.total = Counter(dict(total))
        self.step = Counter()
        self.steps = 0  # since the run was started
        self.begun = None  # when the first of them was

    # ---- what happens in a step, in its order

    def start(self):
        """A step begins."""
        self.step_begun = time.time()
        self.begun = self.begun or self.step_begun

    def rollout(self, engine):
        """The engine has sampled."""
        stats = engine.stats
        self.step.update(engine.flops())
        self.step["causal/rollout"] += engine.causal_flops()
        self.step["bytes"] += engine.bytes_decoded()
        self.step["row_steps"] += stats["row_steps"]
        self.step["slot_steps"] += len(stats["live"]) * stats["places"]

    def sampled(self):
        """All of the step is sampled and judged."""
        self.sampled_at = time.time()

    def reference(self, batch, outputs):
        """The reference has gone over a Batch; outputs: its learner.Forward."""
        inputs, sampled = batch.ids.numel(), len(batch.targets)
        self.step["reference"] += self.config.flops(inputs, outputs.computed_pairs, sampled)
        self.step["causal/learner"] += self.config.flops(inputs, batch.visible_pairs, sampled)

    def learner(self, batch, outputs):
        """The policy has gone over a Batch, forward and backward."""
        inputs, sampled = batch.ids.numel(), len(batch.targets)
        ran = self.config.learning_flops(
            inputs, outputs.computed_pairs, sampled, self.recompute, self.adapters
        )
        self.step.update(ran)
        # Backward takes as much as forward for the activations, and as much again for the weights
        # (for LoRA's next to nothing).
        times = 2 if self.adapters else 3
        needed = self.config.flops(inputs, batch.visible_pairs, sampled)
        self.step["causal/learner"] += times * needed

    def learnt(self, device):
        """The step's updates are done."""
        dist.synchronize(device)
        self.learnt_at = time.time()

    def evaluation(self, row, flops):
        """A held-out evaluation took so many FLOPs, over all ranks. Returns its row."""
        self.total["eval"] += flops
        return row

    # ---- what came of it

    def row(self, tokens, learnt_tokens):
        """The metrics of the step so far, over all ranks. tokens: sampled; learnt_tokens: seen by
        one update."""
        done = dist.totals({name: self.step[name] for name in PARTS + OTHER})
        self.step.clear()
        self.total["train"] += sum(done[part] for part in PARTS)
        self.total["causal"] += done["causal/rollout"] + done["causal/learner"]
        self.steps += 1

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

    def whole_step(self, device):
        """The metrics that are known at the step's end, after an evaluation."""
        row = self.flops_so_far()
        row["time/step"] = time.time() - self.step_begun
        row["memory/peak_gb"] = dist.peak_memory(device) / 1e9
        return row

    def flops_so_far(self):
        """The run's FLOPs over all ranks, under the names that all stages log."""
        return flops_so_far(self.total)

    def seconds_left(self, steps):
        """How long so many more steps will take."""
        return (time.time() - self.begun) / self.steps * steps
