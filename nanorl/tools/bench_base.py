"""The speed of pretraining: `python -m nanorl.tools.bench base`.

train_base.py's step, against a plain eager fp32 loop of about as many parameters. The letters are
gpt.py's.
"""

import time
from functools import partial
from statistics import median_high

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorl.gpt import GPT, GPTConfig, round_up
from nanorl.learner import text_loss
from nanorl.optim import make_optimizers, update
from nanorl.runtime import dist

HEAD_DIM = 64


def measure_base(options):
    """Tokens/s of train_base.py's step (eager, compiled, and eager in fp32) and of a plain loop.

    options: bench.py's constants. Each form has `options.seconds` in each of the rounds. Returns
    the medians, of the rates and of their ratios in the same round.
    """
    torch.manual_seed(0)
    device = dist.setup(options.device)
    shape = (options.batch_tokens // options.seq_len, options.seq_len + 1)
    ids = torch.randint(0, options.vocab_size, shape).to(device)  # (B, T + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:]  # (B, T) each

    config = config_of(options)
    heads = config.n_head
    plain = PlainGPT(options.depth, options.width, heads, options.vocab_size, options.seq_len)
    _, best = dist.dtypes(options.dtype, device)
    ours = partial(OurStep, config, options.batch_tokens, device)
    steps = {
        "nanorl": ours(best),
        "nanorl_compiled": ours(best, compiled=True),
        "nanorl_fp32": ours(torch.float32),
        "plain": PlainStep(plain.to(device)),
    }
    for step in steps.values():
        step.take(inputs, targets)

    rounds = []
    for _ in range(options.repeats):
        rates = {}
        for name, step in steps.items():
            rates[name] = tokens_per_second(step, inputs, targets, options)
        rounds.append(rates)

    tokens = {name: round(median_high([rates[name] for rates in rounds])) for name in steps}
    return dict(
        device=str(device),
        dtype=str(best),
        params=config.n_params()[0],
        plain_params=sum(p.numel() for p in plain.parameters()),
        tok_per_s=tokens,
        over_plain=ratios(rounds, "plain"),
        over_fp32=ratios(rounds, "nanorl_fp32"),
    )


def tokens_per_second(step, inputs, targets, options):
    """How fast steps are taken, over at least `options.seconds`."""
    steps = 0
    dist.synchronize(inputs.device)
    begun = time.perf_counter()
    while time.perf_counter() - begun < options.seconds:
        step.take(inputs, targets)
        dist.synchronize(inputs.device)  # a GPU only takes orders; the clock is for what it does
        steps += 1
    return steps * options.batch_tokens / (time.perf_counter() - begun)


def ratios(rounds, to):
    """The median, over the rounds, of each form's rate in terms of that of the form `to`."""
    medians = {}
    for name in rounds[0]:
        ratio = median_high([rates[name] / rates[to] for rates in rounds])
        medians[name] = round(ratio, 2)
    return medians


# ---- train_base.py's step ------------------------------------------------------------------------


def config_of(options):
    """The shape of nanorl's model: one of the from-scratch family, at any depth and width."""
    heads = options.width // HEAD_DIM
    return GPTConfig(
        vocab_size=options.vocab_size,
        n_layer=options.depth,
        n_embd=options.width,
        n_head=heads,
        n_kv_head=heads,
        head_dim=HEAD_DIM,
        n_inner=round_up(8 * options.width // 3, 64),
        qk_norm=True,
        tie_embeddings=True,
    )


class OurStep:
    """A model of its own, and train_base.py's step of it, with AdamW."""

    def __init__(self, config, batch_tokens, device, compute_dtype, compiled=False):
        self.model = GPT(config).init_weights().to(device)
        self.model.compute_dtype = compute_dtype
        self.batch_tokens = batch_tokens
        self.params = list(self.model.parameters())
        self.optimizers = make_optimizers(self.model, 0.02, 0.004, muon=False)
        self.loss_of = torch.compile(text_loss) if compiled else text_loss

    def take(self, inputs, targets):
        loss = self.loss_of(self.model, inputs, targets) / self.batch_tokens
        loss.backward()
        update(self.optimizers, self.params, 1.0, 1.0)


# ---- the plain loop ------------------------------------------------------------------------------


class PlainStep:
    """A step of the plain loop: the same loss, gradient clipping, AdamW."""

    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def take(self, inputs, targets):
        logits = self.model(inputs)  # (B, T, V)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainGPT(nn.Module):
    """What one would write first: LayerNorm, GELU, learned positions, fused q/k/v, eager fp32."""

    def __init__(self, layers, width, heads, vocab, context):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        positions = torch.arange(ids.size(1), device=ids.device)  # (T,)
        x = self.token(ids) + self.position(positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.out(self.attention(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attention(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, T, C) each
        q, k, v = self.split(q), self.split(k), self.split(v)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(x.shape)

    def split(self, x):
        """(B, T, C) -> (B, H, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, self.heads, -1).transpose(1, 2)
