"""The model: a pre-norm decoder with RMSNorm, rotary embeddings, grouped-query attention and SwiGLU.

Parameter names are Hugging Face's own, so a state dict is a Llama / Qwen2 / Qwen3 checkpoint (nanorl/hf.py).
Letters used everywhere in nanorl:

    P prompts   G samples per prompt   B = P*G rows   T time   L layers   C channels
    H query heads   K key/value heads   D head dim   V vocabulary

Attention is an argument: `attend(layer, q, k, v) -> y`. Training passes causal attention, inside documents
where rows are packed, and the sampler passes functions that read and write its caches (nanorl/engine.py), so there
is one forward pass and no cache inside the model.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    norm_eps: float = 1e-6
    n_tokens: int = 0  # ids the tokenizer knows; rows beyond are padding and get no probability. 0: all V

    def __post_init__(self):
        self.n_tokens = self.n_tokens or self.vocab_size
        for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_inner", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs of channels")
        if self.n_tokens > self.vocab_size:
            raise ValueError(f"the tokenizer has {self.n_tokens} ids and the model only {self.vocab_size} embedding rows")

    @classmethod
    def from_depth(cls, depth, vocab_size, **overrides):
        """The from-scratch family: width 64*depth; the rest follows from it (docs/algorithm.md, 'Sizes')."""
        if depth < 1:
            raise ValueError(f"depth is {depth}: it must be at least 1")
        width = 64 * depth
        head_dim = 128 if depth >= 8 and depth % 2 == 0 else 64
        n_head = width // head_dim
        halve = depth >= 12 and n_head % 2 == 0  # GQA pays where the cache's bytes bound the decode step
        values = dict(
            vocab_size=-(-vocab_size // 64) * 64, n_tokens=vocab_size, n_layer=depth, n_embd=width, n_head=n_head,
            n_kv_head=n_head // 2 if halve else n_head, head_dim=head_dim, n_inner=-(-8 * width // 3 // 64) * 64,
            qk_norm=True, tie_embeddings=depth < 12)
        return cls(**{**values, **overrides})

    def n_params(self):
        """Exact number of parameters, (all, those that multiply every token: the layers' matrices and the head)."""
        C, H, K, D, inner = self.n_embd, self.n_head, self.n_kv_head, self.head_dim, self.n_inner
        matrices = C * H * D + 2 * C * K * D + H * D * C + 3 * C * inner
        vectors = 2 * C + (2 * D if self.qk_norm else 0) + ((H + 2 * K) * D if self.qkv_bias else 0)
        embeddings = self.vocab_size * C * (1 if self.tie_embeddings else 2)
        return self.n_layer * (matrices + vectors) + C + embeddings, self.n_layer * matrices + self.vocab_size * C

    def flops(self, tokens, attended, head_tokens):
        """Forward FLOPs (a multiply-add is two) of `tokens` through the layers, `attended` (query, key) pairs per
        layer, and `head_tokens` through the head. A backward pass costs twice this."""
        layers = self.n_params()[1] - self.vocab_size * self.n_embd
        return (2 * layers * tokens + 4 * self.n_layer * self.n_head * self.head_dim * attended
                + 2 * self.n_tokens * self.n_embd * head_tokens)


class Linear(nn.Linear):
    """Keeps its weight in the master precision and multiplies in the precision of its input. This is the one
    cast policy: the learner's fp32 weights become bf16 here, the sampler's bf16 copy needs no cast, and both
    multiply the same numbers."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def rope_table(positions, head_dim, theta, dtype=torch.float32):
    """Cosines and sines of the angles at positions 0 .. positions-1, (positions, 1, D) each (RoFormer, eq. 34). The
    first half of the sines is negated, as `rotate` wants it."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)  # (D/2)
    angle = torch.arange(positions, dtype=dtype)[:, None, None] * frequency  # (positions, 1, D/2)
    return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, heads, D) by its position's angle."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class MaskedAttention:
    """Attention where `allowed` (B, 1, T, S), bool, lets query t see key s; None: causal, T = S. One mask serves all layers."""

    def __init__(self, allowed=None):
        self.allowed, self.bias = allowed, None

    def __call__(self, q, k, v):
        """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.size(2) <= 512:
            return self._by_matrix_products(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed, is_causal=self.allowed is None,
                                              enable_gqa=q.size(1) != k.size(1))

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
    write it this is the one whose backward pass is fast on a CPU and has a fixed order of summation."""
    return F.embedding(at, x.flatten(1)).unflatten(-1, x.shape[1:])


