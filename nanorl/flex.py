"""The learner's attention on a GPU: the packed row in one kernel, by FlexAttention.

Read attention.py's SharedPrefixAttention first. It is the plain form, and what a CPU runs.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanorl.attention import SharedPrefixAttention
from nanorl.compilers import can_compile

# Slots along a square of PackedFlexAttention: what FlexAttention goes by where it is not told.
BLOCK = 128
# A row is padded to this many slots or to a power of two above: each length is compiled for itself.
SHORTEST = 1024
# It serves where it computes at most so many pairs for one that is seen. Rectangles compute 1.6 to
# 2. It computes about 2 where completions have 150 tokens, 7 where they have 30 (docs/log.md).
MOST_COMPUTED = 4


def packed_attention(rows, device, dtype, head_dim):
    """What the learner attends with, over `rows` of a packed row with activations in `dtype`."""
    if flex_serves(rows, device, dtype, head_dim):
        return PackedFlexAttention(rows, device)
    return SharedPrefixAttention(rows, device)


def flex_serves(rows, device, dtype, head_dim):
    """Whether the learner's attention is PackedFlexAttention. NANORL_FLEX=0 turns it off.

    In fp32 and fp64 it is the plain form, which is the more exact one; the kernel has no fp64. Its
    products need 16 channels a head, and to compile it takes Triton and a C compiler. Short rows
    fill the kernel's squares badly, and are not worth its compilation.
    """
    if os.environ.get("NANORL_FLEX") == "0":
        return False
    half = dtype in (torch.bfloat16, torch.float16)
    if not (device.type == "cuda" and half and head_dim >= 16 and can_compile()):
        return False
    T = sum(row.length for row in rows)
    pairs = pairs_in_squares(rows, padded_length(T) // BLOCK)  # (blocks, blocks)
    computed = (pairs > 0).sum() * BLOCK * BLOCK
    return bool(computed <= MOST_COMPUTED * pairs.sum())


@functools.cache
def compiled_flex():
    """FlexAttention (Dong et al. 2024) as a kernel: compiled once a length of the row.

    One kernel for all lengths (dynamic=True) checks bounds everywhere, and has given NaN
    (github.com/pytorch/pytorch/issues/186775). fullgraph: without a kernel it is an error, and not
    a matrix of T x T scores.
    """
    # Seven lengths from SHORTEST to 65,536, each with and without gradients, are more than the 8
    # that PyTorch allows.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class PackedFlexAttention:
    """SharedPrefixAttention in one kernel: the same constructor, call and results.

    The kernel goes through queries and keys in squares of BLOCK x BLOCK, and leaves out those in
    which no query sees a key. In those where each query sees each key it looks at no mask. For the
    picture in batch.py, if a square were 3 x 3 (x: is seen):

                    A  A  A | a1 a2 a3 | B  B  b1
            A       x       |          |
            A       x  x    |          |               partial   nothing   nothing
            A       x  x  x |          |
            ----------------+----------+----------
            a1      x  x  x | x        |
            a2      x  x  x | x  x     |               full      partial   nothing
            a3      x  x  x |       x  |
            ----------------+----------+----------
            B               |          | x
            B               |          | x  x          nothing   nothing   partial
            b1              |          | x  x  x

    Nothing is cut out or copied together as for rectangles, and there is one shape instead of as
    many as there are rectangles. Variable-length attention (torch.nn.attention.varlen) would need
    a copy of the prompt's keys for each sample; or two calls, merged by their log-sum-exps, through
    which it has no gradient.

    rows have to be in the order of their slots, as batch.make_batch has them.
    """

    def __init__(self, rows, device):
        # Of each slot: where its own row begins, and its prefix.
        T = sum(row.length for row in rows)
        self.padded = padded_length(T)
        runs = runs_of_slots(rows, self.padded).to(device)  # (3, padded)
        own_start, prefix_start, prefix_end = runs

        def sees(_batch, _head, query, key):
            own = (key >= own_start[query]) & (key <= query)
            prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
            return own | prefix

        # Of each square, in how many pairs the query sees the key. Counted on the CPU: the GPU is
        # not waited for.
        pairs = pairs_in_squares(rows, self.padded // BLOCK)  # (blocks, blocks)
        full = pairs == BLOCK * BLOCK
        partial = (pairs > 0) & ~full
        squares = torch.stack([partial, full]).to(device)  # (2, blocks, blocks)

        # What is computed. Blocks of nothing but padding see nothing and are not.
        self.computed_slots = -(-T // BLOCK) * BLOCK
        self.computed_pairs = int((pairs > 0).sum()) * BLOCK * BLOCK
        self.mask = BlockMask.from_kv_blocks(
            *listed(squares[0]),
            *listed(squares[1]),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(self.padded, self.padded),
        )

    def __call__(self, _layer, q, k, v):
        T = q.size(1)
        # (1, heads, padded, D) each
        q, k, v = self.pad(q), self.pad(k), self.pad(v)
        y = compiled_flex()(q, k, v, block_mask=self.mask, enable_gqa=True)
        return y.transpose(1, 2)[:, :T]

    def pad(self, x):
        """x (1, T, heads, D) -> (1, heads, padded, D)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.padded - x.size(1))).transpose(1, 2)


def padded_length(T):
    """The power of two from T on: five lengths in a run of at most 16,384 tokens a forward."""
    return max(SHORTEST, 1 << (T - 1).bit_length())


def runs_of_slots(rows, padded):
    """Of each slot: its row's start, its prefix's start and end -> (3, padded), int32.

    A slot of the padding is a row of its own.
    """
    lengths = torch.tensor([row.length for row in rows])
    own_start = torch.tensor([row.start for row in rows])
    prefix_start = torch.tensor([row.prefix_start for row in rows])
    prefix_end = prefix_start + torch.tensor([row.prefix_length for row in rows])
    runs = torch.stack([own_start, prefix_start, prefix_end])  # (3, rows)
    of_slots = runs.repeat_interleave(lengths, dim=1)  # (3, T)

    slots = torch.arange(of_slots.size(1), padded)
    of_padding = torch.stack([slots, slots, slots])
    return torch.cat([of_slots, of_padding], 1).int()


def pairs_in_squares(rows, blocks):
    """In how many pairs the query sees the key, block of queries by block of keys.

    (blocks, blocks), float64. The sum is that of the rows' visible_pairs.
    """
    own = slots_in_blocks([(row.start, row.length) for row in rows], blocks)
    prefix = slots_in_blocks([(row.prefix_start, row.prefix_length) for row in rows], blocks)

    # Each slot sees its whole prefix, and its own row in earlier blocks.
    pairs = own.T @ prefix + (own.T @ own).tril(-1)
    # In its own block a row's n slots see 1, 2, ... n of themselves.
    pairs.diagonal().add_((own * (own + 1) / 2).sum(0))
    return pairs


def slots_in_blocks(runs, blocks):
    """How many slots of each run (start, length) are in each block -> (runs, blocks), float64."""
    start, length = torch.tensor(runs, dtype=torch.float64).T[..., None]  # (runs, 1) each
    block_start = BLOCK * torch.arange(blocks)  # (blocks,)
    first = torch.maximum(start, block_start)
    end = torch.minimum(start + length, block_start + BLOCK)
    return (end - first).clamp(min=0)


def listed(squares):
    """squares (blocks, blocks), bool -> how many are True in each row, (1, 1, blocks), and where,
    (1, 1, blocks, blocks), those first: as FlexAttention wants them."""
    where = squares.int().argsort(dim=1, descending=True, stable=True)
    return squares.sum(1).int()[None, None], where.int()[None, None]
