"""Who sees whom: attention for rows as they are, documents in a row, samples that share a prompt.

CausalAttention and SharedPrefixAttention are an `attend(layer, q, k, v)` for GPT.hidden:
q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). flex.py has the second in one kernel, for
a GPU. The letters are gpt.py's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Up to so many keys, bf16 on a CPU is faster by plain matrix products (docs/log.md).
SHORT = 512


class MaskedAttention:
    """Attention where `allowed` (B, 1, T, T_keys), bool, lets query t see a key; None: causal.

    The mask is made once, in the form that the kernel adds to the scores, and serves all layers.
    From a bool mask each layer would make such a form anew and keep it for its backward.
    """

    def __init__(self, allowed=None):
        self.allowed = allowed
        self.bias = None  # the mask as it is added to the scores: 0 or -inf

    def __call__(self, q, k, v):
        """q (B, H, T, D), k and v (B, K, T_keys, D) -> (B, H, T, D)."""
        on_cpu_in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if on_cpu_in_bf16 and k.size(2) <= SHORT:
            return self.by_matrix_products(q, k, v)
        if self.allowed is not None and self.bias is None:
            self.bias = self.make_bias(q)
        shared = q.size(1) != k.size(1)
        if shared and q.device.type == "cuda" and self.allowed is not None:
            # No fused kernel of a GPU takes a mask together with heads that share keys.
            together = q.size(1) // k.size(1)
            k = k.repeat_interleave(together, dim=1)
            v = v.repeat_interleave(together, dim=1)
            shared = False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.bias,
            is_causal=self.allowed is None,
            enable_gqa=shared,
        )

    def make_bias(self, q):
        """-> (B, 1, T, T_keys), its rows a multiple of 8 apart: else a GPU's kernels copy it."""
        *shape, T_keys = self.allowed.shape
        padded = -(-T_keys // 8) * 8
        bias = q.new_zeros(*shape, padded)[..., :T_keys]
        return bias.masked_fill_(~self.allowed, float("-inf"))

    def by_matrix_products(self, q, k, v):
        """The same, spelled out: on a CPU in bf16, on short rows, 1.6 to 4 times as fast as the
        fused kernel (docs/log.md). All queries of a key/value head are in one product."""
        (B, H, T, D), (K, T_keys) = q.shape, k.shape[1:3]
        together = H // K * T
        if self.bias is None:
            allowed = self.allowed
            if allowed is None:
                allowed = torch.ones(T, T_keys, dtype=torch.bool).tril()
            bias = torch.zeros(allowed.shape, dtype=q.dtype)
            bias.masked_fill_(~allowed, float("-inf"))
            self.bias = bias.expand(B, H, T, T_keys).reshape(B * K, together, T_keys)
        q = q.reshape(B * K, together, D)
        k = k.reshape(B * K, T_keys, D)
        v = v.reshape(B * K, T_keys, D)
        scores = torch.baddbmm(self.bias, q, k.transpose(1, 2), alpha=D**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


class CausalAttention:
    """A token sees itself and those before it. Rows padded on the right need no mask then.

    document (B, T) numbers each token's document, and attention stays inside the document.
    """

    def __init__(self, document=None):
        allowed = None
        if document is not None:
            T = document.size(1)
            causal = torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
            same = document[:, :, None] == document[:, None, :]  # (B, T, T)
            allowed = (same & causal)[:, None]  # (B, 1, T, T)
        self.masked = MaskedAttention(allowed)

    def __call__(self, _layer, q, k, v):
        y = self.masked(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2)


# ---- rows packed into one, with shared beginnings ------------------------------------------------


@dataclass
class Block:
    """b rows of like length in one rectangle: t queries a row, each with u + t keys.

    Rows shorter than t, and prefixes shorter than u, are padded on the right.
    """

    query_slots: torch.Tensor  # (b, t) the slot of the packed row that each query comes from
    key_slots: torch.Tensor  # (b, u + t) the same of keys: the prefix's, then the row's own
    attend: MaskedAttention


class SharedPrefixAttention:
    """Causal attention in a packed row, q (1, T, H, D), k and v (1, T, K, D) -> (1, T, H, D).

    rows: runs of slots with start, length, prefix_start and prefix_length (batch.Row), which see
    their prefix and themselves. A prompt's keys and values are computed once for all its samples,
    and gradients flow back into them from each. The rows are cut out, put into rectangles, one
    kernel call each, and what comes out is put back. For the picture in batch.py:

        block 1   a1 a2    query_slots [[3, 4]]       key_slots [[0, 1, 2, 3, 4]]
        block 2   a3, b1   query_slots [[5], [8]]     key_slots [[0, 1, 2, 5], [6, 7, _, 8]]
        block 3   A A A    query_slots [[0, 1, 2]]    key_slots [[0, 1, 2]]
        block 4   B B      query_slots [[6, 7]]       key_slots [[6, 7]]

    The prompt B is shorter than A: the place _ is padding, which the mask hides. The outputs, one
    block after the other, are those of slots 3 4 5 8 0 1 2 6 7, so that slot 0's is number 4:

        output_at  [4, 5, 6, 0, 1, 2, 7, 8, 3]
    """

    def __init__(self, rows, device):
        # What is computed, padding included.
        self.computed_slots = 0
        self.computed_pairs = 0  # of a query and a key

        self.blocks = []
        # Where each slot's output is among the outputs of all blocks.
        output_at = torch.zeros(sum(row.length for row in rows), dtype=torch.long)  # (T,)
        for some_rows in rows_of_like_length(rows):
            query_slots, key_slots, allowed, is_real = rectangle(some_rows)
            b, t = query_slots.shape
            outputs = self.computed_slots + torch.arange(b * t).view(b, t)
            output_at[query_slots[is_real]] = outputs[is_real]
            self.computed_slots += b * t
            self.computed_pairs += b * t * key_slots.size(1)
            block = Block(
                query_slots=query_slots.to(device),
                key_slots=key_slots.to(device),
                attend=MaskedAttention(allowed.to(device)),
            )
            self.blocks.append(block)
        self.output_at = output_at.to(device)

    def __call__(self, _layer, q, k, v):
        q_table, k_table, v_table = table(q[0]), table(k[0]), table(v[0])
        outputs = []
        for block in self.blocks:
            # (b, heads, t or u + t, D) each
            block_q = look_up(q_table, block.query_slots, q).transpose(1, 2)
            block_k = look_up(k_table, block.key_slots, k).transpose(1, 2)
            block_v = look_up(v_table, block.key_slots, v).transpose(1, 2)
            y = block.attend(block_q, block_k, block_v)
            outputs.append(y.transpose(1, 2).flatten(0, 1))  # (b * t, H, D)
        return pick(torch.cat(outputs), self.output_at)[None]


def rows_of_like_length(rows):
    """Rows -> lists of rows to be padded to one length: completions, then prompts, longest first.

    A row is at least 0.8 times as long as the first one of its list, so padding stays small.
    """
    blocks = []
    present = [row for row in rows if row.length]
    present.sort(key=lambda row: (row.prefix_length > 0, row.length), reverse=True)
    for row in present:
        if not blocks or not alike(row, blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(row)
    return blocks


def alike(row, longest):
    """Whether a row may be padded to this one's length."""
    both_have_a_prefix_or_none = (row.prefix_length > 0) == (longest.prefix_length > 0)
    return both_have_a_prefix_or_none and row.length >= 0.8 * longest.length


def rectangle(rows):
    """b rows -> their query slots (b, t), key slots (b, u + t), mask (b, 1, t, u + t) and which
    queries are real (b, t): the rest is padding."""
    start = torch.tensor([[row.start] for row in rows])  # (b, 1), as the next three
    length = torch.tensor([[row.length] for row in rows])
    prefix_start = torch.tensor([[row.prefix_start] for row in rows])
    prefix_length = torch.tensor([[row.prefix_length] for row in rows])
    in_row = torch.arange(int(length.max()))  # (t,)
    in_prefix = torch.arange(int(prefix_length.max()))  # (u,)

    # Padding stands for the first slot, which always exists: no real query sees it.
    is_real = in_row < length  # (b, t)
    query_slots = (start + in_row).where(is_real, start)
    prefix_is_real = in_prefix < prefix_length  # (b, u)
    prefix_slots = (prefix_start + in_prefix).where(prefix_is_real, prefix_start)
    key_slots = torch.cat([prefix_slots, query_slots], 1)

    # A query sees the whole prefix, itself and what is before it in its own row. A row's padding
    # comes after all real queries, so that this hides it too.
    b, t = query_slots.shape
    sees_prefix = prefix_is_real[:, None].expand(-1, t, -1)  # (b, t, u)
    sees_own = (in_row <= in_row[:, None]).expand(b, -1, -1)  # (b, t, t)
    allowed = torch.cat([sees_prefix, sees_own], 2)[:, None]
    return query_slots, key_slots, allowed, is_real


def pick(x, at):
    """Rows of x (n, ...) at the places `at`, integers of any shape -> (*at.shape, ...).

    It is written as a look-up in a table, because of the ways to write it this is the one whose
    backward pass is fast on a CPU and has a fixed order of summation. A row that is picked often
    gets the sum of as many gradients, which is taken in fp32 or better: in bf16 a sum of 1,000
    ones is 256.
    """
    return look_up(table(x), at, x[None])


def table(x):
    """x (n, ...) -> the table (n, rest) that look_up reads. On a GPU its kernel sums in fp32."""
    if x.device.type == "cuda":
        return x.flatten(1)
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def look_up(rows, at, x):
    """Rows of table(x[0]) -> (*at.shape, ...) with the shape and type that x[0]'s rows have."""
    return F.embedding(at, rows).to(x.dtype).unflatten(-1, x.shape[2:])
