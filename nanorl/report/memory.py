"""What a training run will hold in memory at its peak, said before its first step.

In the order of a step of RL:

    weights       of the policy, and copies: the sampler's narrower ones, a KL term's reference
    cache         of the sampler, while it decodes; its size follows from its shapes
    graphs        what captured decode steps work in, which a GPU keeps apart
    activations   what backward needs, while the learner runs: on a CPU never at one time with the
                  cache, which a GPU keeps
    gradients     as large as what is trained
    all-reduce    the gradients once more, in one row, on several ranks. The activations are gone by
                  then, so it adds to the peak only where it is larger than they are
    optimizer     AdamW's two moments, each as large as that

Activations are counted on two small forward passes, tensor by tensor, and scaled up.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from nanorl import learner
from nanorl.batch import pack
from nanorl.gpt import GPT, LOGITS_AT_ONCE
from nanorl.gpu import kernels_serve
from nanorl.report import sizes
from nanorl.report.cost import cache_numbers
from nanorl.runtime import dist

CPU_TOKENS = 16384  # of a forward on a CPU
MOST_TOKENS = 65536  # and on a GPU: its products are as fast with fewer

# On a CPU the C library keeps freed memory that later tensors do not fit, the more the more their
# shapes differ. These are peaks over what is needed, with a margin: the largest of runs of a few
# steps in fp32 and bf16 (docs/log.md), so that the estimate is a bound. On a GPU torch's own
# allocator keeps less, which is not measured.
HOLES = {
    "conversations": 1.7,
    "conversations, LoRA": 2.2,
    "packed rows": 1.6,
    "packed rows, LoRA": 1.8,
    "recomputation": 2.6,
}


# ---- activations ---------------------------------------------------------------------------------


def saved_bytes(model, forward):
    """Bytes that autograd keeps between forward() and its backward, without the weights."""
    # Bytes of each storage, by the address of its record (one on the meta device has no other).
    # What shares a storage counts once.
    sizes = {p.untyped_storage()._cdata: 0 for p in model.parameters()}

    def count(tensor):
        storage = tensor.untyped_storage()
        sizes.setdefault(storage._cdata, storage.nbytes())
        return tensor

    recompute, model.recompute = model.recompute, False
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            # The result stays alive while it is counted, so that no two tensors have one address.
            kept = forward()
            total = sum(sizes.values())
            del kept
    finally:
        model.recompute = recompute
    return total


def activation_bytes(model, small, large, tokens, packed=False):
    """Bytes of what backward needs for `tokens` tokens at a time.

    small, large: (a forward pass, how many tokens it has), of rows of the kind to come.
    packed: the shapes change from one micro-batch to the next.
    """
    # What does not grow with the tokens, such as narrow copies of the weights, is there once.
    small_forward, small_tokens = small
    large_forward, large_tokens = large
    small_bytes = saved_bytes(model, small_forward)
    large_bytes = saved_bytes(model, large_forward)
    per_token = (large_bytes - small_bytes) / (large_tokens - small_tokens)
    once = max(0, small_bytes - per_token * small_tokens)

    # While a block's backward runs its gradients are there too, about as much as it keeps.
    config = model.config
    block = per_token / config.n_layer
    kept = per_token
    if model.recompute:
        # All that is kept is what enters each block, and one block at a time.
        entering = config.n_layer * config.n_embd * model.compute_dtype.itemsize
        kept = entering + block
        once = once / config.n_layer
    return holes(model, packed) * (once + tokens * (kept + block))


class FusedAttention(torch.autograd.Function):
    """Stands for a GPU's kernel where only sizes count: it keeps q, k, v, y and a sum a query."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)  # (B, T, H, D)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("it has sizes and no numbers")


