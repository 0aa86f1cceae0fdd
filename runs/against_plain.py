"""A plain GPT on the text of a base run: how much better is nanorl's model at the same tokens?

    python train_base.py --run_name=text --depth=3 --vocab_size=4096 --data='text/*.txt' ...
    python runs/against_plain.py --run=out/text/base

The plain model is nanoGPT's (github.com/karpathy/nanoGPT): LayerNorm, GELU, learned positions, tied
embeddings, no biases, GPT-2's initial weights. It is trained as there: AdamW, linear warm-up,
cosine to a tenth. It has the depth and the width of the run's model, and so about as many
parameters. It gets the run's token files: the same windows in the same order, as many at a time, or
fewer (--batch_tokens), which makes more and smaller steps of the same tokens.

Its rate is the best of --rates, each tried in a short run with its own whole schedule, and judged
by the very validation windows of the comparison. A line for each validation of the base run, and a
last one in JSON.
"""

import json
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl.data.tokens import Windows
from nanorl.gpt import GPTConfig
from nanorl.optim import lr_scale
from nanorl.runtime import dist
from nanorl.runtime.config import configure
from nanorl.runtime.log import to_json

run = "out/d4/base"  # a finished run of train_base.py
rates = "2e-3,4e-3,8e-3"  # of the plain model's AdamW, to choose from; one alone is taken
trial_steps = 160  # of the base run's steps: the length of the run that tries a rate
batch_tokens = 0  # tokens of the plain model's step; 0: as many as in the base run
warmup = 0.05  # share of the steps in which the rate rises
least = 0.1  # of the rate, where the cosine ends
weight_decay = 0.1  # of matrices and embeddings
max_grad_norm = 1.0
rows_at_once = 8  # rows of one forward


def main():
    configure(globals())
    base = BaseRun(run)
    ours = base.validations()
    print(f"nanorl  {base.n_params:,} parameters, {base.steps:,} steps, {run}", flush=True)

    # The rate.
    tried = try_rates(base)
    rate = min(tried, key=tried.get)

    # The run.
    plain = train(base, float(rate), base.steps, list(ours))
    print(f"plain   {plain.n_params:,} parameters, rate {rate}")
    print("  step      tokens    plain   nanorl    less")
    for step, bits in plain.curve.items():
        less = 1 - ours[step] / bits
        tokens = step * base.batch_tokens
        print(f"{step:>6} {tokens:>11,} {bits:>8.4f} {ours[step]:>8.4f} {less:>7.2%}")

    # The figures.
    last = base.steps
    found = dict(
        tokens=last * base.batch_tokens,
        params=dict(plain=plain.n_params, nanorl=base.n_params),
        tried=tried,
        plain_batch_tokens=batch_tokens or base.batch_tokens,
    )
    found["bits_per_byte"] = dict(plain=plain.curve[last], nanorl=ours[last])
    found["less"] = 1 - ours[last] / plain.curve[last]
    found["seconds"] = dict(plain=plain.seconds, nanorl=base.seconds())
    found["cpu_seconds"] = dict(plain=plain.cpu_seconds)
    found["flops"] = dict(plain=plain.flops, nanorl=base.flops())
    print(to_json(found))


def try_rates(base):
    """{rate: bits per byte after a short run}. One rate alone needs no run: None."""
    if "," not in rates:
        return {rates: None}
    tried = {}
    for rate in rates.split(","):
        trial = train(base, float(rate), trial_steps, [trial_steps])
        tried[rate] = trial.curve[trial_steps]
        print(f"plain   rate {rate}: {tried[rate]:.4f} bits/byte", flush=True)
    return tried


# ---- the base run --------------------------------------------------------------------------------


class BaseRun:
    """A run of train_base.py: its constants, its data and what it measured.

    Raises ValueError where there is no such run, and where it has not ended.
    """

    def __init__(self, directory):
        if not os.path.exists(os.path.join(directory, "tokens", "tokens.json")):
            raise ValueError(
                f"--run={directory}: not a run of train_base.py, such as out/d4/base: name one"
            )
        with open(os.path.join(directory, "run.json"), encoding="utf-8") as f:
            card = json.load(f)
        with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
            self.rows = [json.loads(line) for line in f]
        self.directory, self.settings = directory, card["settings"]
        self.n_params, self.steps = card["params"], card["steps"]
        self.dtype = getattr(torch, card["dtype"].removeprefix("torch."))
        if self.rows[-1]["step"] != self.steps:
            raise ValueError(
                f"--run={directory}: it is at step {self.rows[-1]['step']} of {self.steps}: "
                "let train_base.py end first"
            )
        self.seq_len = self.settings["seq_len"]
        self.batch_tokens = self.settings["batch_tokens"]
        self.tokens = os.path.join(directory, "tokens")

    def config(self):
        """The sizes of its model."""
        path = os.path.join(self.directory, f"step_{self.steps:06d}", "config.json")
        with open(path, encoding="utf-8") as f:
            vocabulary = json.load(f)["vocab_size"]
        return GPTConfig.from_depth(self.settings["depth"], vocabulary)

    def train_windows(self, batch_tokens):
        """Its windows in their order, so many tokens at a time."""
        rows = batch_tokens // self.seq_len
        return Windows(self.tokens, "train", self.seq_len, rows, self.settings["seed"])

    def validation_windows(self):
        """One batch: all the windows that it validates with."""
        most = self.settings["eval_tokens"] // self.seq_len
        n = Windows(self.tokens, "val", self.seq_len, 1).n
        return Windows(self.tokens, "val", self.seq_len, max(1, min(n, most)))

    def validations(self):
        """{step: bits per byte}."""
        name = "val/bits_per_byte"
        return {row["step"]: row[name] for row in self.rows if name in row}

    def seconds(self):
        return sum(row["time/step"] for row in self.rows)

    def flops(self):
        """Needed for training: forward and backward, of attention the pairs that see each other."""
        return self.rows[-1]["flops_causal_total"]


