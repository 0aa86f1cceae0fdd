"""Who sees whom: attention for rows as they are, for documents packed into a row, and for samples that share a prompt.

Each is an `attend(layer, q, k, v)` for GPT.hidden, q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). The letters are gpt.py's."""
import torch
import torch.nn.functional as F


class MaskedAttention:
    """Attention where `allowed` (B, 1, T, S), bool, lets query t see key s; None: causal, T = S. One mask, in the kernel's own form, serves all layers:
    given a bool one, each layer would keep a copy for its backward."""

    def __init__(self, allowed=None):
        self.allowed, self.bias = allowed, None

    def __call__(self, q, k, v):
        """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.size(2) <= 512:
            return self._by_matrix_products(q, k, v)
        if self.allowed is not None and self.bias is None:  # (B, 1, T, S), rows of a multiple of 8 apart: kernels on a GPU copy it otherwise
            self.bias = q.new_zeros(*self.allowed.shape[:3], -(-self.allowed.size(3) // 8) * 8)[..., :self.allowed.size(3)]
            self.bias.masked_fill_(~self.allowed, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, is_causal=self.allowed is None, enable_gqa=q.size(1) != k.size(1))

    def _by_matrix_products(self, q, k, v):
        """The same, spelled out: on a CPU in bf16, on short rows, 1.6 to 4 times faster than the fused kernel
        (docs/log.md)."""
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        if self.bias is None:  # (B*K, H/K*T, S): all queries of a key/value head in one product
            allowed = torch.ones(T, S, dtype=torch.bool).tril() if self.allowed is None else self.allowed
            bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
            self.bias = bias.expand(B, H, T, S).reshape(B * K, H // K * T, S)
        q, k, v = q.reshape(B * K, H // K * T, D), k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        scores = torch.baddbmm(self.bias, q, k.transpose(1, 2), alpha=D ** -0.5)  # (B*K, H/K*T, S)
        return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


class CausalAttention:
    """Causal attention, q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). Rows padded on the right need no mask:
    a token only looks to its left. With `document` (B, T), which numbers each token's document, attention stays
    inside the document."""

    def __init__(self, document=None):
        allowed = None
        if document is not None:
            causal = torch.ones(document.size(1), document.size(1), dtype=torch.bool, device=document.device).tril()
            allowed = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]  # (B, 1, T, T)
        self.masked = MaskedAttention(allowed)

    def __call__(self, layer, q, k, v):
        return self.masked(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def pick(x, at):
    """Rows of x (N, ...) at the places `at`, an integer tensor of any shape -> (*at.shape, ...). As a look-up in a table, because of the ways to
    write it this is the one whose backward pass is fast on a CPU and has a fixed order of summation. A row that is picked often gets the sum of as many
    gradients: that is taken in fp32 or better (in bf16 a sum of 1,000 ones is 256)."""
    table = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return F.embedding(at, table).to(x.dtype).unflatten(-1, x.shape[1:])


class SharedPrefixAttention:
    """Causal attention over rows packed into one, q (1, N, H, D), k and v (1, N, K, D), in which rows may share their beginning: the keys and values
    of a prompt are computed once for all its samples, and gradients flow back into them from each.

    rows: (start, length, prefix start, prefix length) of each, a prefix being earlier places of the packed row that it goes on from (length 0: none).
    Rows of like length make a block, padded to its longest; `padded` counts the places, padding and all, and `pairs` the (query, key) pairs computed."""

    def __init__(self, rows, device):
        rows = sorted((row for row in rows if row[1]), key=lambda row: (row[3] > 0, row[1]), reverse=True)
        blocks = []
        for row in rows:
            if not blocks or (row[3] > 0) != (blocks[-1][0][3] > 0) or row[1] < 0.8 * blocks[-1][0][1]:
                blocks.append([])
            blocks[-1].append(row)
        n, self.padded, self.pairs, self.blocks = sum(row[1] for row in rows), 0, 0, []
        back = torch.zeros(n, dtype=torch.long)  # (N,) where each token's output lies among all blocks' outputs
        for block in blocks:
            start, length, prefix_start, prefix_length = torch.tensor(block).T[:, :, None]  # (b, 1) each
            t, tp = torch.arange(int(length.max())), torch.arange(int(prefix_length.max()))
            here, before = t < length, tp < prefix_length  # (b, T), (b, Tp): not padding
            at = (start + t).where(here, start)  # (b, T)
            keys_at = torch.cat([(prefix_start + tp).where(before, prefix_start), at], 1)  # (b, Tp + T)
            allowed = torch.cat([before[:, None].expand(-1, len(t), -1), (t <= t[:, None]).expand(len(at), -1, -1)], 2)[:, None]  # (b, 1, T, Tp + T)
            back[at[here]] = self.padded + torch.arange(at.numel()).view(at.shape)[here]
            self.padded += at.numel()
            self.pairs += at.numel() * keys_at.size(1)
            self.blocks.append((at.to(device), keys_at.to(device), MaskedAttention(allowed.to(device))))
        self.back = back.to(device)

    def __call__(self, layer, q, k, v):
        heads_first = lambda x, at: pick(x[0], at).transpose(1, 2)  # (b, heads, T, D)
        y = [attend(heads_first(q, at), heads_first(k, keys_at), heads_first(v, keys_at)).transpose(1, 2).flatten(0, 1)
             for at, keys_at, attend in self.blocks]  # (b * T, H, D) each
        return pick(torch.cat(y), self.back)[None]  # (1, N, H, D)