def activation_bytes_on_a_gpu(config, dtype, tokens, recompute=False):
    """activation_bytes of rows of text, counted on the meta device, which holds sizes alone."""
    with torch.device("meta"):
        model = GPT(config)
    model.compute_dtype, model.recompute = dtype, recompute

    def attend(_layer, q, k, v):
        return FusedAttention.apply(q, k, v)

    def forward(n):
        ids = torch.zeros(1, n, dtype=torch.long, device="meta")
        h = model.hidden(ids, attend=attend)  # (1, n, C)
        return model.logprobs(h[0], ids[0], chunk_elements=LOGITS_AT_ONCE["cuda"])

    small, large = ((partial(forward, n), n) for n in (64, 128))
    return activation_bytes(model, small, large, tokens)


def holes(model, packed):
    """By what the memory that is taken exceeds the memory that is needed."""
    if model.cos.device.type != "cpu":
        return 1.0
    if model.recompute:
        return HOLES["recomputation"]
    lora = not any(p.requires_grad for p in model.parameters())
    rows = "packed rows" if packed else "conversations"
    return HOLES[f"{rows}, LoRA" if lora else rows]


def passes(model, rollouts):
    """-> small and large, as activation_bytes takes them.

    They are of a few completions of the longest group, and of that twice.
    """
    longest = max(rollouts, key=sampled_tokens)
    few = replace(longest, completions=longest.completions[:4])
    return learner_pass(model, [few]), learner_pass(model, [few, few])


def learner_pass(model, rollouts):
    """-> (the learner's forward pass over Rollouts, how many tokens it has)."""
    shape = len(rollouts), len(rollouts[0].completions)
    ones = torch.ones(shape, dtype=torch.float64)  # as advantages and as token weights
    (batch,) = pack(rollouts, ones, ones, math.inf, model.cos.device)
    return partial(learner.forward, model, batch), batch.ids.numel()


def sampled_tokens(rollout):
    return sum(len(completion.ids) for completion in rollout.completions)


def device_tokens(model, trained, settings):
    """settings["device_tokens"], tokens of one forward. Where that is 0 it is filled in.

    On a CPU with CPU_TOKENS. On a GPU with a power of two of which, beside gradients and AdamW's
    moments, backward needs a third of the free memory: the sampler's cache takes half at most. At
    least a row of the settings' seq_len, and the same on every rank.

    trained: bytes of the parameters that are trained.
    """
    if not settings["device_tokens"]:
        settings["device_tokens"] = CPU_TOKENS
        if sizes.on_a_gpu(model.cos.device):
            row = settings.get("seq_len", 256)
            settings["device_tokens"] = max(row, tokens_that_fit(model, trained))
            dist.say(
                f"      --device_tokens={settings['device_tokens']}: what backward needs for so "
                "many tokens at a time fits a third of the free memory"
            )
    return settings["device_tokens"]


def tokens_that_fit(model, trained):
    """The power of two, up to MOST_TOKENS, on every rank the same. trained: bytes."""
    # Packed completions take about as much as text does (docs/log.md).
    of_text = partial(activation_bytes_on_a_gpu, model.config, model.compute_dtype)
    once = of_text(0, model.recompute)
    per_token = of_text(1, model.recompute) - once
    free = dist.free_memory(model.cos.device) - 3 * trained
    tokens = min(MOST_TOKENS, max(1, int((free / 3 - once) / per_token)))
    return sizes.power_of_two(int(dist.total(tokens, "min")))


# ---- the sampler's cache -------------------------------------------------------------------------


def cache_bytes(config, itemsize, prompts, prompt_tokens, rows, new_tokens):
    """Of prompts x prompt_tokens and rows x new_tokens (nanorl/cache.py)."""
    tokens = prompts * prompt_tokens + rows * new_tokens
    return itemsize * cache_numbers(config, tokens)


