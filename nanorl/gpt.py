"""The model: a pre-norm decoder with RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Parameter names are Hugging Face's own, so that a state dict is a Llama, Qwen2 or Qwen3 checkpoint
(nanorl/hf.py). The letters that are used everywhere in nanorl:

    P prompts      G samples per prompt   B = P * G rows   T time   L layers   C channels
    H query heads  K key/value heads      D head dim       V vocabulary
    N tokens that the loss is divided by  S sampled tokens of a micro-batch

Attention is an argument: `attend(layer, q, k, v) -> y`. Training passes causal attention, the
learner one that knows of shared prompts (attention.py), and the sampler functions that read and
write its caches (sampler.py, cache.py). So there is one forward pass, and no cache in the model.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanorl.attention import CausalAttention

# So many logits exist at a time. On a CPU as many as fit a buffer that the allocator keeps (below
# 32 MB). On a GPU so many that each product with the head's large matrix serves many rows.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


@dataclass
class GPTConfig:
    """A model's sizes and flags. Raises ValueError for sizes that do not fit together."""

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
    rope_scaling: tuple = None  # Llama 3.1's (see rope_table); None: no scaling
    norm_eps: float = 1e-6
    n_tokens: int = 0  # ids that the tokenizer knows, 0: all V. Rows beyond have no probability

    def __post_init__(self):
        self.n_tokens = self.n_tokens or self.vocab_size
        sizes = ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_inner")
        for name in (*sizes, "context"):
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
                f"the tokenizer has {self.n_tokens} ids and the model only {self.vocab_size} "
                "embedding rows"
            )

    @classmethod
    def from_depth(cls, depth, vocab_size, **overrides):
        """The from-scratch family: all sizes follow from the depth (docs/algorithm.md, 'Sizes')."""
        if depth < 1:
            raise ValueError(f"depth is {depth}: it must be at least 1")
        width = 64 * depth
        head_dim = 128 if depth >= 8 and depth % 2 == 0 else 64
        n_head = width // head_dim

        # Fewer key/value heads pay where the bytes of the cache bound a decode step.
        n_kv_head = n_head
        if depth >= 12 and n_head % 2 == 0:
            n_kv_head = n_head // 2

        values = dict(
            vocab_size=round_up(vocab_size, 64),
            n_tokens=vocab_size,
            n_layer=depth,
            n_embd=width,
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            n_inner=round_up(8 * width // 3, 64),
            qk_norm=True,
            tie_embeddings=depth < 12,
        )
        return cls(**{**values, **overrides})

    def n_params(self):
        """Exact numbers of parameters: (all, those that multiply every token).

        The latter are the layers' matrices and the head.
        """
        C, H, K, D = self.n_embd, self.n_head, self.n_kv_head, self.head_dim
        attention = C * H * D + 2 * C * K * D + H * D * C
        matrices = attention + 3 * C * self.n_inner
        vectors = 2 * C
        if self.qk_norm:
            vectors += 2 * D
        if self.qkv_bias:
            vectors += (H + 2 * K) * D

        table = self.vocab_size * C
        tables = table if self.tie_embeddings else 2 * table
        total = self.n_layer * (matrices + vectors) + C + tables
        return total, self.n_layer * matrices + table


def round_up(n, multiple):
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


# ---- the blocks ----------------------------------------------------------------------------------


class Linear(nn.Linear):
    """Keeps its weight in the master precision, and multiplies in the precision of its input.

    This is the one cast policy. The learner's fp32 weights become bf16 here, the sampler's bf16
    copy needs no cast, and both multiply the same numbers.
    """

    product = staticmethod(F.linear)  # lora.py puts in one with another gradient

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.product(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def rope_table(positions, head_dim, theta, scaling=None, dtype=torch.float32):
    """Cosines and sines of the angles at positions 0 .. positions-1, (positions, 1, D) each.

    RoFormer, eq. 34. The first half of the sines is negated, as `rotate` wants it.

    scaling: (factor, low, high, old context), for a context longer than the first training's
    (Llama 3.1). Frequencies that turn less than `low` times in the old context are divided by
    `factor`, those that turn more than `high` times stay, and between the two it goes over.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)  # (D/2)
    if scaling:
        factor, low, high, old_context = scaling
        turns = old_context * frequency / (2 * math.pi)  # (D/2)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = torch.arange(positions, dtype=dtype)[:, None, None] * frequency  # (positions, 1, D/2)
    cos = torch.cat([angle.cos(), angle.cos()], dim=-1)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)
    return cos, sin


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, heads, D) by its position's angle."""
    turned = x * cos
    halves_swapped = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(turned, halves_swapped, sin)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x):
        """x (B, T, C) -> (B, T, H * D) and twice (B, T, K * D). gpu.py has a faster one."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def queries_keys_values(self, x, cos, sin):
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, K, D): q and k normed and turned."""
        heads = (-1, self.head_dim)
        q, k, v = self.project(x)
        q = self.q_norm(q.unflatten(-1, heads))  # (B, T, H, D)
        k = self.k_norm(k.unflatten(-1, heads))  # (B, T, K, D)
        v = v.unflatten(-1, heads)  # (B, T, K, D)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=False)

    def project(self, x):
        """x (B, T, C) -> twice (B, T, n_inner). gpu.py has a faster one."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        """x (B, T, C) -> (B, T, C)."""
        q, k, v = self.before_attention(x, cos, sin)
        y = attend(self.self_attn.layer, q, k, v)  # (B, T, H, D)
        return self.after_attention(x, y)

    def before_attention(self, x, cos, sin):
        return self.self_attn.queries_keys_values(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, y):
        x = x + self.self_attn.o_proj(y.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


def compiled_block(block, x, cos, sin, attend):
    """block(x, cos, sin, attend), in which torch.compile has made what is around attention.

    Attention has its own kernels, and on packed rows its shapes change with the rows.
    """
    before, after = compiled_halves()
    q, k, v = before(block, x, cos, sin)
    y = attend(block.self_attn.layer, q, k, v)  # (B, T, H, D)
    return after(block, x, y)


@cache
def compiled_halves():
    """Block's two methods, each compiled once for all layers and all numbers of tokens.

    Again only for another precision, and for an input or weights without a gradient. On a GPU it
    is not measured.
    """
    before = torch.compile(Block.before_attention, dynamic=True)
    after = torch.compile(Block.after_attention, dynamic=True)
    return before, after


# ---- the model -----------------------------------------------------------------------------------


class GPT(nn.Module):
    """compute_dtype: precision of the activations. The weights keep theirs (fp32; fp64 in tests).

    recompute: keep only what enters each block, and run the block again in backward. That is a
    fourth pass, for a fraction of the memory.
    compiled: torch.compile makes the blocks of every forward pass but the sampler's, whose shapes
    are others and whose own graphs and copies are of the plain blocks.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.recompute, self.compiled = False, False
        self.model = nn.Module()  # only for Hugging Face's names
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.model.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        rope = config.head_dim, config.rope_theta, config.rope_scaling
        cos, sin = rope_table(config.context, *rope)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tie(self):
        """Make the head the embedding, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Scale by fan-in. What writes into the residual stream starts at zero, so that every block
        starts as the identity."""
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif p.dim() == 2:
                is_projection = "proj" in name
                std = p.size(1) ** -0.5 if is_projection else 0.02
                p.normal_(0, std, generator=generator)
        return self

    def hidden(self, ids, positions=None, attend=None):
        """ids (B, T) -> the last block's activations, normed, (B, T, C).

        positions (B, T), by default 0 .. T-1. attend: by default causal.
        Raises ValueError for more tokens than the context has.
        """
        attend = attend or CausalAttention()
        cos, sin = self.angles(ids.size(1), positions)
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, C)
        # The sampler is what runs in inference mode.
        run = Block.__call__
        if self.compiled and not torch.is_inference_mode_enabled():
            run = compiled_block
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                options = dict(use_reentrant=False, preserve_rng_state=False)
                x = checkpoint(run, block, x, cos, sin, attend, **options)
            else:
                x = run(block, x, cos, sin, attend)
        return self.model.norm(x)

    def angles(self, T, positions):
        """Cosines and sines for T tokens, (T, 1, D) each, or at positions (B, T), (B, T, 1, D)."""
        if positions is None:
            if T > self.config.context:
                raise ValueError(
                    f"{T} tokens do not fit the model's context of {self.config.context}"
                )
            positions = slice(T)
        cos, sin = self.cos[positions], self.sin[positions]
        return cos.to(self.compute_dtype), sin.to(self.compute_dtype)

    def head(self, h):
        """(..., C) -> logits (..., V), without the rows of the table that no token uses."""
        return logits_of(h, self.lm_head.weight[: self.config.n_tokens].to(h.dtype))

    def forward(self, ids, positions=None, attend=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(ids, positions, attend))

    def logprobs(self, h, ids, temperature=1.0, with_entropy=False, chunk_elements=0):
        """Activations h (n, C) and the ids (n,) that followed -> their log-probs (n,).

        The log-probs have a gradient. With them come the entropies of the distributions, (n,) in
        nats, without one; zeros unless with_entropy. The n x V logits never all exist (unless
        torch.compile keeps them): the head runs over as many rows at a time as have
        `chunk_elements` logits (0: LOGITS_AT_ONCE), and again in backward.
        """
        vocabulary = self.config.n_tokens
        elements = chunk_elements or LOGITS_AT_ONCE[h.device.type]
        rows_at_once = max(1, elements // vocabulary)
        weight = self.lm_head.weight[:vocabulary]  # (V, C)
        return TokenLogprobs.apply(h, weight, ids, temperature, with_entropy, rows_at_once)


# ---- log-probs -----------------------------------------------------------------------------------


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[ids], some rows at a time, with its gradient spelled out.

    For the logits z = h W^T the gradient is (one at ids - softmax(z / temperature)) / temperature.
    Autograd would keep the n x V softmax, or, recomputing it, fill and scatter into more tensors of
    that size (docs/log.md). token_logprobs below is the plain form, and the tests' reference.
    """

    @staticmethod
    def forward(ctx, h, weight, ids, temperature, with_entropy, rows_at_once):
        n, dtype = len(h), torch.promote_types(h.dtype, torch.float32)
        logprobs = h.new_zeros(n, dtype=dtype)
        log_totals = h.new_zeros(n, dtype=dtype)  # log of the sum of exponentials
        entropies = h.new_zeros(n, dtype=dtype)
        w = weight.to(h.dtype)  # (V, C)
        for start in range(0, n, rows_at_once):
            rows = slice(start, start + rows_at_once)
            z = scaled(logits_of(h[rows], w), temperature)  # (rows, V)
            log_total = z.logsumexp(-1)  # (rows,)
            log_totals[rows] = log_total
            logprobs[rows] = z.gather(-1, ids[rows, None])[:, 0] - log_total
            if with_entropy:
                # - sum p log p = log_total - sum p z
                p = (z - log_total[:, None]).exp_()  # (rows, V)
                entropies[rows] = log_total - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(h, weight, ids, log_totals)
        ctx.temperature, ctx.rows_at_once = temperature, rows_at_once
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        h, weight, ids, log_totals = ctx.saved_tensors
        w = weight.to(h.dtype)  # (V, C)
        grad = grad / ctx.temperature  # (n,)
        grad_h = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(h), ctx.rows_at_once):
            rows = slice(start, start + ctx.rows_at_once)
            z = scaled(logits_of(h[rows], w), ctx.temperature)  # (rows, V)

            # grad * (one at ids - softmax), in the place of the logits.
            some_grad = grad[rows, None]  # (rows, 1)
            grad_z = (z - log_totals[rows, None]).exp_().mul_(-some_grad)  # (rows, V)
            grad_z.scatter_add_(1, ids[rows, None], some_grad)
            grad_z = grad_z.to(h.dtype)

            grad_h[rows] = grad_z @ w
            if grad_weight is not None:
                grad_weight += grad_z.T @ h[rows]
        return grad_h, grad_weight, None, None, None, None


def logits_of(h, weight):
    """h (..., C), the head's weight (V, C) -> (..., V).

    A GPU sums products of bf16 in fp32, and here they stay so. Elsewhere logits are as wide as h.
    """
    if h.device.type == "cuda" and h.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32)
        return logits.unflatten(0, h.shape[:-1])
    return F.linear(h, weight)


def scaled(logits, temperature):
    """Logits / temperature, in fp32 or better: what sampling and log-probs both start from."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    return z if temperature == 1 else z / temperature


def all_logprobs(logits, temperature=1.0):
    """log softmax(logits / temperature), in fp32 or better: (..., V) -> (..., V).

    The plain form. GPT.logprobs and sampling.sample give the same numbers without all of (..., V),
    and are tested against it.
    """
    return scaled(logits, temperature).log_softmax(-1)


def token_logprobs(logits, ids, temperature=1.0):
    """The log-probs of the tokens ids (...) under logits (..., V) -> (...)."""
    return all_logprobs(logits, temperature).gather(-1, ids[..., None]).squeeze(-1)
