"""The model: a pre-norm decoder with RMSNorm, rotary embeddings, grouped-query attention and SwiGLU.

Parameter names are Hugging Face's own, so a state dict is a Llama / Qwen2 / Qwen3 checkpoint (nanorl/hf.py).
Letters used everywhere in nanorl:

    P prompts   G samples per prompt   B = P*G rows   T time   L layers   C channels
    H query heads   K key/value heads   D head dim   V vocabulary

Attention is an argument: `attend(layer, q, k, v) -> y`. Training passes causal attention, inside documents
where rows are packed, and the sampler passes functions that read and write its caches (nanorl/cache.py), so there
is one forward pass and no cache inside the model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanorl.attention import CausalAttention

# So many logits exist at a time. On a CPU as many as fit a buffer that the allocator keeps (below 32 MB); on a GPU enough that each product with the
# head's large matrix serves many rows.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


@dataclass
class GPTConfig:
    vocab_size: int  # V, rows of the embedding
    n_layer: int  # L
    n_embd: int  # C
    n_head: int  # H
    n_kv_head: int  # K
    head_dim: int  # D
    n_inner: int  # width of the SwiGLU
    context: int = 4096  # longest sequence in tokens
    qk_norm: bool = False  # RMSNorm on queries and keys (Qwen3)
    qkv_bias: bool = False  # bias on q, k, v (Qwen2)
    tie_embeddings: bool = False  # the head is the embedding
    rope_theta: float = 10000.0
    rope_scaling: tuple = (
        None  # Llama-3.1's: factor, low and high frequency factor, context before; None: no scaling
    )
    norm_eps: float = 1e-6
    n_tokens: int = (
        0  # ids the tokenizer knows; rows beyond are padding and get no probability. 0: all V
    )

    def __post_init__(self):
        self.n_tokens = self.n_tokens or self.vocab_size
        for name in (
            "vocab_size",
            "n_layer",
            "n_embd",
            "n_head",
            "n_kv_head",
            "head_dim",
            "n_inner",
            "context",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs of channels"
            )
        if self.n_tokens > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.n_tokens} ids and the model only {self.vocab_size} embedding rows"
            )

    @classmethod
    def from_depth(cls, depth, vocab_size, **overrides):
        """The from-scratch family: width 64*depth; the rest follows from it (docs/algorithm.md, 'Sizes')."""
        if depth < 1:
            raise ValueError(f"depth is {depth}: it must be at least 1")
        width = 64 * depth
        head_dim = 128 if depth >= 8 and depth % 2 == 0 else 64
        n_head = width // head_dim
        halve = (
            depth >= 12 and n_head % 2 == 0
        )  # GQA pays where the cache's bytes bound the decode step
        values = dict(
            vocab_size=-(-vocab_size // 64) * 64,
            n_tokens=vocab_size,
            n_layer=depth,
            n_embd=width,
            n_head=n_head,
            n_kv_head=n_head // 2 if halve else n_head,
            head_dim=head_dim,
            n_inner=-(-8 * width // 3 // 64) * 64,
            qk_norm=True,
            tie_embeddings=depth < 12,
        )
        return cls(**{**values, **overrides})

    def n_params(self):
        """Exact number of parameters, (all, those that multiply every token: the layers' matrices and the head)."""
        C, H, K, D, inner = self.n_embd, self.n_head, self.n_kv_head, self.head_dim, self.n_inner
        matrices = C * H * D + 2 * C * K * D + H * D * C + 3 * C * inner
        vectors = 2 * C + (2 * D if self.qk_norm else 0) + ((H + 2 * K) * D if self.qkv_bias else 0)
        embeddings = self.vocab_size * C * (1 if self.tie_embeddings else 2)
        return self.n_layer * (
            matrices + vectors
        ) + C + embeddings, self.n_layer * matrices + self.vocab_size * C


class Linear(nn.Linear):
    """Keeps its weight in the master precision and multiplies in the precision of its input. This is the one
    cast policy: the learner's fp32 weights become bf16 here, the sampler's bf16 copy needs no cast, and both
    multiply the same numbers."""

    product = staticmethod(F.linear)  # nanorl/lora.py puts in one with another gradient

    def forward(self, x):
        return self.product(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def rope_table(positions, head_dim, theta, scaling=None, dtype=torch.float32):
    """Cosines and sines of the angles at positions 0 .. positions-1, (positions, 1, D) each (RoFormer, eq. 34). The
    first half of the sines is negated, as `rotate` wants it. scaling: GPTConfig's, for a context longer than the first
    training's (Llama 3.1): frequencies that turn less than `low` times in the old context are divided by `factor`, those that
    turn more than `high` times stay, and between the two it goes over."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)  # (D/2)
    if scaling:
        factor, low, high, old_context = scaling
        turns = old_context * frequency / (2 * math.pi)  # (D/2)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = torch.arange(positions, dtype=dtype)[:, None, None] * frequency  # (positions, 1, D/2)
    return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, heads, D) by its position's angle."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        D = self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, D))), cos, sin)  # (B, T, H, D)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, D))), cos, sin)  # (B, T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, D))  # (B, T, K, D)
        return self.o_proj(attend(self.layer, q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_inner, bias=False)
        self.up_proj = Linear(c.n_embd, c.n_inner, bias=False)
        self.down_proj = Linear(c.n_inner, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.n_embd, c.norm_eps), Attention(c, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.n_embd, c.norm_eps), MLP(c)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """`compute_dtype` is the precision of the activations; the weights keep theirs (fp32, or fp64 in tests). `recompute`: keep only what enters
    each block and run the block again in backward: a fourth pass for a fraction of the memory."""

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype, self.recompute = config, torch.float32, False
        self.model = nn.Module()  # only for Hugging Face's names
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.model.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        cos, sin = rope_table(
            config.context, config.head_dim, config.rope_theta, config.rope_scaling
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tie(self):
        """Make the head the embedding, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Fan-in scaling; what writes into the residual stream starts at zero, so every block starts as identity."""
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0, 0.02 if "proj" not in name else p.size(1) ** -0.5, generator=generator)
        return self

    def hidden(self, ids, positions=None, attend=None):
        """ids (B, T) -> final normed activations (B, T, C). positions (B, T), default 0 .. T-1;
        attend, default causal."""
        attend = attend or CausalAttention()
        if positions is None:
            if ids.size(1) > self.config.context:
                raise ValueError(
                    f"{ids.size(1)} tokens do not fit the model's context of {self.config.context}"
                )
            cos, sin = self.cos[: ids.size(1)], self.sin[: ids.size(1)]  # (T, 1, D)
        else:
            cos, sin = self.cos[positions], self.sin[positions]  # (B, T, 1, D)
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, C)
        for block in self.model.layers:
            again = self.recompute and torch.is_grad_enabled()
            x = (
                checkpoint(
                    block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False
                )
                if again
                else block(x, cos, sin, attend)
            )
        return self.model.norm(x)

    def head(self, h):
        """(..., C) -> logits (..., n_tokens): rows of the table that no token uses are left out."""
        return F.linear(h, self.lm_head.weight[: self.config.n_tokens].to(h.dtype))

    def forward(self, ids, positions=None, attend=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(ids, positions, attend))

    def logprobs(self, h, ids, temperature=1.0, with_entropy=False, chunk_elements=0):
        """Activations h (N, C) and the ids (N,) that followed -> their log-probs (N,), with gradient, and, if asked for, the
        distributions' entropies (N,) in nats, without. The N x V logits never all exist (unless torch.compile keeps them): the head runs over as many rows at a
        time as have `chunk_elements` logits (0: LOGITS_AT_ONCE), and again in backward."""
        weight, at_once = (
            self.lm_head.weight[: self.config.n_tokens],
            chunk_elements or LOGITS_AT_ONCE[h.device.type],
        )
        return TokenLogprobs.apply(
            h, weight, ids, temperature, with_entropy, max(1, at_once // self.config.n_tokens)
        )


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[ids], with its gradient spelled out: of z = h W^T it is (one at ids - softmax(z / temperature)) / temperature.
    Autograd would keep the N x V softmax, or, recomputing it, fill and scatter into more tensors of that size (docs/log.md)."""

    @staticmethod
    def forward(ctx, h, weight, ids, temperature, with_entropy, rows):
        logprobs, lse, entropy = (
            h.new_zeros(len(h), dtype=torch.promote_types(h.dtype, torch.float32)) for _ in range(3)
        )  # (N,) each
        w = weight.to(h.dtype)  # (V, C)
        for i in range(0, len(h), rows):
            some = slice(i, i + rows)
            z = scaled(F.linear(h[some], w), temperature)  # (rows, V)
            lse[some] = z.logsumexp(-1)
            logprobs[some] = z.gather(-1, ids[some, None])[:, 0] - lse[some]
            if with_entropy:  # - sum p log p = lse - sum p z
                entropy[some] = lse[some] - torch.linalg.vecdot((z - lse[some, None]).exp_(), z)
        ctx.save_for_backward(h, weight, ids, lse)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        h, weight, ids, lse = ctx.saved_tensors
        w, grad = weight.to(h.dtype), grad / ctx.temperature
        grad_h = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), ctx.rows):
            some = slice(i, i + ctx.rows)
            z = scaled(F.linear(h[some], w), ctx.temperature)  # (rows, V)
            z = (
                (z - lse[some, None])
                .exp_()
                .mul_(-grad[some, None])
                .scatter_add_(1, ids[some, None], grad[some, None])
                .to(h.dtype)
            )
            grad_h[some] = z @ w
            if grad_weight is not None:
                grad_weight += z.T @ h[some]
        return grad_h, grad_weight, None, None, None, None


def scaled(logits, temperature):
    """Logits / temperature, in fp32 or better: what sampling and log-probs both start from."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    return z if temperature == 1 else z / temperature


def all_logprobs(logits, temperature=1.0):
    """The one definition of a log-prob: log softmax(logits / temperature), in fp32 or better. (..., V) -> (..., V)."""
    return scaled(logits, temperature).log_softmax(-1)


def token_logprobs(logits, ids, temperature=1.0):
    """The log-probs of the tokens ids (...) under logits (..., V) -> (...)."""
    return all_logprobs(logits, temperature).gather(-1, ids[..., None]).squeeze(-1)