# ---- the plain run -------------------------------------------------------------------------------


class PlainRun:
    """What a run of the plain model gave. curve: {step of the base run: bits per byte}."""

    def __init__(self, model):
        self.n_params = sum(p.numel() for p in model.parameters())
        self.curve = {}
        self.flops = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0


def train(base, rate, base_steps, validate_at):
    """Train a new plain model on the data of so many steps of the base run -> PlainRun.

    validate_at: after which of these steps.
    """
    torch.manual_seed(base.settings["seed"])
    config = base.config()
    model = PlainGPT(config.vocab_size, base.seq_len, config.n_layer, config.n_head, config.n_embd)
    optimizer = adamw(model, rate)
    a_step = batch_tokens or base.batch_tokens  # tokens
    if base.batch_tokens % a_step or a_step % base.seq_len:
        raise ValueError(
            f"--batch_tokens={a_step}: it must divide the base run's {base.batch_tokens}, and be "
            f"a multiple of the {base.seq_len} of a row"
        )
    train_data, val_data = base.train_windows(a_step), base.validation_windows()
    parts = base.batch_tokens // a_step  # steps for one of the base run
    steps = base_steps * parts
    done = PlainRun(model)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    for step in range(steps):
        # A step's mean loss, some rows at a time.
        inputs, targets = train_data.next()  # (rows, T) each
        for some_inputs, some_targets in micro_batches(inputs, targets):
            loss = loss_of(model, some_inputs, some_targets, base.dtype) / a_step
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_scale(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        done.flops += model.flops(a_step)
        base_step, rest = divmod(step + 1, parts)
        if base_step in validate_at and not rest:
            bits = bits_per_byte(model, val_data, base.dtype)
            done.curve[base_step] = bits
            print(f"plain   {step + 1}/{steps}  rate {rate}: val {bits:.4f}", flush=True)
    done.seconds = time.perf_counter() - begun
    done.cpu_seconds = time.process_time() - cpu_begun
    return done


def rate_scale(step, steps):
    """Factor on the rate: up from 0, then by half a cosine down to `least`."""
    up = lr_scale(step, steps, warmup * steps)
    past = max(0.0, step / steps - warmup) / (1 - warmup)
    return up * (least + (1 - least) * (1 + math.cos(math.pi * past)) / 2)


def adamw(model, rate):
    """What has two dimensions decays, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def micro_batches(inputs, targets):
    return zip(inputs.split(rows_at_once), targets.split(rows_at_once))


def loss_of(model, inputs, targets, dtype):
    """The sum of the tokens' losses, with the products in `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


@torch.no_grad()
def bits_per_byte(model, windows, dtype):
    windows.cursor = 0
    inputs, targets = windows.next()
    nats = sum(loss_of(model, *some, dtype).double() for some in micro_batches(inputs, targets))
    return float(nats) / targets.numel() / math.log(2) / windows.bytes_per_token


# ---- the plain model -----------------------------------------------------------------------------


class PlainGPT(nn.Module):
    def __init__(self, vocabulary, context, layers, heads, width):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.init_weights(layers)

    @torch.no_grad()
    def init_weights(self, layers):
        """GPT-2's: what is added to the residual stream, twice a layer, is scaled down."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_the_stream = name.endswith(("out.weight", "down.weight"))
                p.normal_(0, 0.02 / math.sqrt(2 * layers) if into_the_stream else 0.02)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        positions = torch.arange(ids.size(1))  # (T,)
        x = self.token(ids) + self.position(positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)

    def flops(self, tokens):
        """Needed to train on rows of the whole context: forward, and twice that for backward."""
        context, width = self.position.weight.shape
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        head = self.token.weight.numel()
        pairs = tokens * (context + 1) // 2
        return 3 * (2 * (matrices + head) * tokens + 4 * len(self.blocks) * width * pairs)


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.out(self.attention(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attention(self, x):
        """Causal self-attention, (B, T, C) -> (B, T, C)."""
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, T, C) each
        q, k, v = self.split(q), self.split(k), self.split(v)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(x.shape)

    def split(self, x):
        """(B, T, C) -> (B, H, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, self.heads, -1).transpose(1, 2)


if __name__ == "__main__":
    dist.run(main)
