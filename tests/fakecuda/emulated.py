"""Operators that a GPU has and that have no kernel on a CPU, computed there as CUDA gives them.

The memory-efficient attention (Rabe and Staats 2021), forward and backward: with its results'
shapes, types and strides, and with what it refuses. And RMSNorm as one kernel, which is taken in
inference mode; elsewhere PyTorch takes it apart before it comes here.

FlexAttention is no operator: what PyTorch compiles for it, the simulation computes by ops.
"""

import torch

aten = torch.ops.aten
TYPES = (torch.float32, torch.float16, torch.bfloat16)
LSE_ROWS = 32  # the log-sum-exps have a multiple of so many rows
ALIGNMENT = 16  # bytes, of the rows of a bias


def efficient_attention(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
):
    """query (B, H, T, D), key and value (B, H, T_keys, D) -> output, log-sum-exp, seed, offset.

    output: like query, and as on CUDA its memory has the time before the heads.
    log-sum-exp: (B, H, T rounded up to LSE_ROWS), fp32; the rows beyond T are infinite. Without
    compute_log_sumexp it is (B, H, 0).
    """
    refuse(query, key, value, attn_bias, dropout_p)
    scores = scores_of(query, key, attn_bias, is_causal, scale)  # (B, H, T, T_keys)
    exact = scores.softmax(-1) @ value.float()  # (B, H, T, D)
    output = exact.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)

    B, H, T, _ = query.shape
    rows = -(-T // LSE_ROWS) * LSE_ROWS if compute_log_sumexp else 0
    lse = torch.full((B, H, rows), float("inf"))
    if compute_log_sumexp:
        lse[..., :T] = scores.logsumexp(-1)
    seed, offset = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    return output, lse, seed, offset


def efficient_attention_backward(grad, query, key, value, attn_bias, out, lse, *more, scale=None):
    """-> the gradients of query, key, value and attn_bias, None where none is wanted."""
    _seed, _offset, _dropout, wanted, *is_causal = more
    T = query.size(2)
    scores = scores_of(query, key, attn_bias, any(is_causal), scale)
    p = (scores - lse[..., :T, None]).exp()  # (B, H, T, T_keys)
    grad = grad.float()  # (B, H, T, D)
    grad_p = grad @ value.float().transpose(-1, -2)
    own = (grad * out.float()).sum(-1, keepdim=True)
    grad_scores = p * (grad_p - own)
    factor = query.size(-1) ** -0.5 if scale is None else scale
    found = [
        factor * grad_scores @ key.float(),
        factor * grad_scores.transpose(-1, -2) @ query.float(),
        p.transpose(-1, -2) @ grad,
        grad_scores,
    ]
    return tuple(g.to(query.dtype) if is_wanted else None for g, is_wanted in zip(found, wanted))


def refuse(query, key, value, bias, dropout):
    """Raise RuntimeError for what the CUDA kernel cannot do."""
    if dropout:
        raise RuntimeError("the emulated attention has no dropout")
    if query.dtype not in TYPES:
        raise RuntimeError(f"{query.dtype}: Only fp32, half & bf16 supported at the moment")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("query, key and value of different types")
    if not query.size(1) == key.size(1) == value.size(1):
        raise RuntimeError(
            f"{query.size(1)} heads of queries and {key.size(1)} of keys: the memory-efficient "
            "attention has no grouped queries"
        )
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        raise RuntimeError("query, key or value: the last dimension is not contiguous")
    if bias is None:
        return
    shape = (*query.shape[:3], key.size(2))
    if bias.dtype != query.dtype or tuple(bias.shape) != shape:
        raise RuntimeError(f"a bias {tuple(bias.shape)} of {bias.dtype} for scores {shape}")
    whole = ALIGNMENT // bias.element_size()
    for size, stride in zip(shape[:3], bias.stride()):
        if size > 1 and stride % whole:
            raise RuntimeError(f"attn_bias is not correctly aligned: strides {bias.stride()}")


def scores_of(query, key, bias, is_causal, scale):
    """What the softmax is over, (B, H, T, T_keys), in fp32."""
    factor = query.size(-1) ** -0.5 if scale is None else scale
    scores = factor * query.float() @ key.float().transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def flex_attention(query, key, value, *, block_mask, enable_gqa):
    """As its compiled kernel goes: by the lists of squares, and by the mask in partial ones alone.

    query (1, H, T, D), key and value (1, K, T, D) -> (1, H, T, D). All the memory is on the GPU.
    """
    (_, H, T, D), K = query.shape, key.size(1)
    assert H % K == 0 and (enable_gqa or H == K), "heads that do not share keys"
    assert block_mask.seq_lengths == (T, T) and T % block_mask.BLOCK_SIZE[0] == 0
    slots = torch.arange(T, device=query.device)
    partial = in_listed_squares(block_mask.kv_num_blocks, block_mask.kv_indices, T)
    full = in_listed_squares(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, T)
    allowed = full | (partial & block_mask.mask_mod(0, 0, slots[:, None], slots[None]))

    # Where a query sees nothing, the kernel gives zeros.
    sees_nothing = ~allowed.any(1, keepdim=True)  # (T, 1)
    key, value = key.repeat_interleave(H // K, 1), value.repeat_interleave(H // K, 1)
    scores = query @ key.transpose(-1, -2) * D**-0.5
    scores = scores.masked_fill(~(allowed | sees_nothing), float("-inf"))
    return (scores.softmax(-1) @ value).masked_fill(sees_nothing, 0)


def in_listed_squares(count, where, T):
    """count (1, 1, blocks) and where (1, 1, blocks, blocks) -> (T, T), bool."""
    blocks = where.size(-1)
    is_listed = torch.arange(blocks, device=where.device) < count[0, 0, :, None]
    squares = torch.zeros_like(is_listed).scatter(1, where[0, 0].long(), is_listed)
    size = T // blocks
    return squares.repeat_interleave(size, 0).repeat_interleave(size, 1)


def rms_norm(x, shape, weight, eps):
    """-> (x / rms(x) * weight over the last dimensions, of that shape; 1 / rms(x))."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    last = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    reciprocal = (wide.square().mean(last, keepdim=True) + eps).rsqrt()
    y = wide * reciprocal
    if weight is not None:
        y = y * weight
    return y.to(x.dtype), reciprocal


def product(a, b, out_dtype):
    """torch.mm(out_dtype=): sums and result in a wider type than the factors have."""
    return a.to(out_dtype) @ b.to(out_dtype)


EMULATED = {
    aten.mm.dtype: product,
    aten._fused_rms_norm.default: rms_norm,
    aten._scaled_dot_product_efficient_attention.default: efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_attention_backward,
}
