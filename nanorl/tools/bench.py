"""Speed against the machine's own rates, in one run: `python -m nanorl.tools.bench base`.

    base     train_base.py's step against a plain eager fp32 loop of as many parameters
    rollout  all samples of all prompts decoded together against one prompt at a time, 8 rows wide
    flips    tokens that differ when the same samples are drawn in other company: --model=<a trained one> --task=
    rates    the machine's fp32 and bf16 matrix rates and its copy bandwidth

Ends with one JSON line. Compare ratios: these are of the same minute, absolute figures are of the machine's mood."""
import json
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.optim import make_optimizers, update
from nanorl.runtime import dist
from nanorl.runtime.config import configure

depth = 4  # layers
width = 128  # channels, for `base`; `rollout` takes 64 x depth
vocab_size = 512  # tokens
prompts = 16  # rollout: prompts
samples = 16  # rollout: samples of each
prompt_tokens = 96  # rollout: tokens of a prompt
new_tokens = 128  # rollout: tokens of a completion, none stops early
seq_len = 128  # tokens of a row
batch_tokens = 2048  # tokens of a step
seconds = 5.0  # measured per repetition
repeats = 5  # repetitions, taken in turn
dtype = "auto"  # activations of nanorl's step: auto, fp32, bf16
model = ""  # flips: a model directory, or a stage's
task = "sum3"  # flips: its task


def best(work, tries):
    """Shortest of some runs of work(), in seconds, after one to warm up."""
    times = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def matrix_rate(kind, device="cpu", n=2048, tries=5):
    """FLOP/s of n x n products in a precision."""
    a = torch.randn(n, n, device=device).to(kind)

    def work():
        a @ a
        dist.synchronize(a.device)
    return 2 * n ** 3 / best(work, tries)


def copy_rate(device="cpu", n=2 ** 26, tries=5):
    """Bytes read and written a second by copying n fp32 numbers."""
    source, target = torch.zeros(n, device=device), torch.zeros(n, device=device)

    def work():
        target.copy_(source)
        dist.synchronize(source.device)
    return 8 * n / best(work, tries)


def device_rates(device, kind):
    """A quick look at this device now: its matrix rate in a precision, FLOP/s, and its copy rate, bytes/s."""
    large = device.type == "cuda"
    return matrix_rate(kind, device, 8192 if large else 1024, tries=3), copy_rate(device, 2 ** 28 if large else 2 ** 23, tries=3)


def rates():
    """GFLOP/s of fp32 and bf16 2048^3 products and GB/s of copying 256 MB, best of 5."""
    return dict(fp32_gflops=round(matrix_rate(torch.float32) / 1e9), bf16_gflops=round(matrix_rate(torch.bfloat16) / 1e9), copy_gb_s=round(copy_rate() / 1e9, 1))


