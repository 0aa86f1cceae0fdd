"""What decides a token: inverse-CDF sampling from a uniform that is a pure function of (prompt key, sample, position). So a sample does not depend on who
shared its batch, on row order, refill or world size: exactly so in fp64; in fp32 and bf16 the logits' last bits change with the batch's shape, and a token
may flip."""

from collections import namedtuple

import torch

from nanorl.gpt import scaled

# ids include the stop token; logprobs has one float per id; finished is False when max_new_tokens cut it off.
Completion = namedtuple("Completion", "ids logprobs finished")


def completion(ids, logprobs, stop_ids):
    """A row's tokens up to its first stop token, which is kept: it was sampled, and is trained."""
    for t, id in enumerate(ids):
        if id in stop_ids:
            return Completion(ids[: t + 1], logprobs[: t + 1], True)
    return Completion(ids, logprobs, False)


def _mix(x):
    """splitmix64's finaliser on int64 tensors: multiplication wraps, >> is made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64: keeps 0 from being a fixed point


def row_keys(prompt_keys, samples):
    """(prompt key, sample number), int64 tensors of one shape -> one int64 a row."""
    return _mix(_mix(prompt_keys + _GOLDEN) + samples * _GOLDEN)


def uniforms(keys, positions):
    """(row key, position) -> a float64 in [0, 1): 53 bits of a counter-based generator, no state."""
    return ((_mix(keys + (positions + 1) * _GOLDEN) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _pick(masses, point):
    """masses (B, n) in fp64, none negative; point (B, 1), a share of the total, -> the first index (B, 1) whose cumulative mass passes point x total, never one
    without mass; and where in its own mass the point fell, as a share, (B, 1)."""
    cdf = masses.cumsum(-1)
    total = cdf[:, -1:]
    point = torch.minimum(
        point.clamp(min=0) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    index = torch.searchsorted(cdf, point, right=True).clamp(
        max=masses.size(1) - 1
    )  # beyond the end only where masses are NaN
    mass = masses.gather(1, index)
    return index, (point - (cdf.gather(1, index) - mass)) / mass


def sample(logits, u, temperature):
    """logits (B, V), u (B,) in [0, 1) -> ids (B,): the first token whose cumulative probability passes u times
    the total, and its log-prob (B,), as token_logprobs gives it. A token of probability zero is never chosen.
    Temperature 0 is the most likely token, with its log-prob at temperature 1.

    Found in two steps, the block of tokens and the token in it, because cumulative sums are slow and must be in fp64: in
    fp32 their steps of 6e-8 swallow rare tokens (15% of 32,768 could never be drawn)."""
    z = scaled(logits, temperature or 1.0)  # (B, V)
    B, V = z.shape
    top = z.amax(-1, keepdim=True)  # (B, 1)
    block = 1 << (V.bit_length() + 1) // 2  # about the square root of V, a power of two
    masses = z.new_empty(B, -(-V // block) * block)
    torch.exp(z - top, out=masses[:, :V])
    masses[:, V:] = 0
    masses = masses.view(B, -1, block)  # (B, blocks, block)
    of_blocks = masses.sum(-1).double()  # (B, blocks)
    if temperature == 0:
        ids = z.argmax(-1, keepdim=True)  # (B, 1)
    else:
        chosen, inside = _pick(of_blocks, u[:, None])  # (B, 1)
        within, _ = _pick(
            masses.gather(1, chosen[..., None].expand(-1, 1, block))[:, 0].double(), inside
        )
        ids = (chosen * block + within).clamp(max=V - 1)
    logprobs = z.gather(1, ids) - top - of_blocks.sum(-1, keepdim=True).log().to(z.dtype)
    return ids[:, 0], logprobs[:, 0]