class SharedPrefixAttention:
    """Causal attention over rows packed into one, q (1, N, H, D), k and v (1, N, K, D), in which rows may share their beginning: the keys and values
    of a prompt are computed once for all its samples, and gradients flow back into them from each.

    rows: (start, length, prefix start, prefix length) of each, a prefix being earlier places of the packed row that it goes on from (length 0: none).
    Rows of like length make a block, padded to its longest; `padded` counts the places, padding and all."""

    def __init__(self, rows, device):
        rows = sorted((row for row in rows if row[1]), key=lambda row: (row[3] > 0, row[1]), reverse=True)
        blocks = []
        for row in rows:
            if not blocks or (row[3] > 0) != (blocks[-1][0][3] > 0) or row[1] < 0.8 * blocks[-1][0][1]:
                blocks.append([])
            blocks[-1].append(row)
        n, self.padded, self.blocks = sum(row[1] for row in rows), 0, []
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
            self.blocks.append((at.to(device), keys_at.to(device), MaskedAttention(allowed.to(device))))
        self.back = back.to(device)

    def __call__(self, layer, q, k, v):
        heads_first = lambda x, at: pick(x[0], at).transpose(1, 2)  # (b, heads, T, D)
        y = [attend(heads_first(q, at), heads_first(k, keys_at), heads_first(v, keys_at)).transpose(1, 2).flatten(0, 1)
             for at, keys_at, attend in self.blocks]  # (b * T, H, D) each
        return pick(torch.cat(y), self.back)[None]  # (1, N, H, D)


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
    """`compute_dtype` is the precision of the activations; the weights keep theirs (fp32, or fp64 in tests)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        self.model = nn.Module()  # only for Hugging Face's names
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.model.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        cos, sin = rope_table(config.context, config.head_dim, config.rope_theta)
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
                raise ValueError(f"{ids.size(1)} tokens do not fit the model's context of {self.config.context}")
            cos, sin = self.cos[:ids.size(1)], self.sin[:ids.size(1)]  # (T, 1, D)
        else:
            cos, sin = self.cos[positions], self.sin[positions]  # (B, T, 1, D)
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        x = self.model.embed_tokens(ids).to(self.compute_dtype)  # (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def head(self, h):
        """(..., C) -> logits (..., n_tokens): rows of the table that no token uses are left out."""
        return F.linear(h, self.lm_head.weight[:self.config.n_tokens].to(h.dtype))

    def forward(self, ids, positions=None, attend=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(ids, positions, attend))

    def logprobs(self, h, ids, temperature=1.0, with_entropy=False, chunk_elements=2 ** 24):
        """Activations h (N, C) and the ids (N,) that followed -> their log-probs (N,) and, if asked for, the
        distributions' entropies (N,) in nats, through which no gradient flows.

        The N x V logits never all exist: the head runs in chunks, and again in backward when there are several."""
        def of_chunk(h, ids):
            full = all_logprobs(self.head(h), temperature)  # (n, V)
            entropy = ids.new_zeros(0, dtype=torch.float32)
            if with_entropy:
                with torch.no_grad():
                    entropy = -(full.exp() * full).sum(-1)  # (n,)
            return full.gather(-1, ids[:, None]).squeeze(-1), entropy
        size = max(1, chunk_elements // self.config.n_tokens)
        if len(ids) <= size:
            return of_chunk(h, ids)
        parts = [checkpoint(of_chunk, hc, ic, use_reentrant=False) for hc, ic in zip(h.split(size), ids.split(size))]
        return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])


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