class PlainGPT(nn.Module):
    """What one would write first: LayerNorm, GELU, learned positions, fused q/k/v, eager fp32."""

    def __init__(self, layers, width, heads, vocab, context):
        super().__init__()
        self.token, self.position, self.heads = nn.Embedding(vocab, width), nn.Embedding(context, width), heads
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            n1=nn.LayerNorm(width), qkv=nn.Linear(width, 3 * width), out=nn.Linear(width, width),
            n2=nn.LayerNorm(width), up=nn.Linear(width, 4 * width), down=nn.Linear(4 * width, width))) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        B, T = ids.shape
        x = self.token(ids) + self.position(torch.arange(T))
        for b in self.blocks:
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in b["qkv"](b["n1"](x)).chunk(3, -1))
            x = x + b["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1))
            x = x + b["down"](F.gelu(b["up"](b["n2"](x))))
        return F.linear(self.norm(x), self.token.weight)


def base():
    """Tokens/s of train_base.py's step (eager, compiled, and eager in fp32) and of a plain loop, in turn."""
    torch.manual_seed(0)
    head_dim = 64
    config = GPTConfig(vocab_size, depth, width, width // head_dim, width // head_dim, head_dim, -(-8 * width // 3 // 64) * 64,
                       qk_norm=True, tie_embeddings=True)
    ids = torch.randint(0, vocab_size, (batch_tokens // seq_len, seq_len + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def nanorl_step(compute_dtype, compiled):
        model = GPT(config).init_weights()
        model.compute_dtype = compute_dtype
        params, optimizers = list(model.parameters()), make_optimizers(model, 0.02, 0.004, muon=False)

        def loss():
            return -model.logprobs(model.hidden(inputs).flatten(0, 1), targets.flatten())[0].sum() / batch_tokens
        loss = torch.compile(loss) if compiled else loss

        def step():
            loss().backward()
            update(optimizers, params, 1.0, 1.0)
        return step

    plain = PlainGPT(depth, width, width // head_dim, vocab_size, seq_len)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def plain_step():
        F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    def tokens_per_second(step):
        n, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            step()
            n += 1
        return n * batch_tokens / (time.perf_counter() - begun)
    best = dist.dtypes(dtype, torch.device("cpu"))[1]
    steps = {"nanorl": nanorl_step(best, False), "nanorl_compiled": nanorl_step(best, True), "nanorl_fp32": nanorl_step(torch.float32, False),
             "plain": plain_step}
    for step in steps.values():
        step()
    rounds = [{name: tokens_per_second(step) for name, step in steps.items()} for _ in range(repeats)]
    median = lambda values: sorted(values)[len(values) // 2]
    return dict(dtype=str(best), params=config.n_params()[0], plain_params=sum(p.numel() for p in plain.parameters()),
                tok_per_s={name: round(median([r[name] for r in rounds])) for name in steps},
                over_plain={name: round(median([r[name] / r["plain"] for r in rounds]), 2) for name in steps},
                over_fp32={name: round(median([r[name] / r["nanorl_fp32"] for r in rounds]), 2) for name in steps})


def rollout():
    """Tokens/s of the engine with all rows together, and with 8 rows of one prompt at a time, in turn."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab_size)).init_weights()
    model.compute_dtype = dist.dtypes(dtype, torch.device("cpu"))[1]
    engine = Engine(model)
    ids = torch.randint(0, vocab_size, (prompts, prompt_tokens)).tolist()

    def together():
        engine.generate(ids, samples, new_tokens)
        return prompts * samples * new_tokens

    def one_at_a_time():
        engine.generate(ids[:1], 8, new_tokens)
        return 8 * new_tokens

    def tokens_per_second(run):
        n, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            n += run()
        return n / (time.perf_counter() - begun)
    together(), one_at_a_time()
    pairs = [(tokens_per_second(together), tokens_per_second(one_at_a_time)) for _ in range(repeats)]
    median = lambda values: sorted(values)[len(values) // 2]
    return dict(dtype=str(model.compute_dtype), together_tok_s=round(median([a for a, _ in pairs])), one_at_a_time_tok_s=round(median([b for _, b in pairs])),
                ratio=round(median([a / b for a, b in pairs]), 2))


def flips():
    """In each precision, how many of the completions fork, and after how many tokens, when the rows are decoded in fewer places than there are rows,
    from how many they are with all together; and the log-probs of equal tokens beside each other."""
    from nanorl.hf import load_model
    from nanorl.rollout import prompt_key
    from nanorl.runtime.checkpoint import resolve
    from nanorl.tasks import get_task
    from nanorl.tokenizer import Tokenizer
    policy, tokenizer, source = load_model(resolve(model), torch.float64), Tokenizer.from_pretrained(resolve(model)), get_task(task, split="val")
    some = [tokenizer.render_prompt(source.problem(i).prompt) for i in range(prompts)]
    keys = [prompt_key(0, "flips", i) for i in range(prompts)]
    found = {}
    for name, kind in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        net = policy if kind == torch.float64 else load_model(resolve(model), torch.float32)
        net.compute_dtype = kind
        draw = lambda rows: sum(Engine(net, rows).generate(some, samples, new_tokens, stop_ids=tokenizer.stop_ids, keys=keys), [])
        pairs = list(zip(draw(0), draw(3 * samples)))
        same = [next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids)) for a, b in pairs]  # tokens before the fork
        forks = sum(n < len(a.ids) for n, (a, _) in zip(same, pairs))
        found[name] = dict(completions=len(pairs), forks=forks, tokens=sum(same), per_token=forks / sum(same),
                           logprob_max=max(abs(x - y) for n, (a, b) in zip(same, pairs) for x, y in zip(a.logprobs[:n], b.logprobs)))
    return found


def main():
    commands = {"base": base, "rollout": rollout, "flips": flips, "rates": dict}
    if len(sys.argv) < 2 or sys.argv[1] not in (*commands, "--help"):
        raise SystemExit(f"usage: python -m nanorl.tools.bench {{{','.join(commands)}}} [--name=value]")
    settings = configure(globals(), sys.argv[1:] if sys.argv[1] == "--help" else sys.argv[2:])
    result = dict(command=sys.argv[1], torch=torch.__version__, threads=torch.get_num_threads(), machine=rates(),
                  settings=settings, **commands[sys.argv[1]]())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
