"""How a token is drawn: by the inverse of the cumulative probability, at a keyed random number.

The uniform number is a pure function of (prompt key, sample, position). So a sample does not depend
on who shared its batch, on the order of rows, on refill or on the number of ranks: exactly so in
fp64. In fp32 and bf16 the logits' last bits change with the batch's shape, and a token may flip.
"""

from collections import namedtuple

import torch

from nanorl.gpt import scaled

# ids include the stop token; logprobs has one float per id; finished is False where
# max_new_tokens cut it off.
Completion = namedtuple("Completion", "ids logprobs finished")


def completion(ids, logprobs, stop_ids):
    """A row's tokens up to its first stop token, which is kept: it was sampled, and is trained."""
    for t, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids[: t + 1], logprobs[: t + 1], True)
    return Completion(ids, logprobs, False)


# ---- random numbers ------------------------------------------------------------------------------

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64: keeps 0 from being a fixed point


def mix(x):
    """splitmix64's finaliser, on int64 tensors (Steele et al. 2014).

    Multiplication wraps, as it must. A right shift is made logical by a mask.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_keys(prompt_keys, samples):
    """(prompt key, sample number), int64 tensors of one shape -> one int64 a row."""
    return mix(mix(prompt_keys + GOLDEN) + samples * GOLDEN)


def uniforms(keys, positions):
    """(row key, position) -> a float64 in [0, 1), of 53 bits. There is no state."""
    bits = (mix(keys + (positions + 1) * GOLDEN) >> 11) & (2**53 - 1)
    return bits.double() * 2.0**-53


# ---- a token -------------------------------------------------------------------------------------


def sample(logits, u, temperature):
    """logits (B, V), u (B,) in [0, 1) -> ids (B,) and their log-probs (B,).

    An id is the first token whose cumulative probability passes u times the total. A token of
    probability zero is never chosen. Its log-prob is the one that gpt.token_logprobs gives.
    Temperature 0 is the most likely token, with its log-prob at temperature 1.

    The search takes two steps, first a block of tokens, then the token in it. Cumulative sums are
    slow and must be in fp64: in fp32 their steps of 6e-8 swallow rare tokens (15% of 32,768 could
    never be drawn).
    """
    z = scaled(logits, temperature or 1.0)  # (B, V)
    V = z.size(1)
    top = z.amax(-1, keepdim=True)  # (B, 1)
    masses = masses_in_blocks(z, top)  # (B, blocks, tokens a block)
    block_masses = masses.sum(-1).double()  # (B, blocks)
    if temperature == 0:
        ids = z.argmax(-1, keepdim=True)  # (B, 1)
    else:
        block, inside = pick(block_masses, u[:, None])  # (B, 1) each
        tokens_a_block = masses.size(2)
        whole_block = block[..., None].expand(-1, 1, tokens_a_block)
        own_masses = masses.gather(1, whole_block)[:, 0].double()  # (B, tokens a block)
        token, _ = pick(own_masses, inside)  # (B, 1)
        ids = (block * tokens_a_block + token).clamp(max=V - 1)
    log_total = block_masses.sum(-1, keepdim=True).log().to(z.dtype)  # (B, 1)
    logprobs = z.gather(1, ids) - top - log_total
    return ids[:, 0], logprobs[:, 0]


def masses_in_blocks(z, top):
    """exp(z - top) of z (B, V), in blocks of about the square root of V, (B, blocks, tokens)."""
    B, V = z.shape
    block = 1 << (V.bit_length() + 1) // 2  # a power of two
    blocks = -(-V // block)
    masses = z.new_empty(B, blocks * block)
    torch.exp(z - top, out=masses[:, :V])
    masses[:, V:] = 0
    return masses.view(B, blocks, block)


def pick(masses, point):
    """The first index whose cumulative mass passes `point`, a share of the total, (B, 1).

    masses (B, n): fp64, none negative. An index without mass is never picked. Returns the index
    (B, 1), and where in its own mass the point fell, as a share, (B, 1).
    """
    cumulative = masses.cumsum(-1)  # (B, n)
    total = cumulative[:, -1:]  # (B, 1)
    below_total = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(point.clamp(min=0) * total, below_total)
    index = torch.searchsorted(cumulative, point, right=True)
    index = index.clamp(max=masses.size(1) - 1)  # it is beyond the end only where masses are NaN
    mass = masses.gather(1, index)
    before = cumulative.gather(1, index) - mass
    return index, (point - before) / mass
