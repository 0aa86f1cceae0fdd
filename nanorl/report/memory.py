"""What a training run will hold in memory at its peak, said before its first step. Weights, gradients and AdamW's moments follow from the number of
parameters, caches from their shapes; what backward needs of the activations is counted on one small forward pass, tensor by tensor."""

import math
from dataclasses import replace
from functools import partial

import torch

from nanorl import learner
from nanorl.batch import pack
from nanorl.report.cost import cache_numbers
from nanorl.runtime import dist

# On a CPU the C library keeps freed memory that later tensors do not fit, the more the more their shapes differ. Peak over what is needed, as measured
# (docs/log.md); on a GPU torch's own allocator keeps less, which is not measured.
HOLES = {
    "rows of one length": 1.2,
    "packed rows": 1.6,
    "packed rows, LoRA": 1.8,
    "recomputation": 2.6,
}


def saved_bytes(model, forward):
    """Bytes that autograd keeps between forward() and its backward, without the weights."""
    seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def look(t):
        storage = t.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return t

    recompute, model.recompute = model.recompute, False
    try:
        with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
            kept = forward()  # noqa: F841: alive while it is counted, so that no two tensors have one address
    finally:
        model.recompute = recompute
    return sum(seen.values())


def activation_bytes(model, small, large, tokens, packed=False):
    """Bytes of what backward needs for `tokens` tokens at a time. small, large: (forward, how many tokens it has) twice, of rows of the kind to come: what
    does not grow with the tokens, such as narrow copies of the weights, is there once. While a block's backward runs, its gradients are there too, about as
    much as it keeps; with recomputation a block at a time is all there is. packed: the shapes change from one micro-batch to the next."""
    c = model.config
    (a, n_a), (b, n_b) = ((saved_bytes(model, forward), n) for forward, n in (small, large))
    per_token = (b - a) / (n_b - n_a)
    once, block = max(0, a - per_token * n_a), per_token / c.n_layer
    kept = (
        c.n_layer * c.n_embd * model.compute_dtype.itemsize + block
        if model.recompute
        else per_token
    )
    once = once / c.n_layer if model.recompute else once
    lora = not any(p.requires_grad for p in model.parameters())
    kind = (
        "recomputation"
        if model.recompute
        else "rows of one length"
        if not packed
        else "packed rows, LoRA"
        if lora
        else "packed rows"
    )
    holes = HOLES[kind] if model.cos.device.type == "cpu" else 1.0
    return holes * (once + tokens * (kept + block))


def passes(model, rollouts):
    """-> two forward passes, of a few completions of one group and of twice that, with the tokens of each: what activation_bytes needs."""
    group = max(rollouts, key=lambda r: sum(len(c.ids) for c in r.completions))
    group = replace(group, completions=group.completions[:4])

    def times(n):
        ones = torch.ones(
            n, len(group.completions), dtype=torch.float64
        )  # as advantages and weights
        (batch,) = pack([group] * n, ones, ones, math.inf, model.cos.device)
        return partial(learner.forward, model, batch), batch.ids.numel()

    return times(1), times(2)


def cache_bytes(config, itemsize, prompts, prompt_tokens, rows, new_tokens):
    """Bytes of the sampler's caches (nanorl/cache.py): prompts x prompt_tokens, rows x new_tokens."""
    return itemsize * cache_numbers(config, prompts * prompt_tokens + rows * new_tokens)


def estimate(model, copies, trained, used, activations, cache=0):
    """-> {part: bytes}, whose sum is the peak. copies: other models in memory; trained: parameters that the optimizer has; used: bytes in use now, before
    the first step. The sampler's cache and the activations do not exist at one time."""
    size = lambda params: sum({p.data_ptr(): p.numel() * p.element_size() for p in params}.values())
    weights, sampler = size(model.parameters()), sum(size(other.parameters()) for other in copies)
    n = sum(p.numel() * p.element_size() for p in trained)
    parts = dict(
        weights=weights,
        copies=sampler,
        gradients=n,
        optimizer=2 * n,
        activations=activations,
        cache=0,
    )
    if cache > activations:
        parts.update(activations=0, cache=cache)
    return {**parts, "program": max(0, used - weights - sampler)}


def describe(parts, free):
    """-> lines: the estimate in words, and a warning where it does not fit in `free` bytes more than now."""
    gb = lambda n: f"{n / 1e9:.2f}"
    to_come = sum(parts[name] for name in ("gradients", "optimizer", "activations", "cache"))
    lines = [
        f"memory: about {gb(sum(parts.values()))} GB at most: "
        + ", ".join(f"{name} {gb(n)}" for name, n in parts.items() if n > 5e6)
    ]
    if to_come > free:
        lines.append(
            f"WARNING: {gb(to_come)} GB of that are still to be taken and {gb(free)} are free: lower --device_tokens, or --recompute, or --lora_rank=16"
        )
    return lines


def rows_that_fit(engine, params, samples, new_tokens):
    """How many rows half of the free memory holds, beside gradients and AdamW's moments: the same on every rank."""
    to_come = 12 * sum(p.numel() for p in params)
    half = (dist.free_memory(engine.learner.cos.device) - to_come) // 2
    return max(samples, int(dist.total(half // bytes_per_row(engine.learner, new_tokens), "min")))


def bytes_per_row(model, new_tokens):
    """Memory that one more row takes while it is decoded: its own cache, and as much again for its prompt's (which the rows of a group share)."""
    return 2 * cache_numbers(model.config, new_tokens) * model.compute_dtype.itemsize