def graph_bytes(model, device, rows, columns, prompt_columns):
    """At most so much do the CUDA graphs of one set of caches work in.

    All of them share the memory of the largest, a step of `rows` rows over `columns` of their own
    and prompt_columns of their prompts'. What is alive at one time is a layer or the sampling.
    """
    config, itemsize = model.config, model.compute_dtype.itemsize
    float_size = max(4, itemsize)

    # Sampling: logits as the head gives them, of this part of the rows and of the last; and three
    # more in fp32, scaled, without their largest, and as masses (nanorl/sampling.py).
    V = config.n_tokens
    rows_at_once = min(rows, max(1, LOGITS_AT_ONCE["cuda"] // V))
    sampling = rows_at_once * V * (2 * itemsize + 3 * float_size)

    # A layer: what enters it and its norm, and of the rest the MLP's three or attention's queries,
    # keys, values and outputs. There may be twice as many cells on the grid as rows.
    mlp = 3 * config.n_inner
    attention = 16 * config.n_head * config.head_dim
    layer = rows * (4 * config.n_embd + max(mlp, attention)) * float_size
    if not kernels_serve(device, model.compute_dtype):
        # The plain form has the scores of one part of the keys, and three more in fp32.
        scores = rows * config.n_head * max(columns, 2 * prompt_columns)
        layer += scores * (itemsize + 3 * float_size)
    return max(sampling, layer)


def bytes_per_row(model, new_tokens):
    """That one more row takes while it is decoded.

    Its own cache, and as much again for its prompt's (which the rows of a group share).
    """
    return 2 * cache_numbers(model.config, new_tokens) * model.compute_dtype.itemsize


def rows_that_fit(engine, params, samples, new_tokens):
    """How many rows half of the free memory holds, beside gradients and AdamW's moments.

    At least a group of `samples` rows. The number is the same on every rank.
    """
    model = engine.learner
    gradients_and_moments = 12 * sum(p.numel() for p in params)
    free = dist.free_memory(model.cos.device) - gradients_and_moments
    rows = free // 2 // engine.kept // bytes_per_row(model, new_tokens)
    return max(samples, int(dist.total(rows, "min")))


# ---- all of it -----------------------------------------------------------------------------------


def estimate(model, copies, trained, used, activations, cache=0, cache_stays=False, graphs=0):
    """-> {part: bytes}, whose sum is the peak.

    copies: other models in memory. trained: the parameters that the optimizer has. used: bytes in
    use now, before the first step. activations, cache, graphs: bytes.
    """
    weights = bytes_of(model.parameters())
    of_copies = sum(bytes_of(copy.parameters()) for copy in copies)
    gradients = sum(p.numel() * p.element_size() for p in trained)

    # These come one after the other, and the largest counts. So does the cache, but where it stays,
    # as the engine's does on a GPU.
    in_turn = {"activations": activations, "all-reduce": 0}
    if dist.world_size() > 1:
        in_turn["all-reduce"] = gradients  # dist.sum_gradients
    if not cache_stays:
        in_turn["cache"] = cache
    largest = max(in_turn, key=in_turn.get)
    parts = {name: 0 for name in in_turn}
    parts[largest] = in_turn[largest]
    already = 0  # bytes in use that are the cache's and the graphs', since the probe
    if cache_stays:
        parts["cache"] = cache
        already = cache + graphs

    return dict(
        weights=weights,
        copies=of_copies,
        gradients=gradients,
        optimizer=2 * gradients,
        **parts,
        graphs=graphs,
        program=max(0, used - weights - of_copies - already),
    )


def bytes_of(params):
    """Of parameters; one that is there under two names counts once."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in params}.values())


# What helps where a model does not fit.
REMEDY = "lower --device_tokens, or --recompute, or --lora_rank=16"


def describe(parts, used, free, remedy=REMEDY):
    """The estimate in words -> lines, with a warning where it does not fit.

    used: bytes in use now. free: bytes that can still be taken. remedy: what the user can do.
    """
    total = gigabytes(sum(parts.values()))
    named = ", ".join(f"{name} {gigabytes(n)}" for name, n in parts.items() if n > 5e6)
    lines = [f"memory: about {total} GB at most: {named}"]

    to_come = sum(parts.values()) - used
    if to_come > free:
        lines.append(
            f"WARNING: {gigabytes(to_come)} GB of that are still to be taken and "
            f"{gigabytes(free)} are free: {remedy}"
        )
    return lines


def gigabytes(n):
    return f"{n / 1e9:.2f}"
