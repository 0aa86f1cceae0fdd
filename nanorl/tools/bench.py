"""Speed against the machine's own rates and against the obvious way, in one run: `python -m nanorl.tools.bench rollout`.

    rollout  tokens/s of the engine, milliseconds a decode step, occupancy, memory
    learner  forward and backward over completions, prompts computed once a group
    step     both, the optimizer and the refresh: one whole step on random rewards
    base     train_base.py's step against a plain eager fp32 loop of as many parameters
    flips    tokens that differ when the same samples are drawn in other company: --model=<a trained one> --task=
    rates    the machine's fp32 and bf16 matrix rates and its copy bandwidth

The floor of a shape is its FLOPs over the matrix rate plus its bytes over the copy rate, both measured between the repetitions (the sum: where a device
overlaps the two, the larger of them is the true floor). Bytes are the weights and caches that decode steps read; the learner's are not counted. `of_floor` is
floor / time. speedup_over_naive is against nanorl/tools/naive.py, one prompt and --naive_rows=8 of its samples at a time, in turns with it;
speedup_over_naive_all_rows against the same with all rows at once. Ends with one JSON line. Compare ratios: these are of the same
minute, absolute figures are of the machine's mood."""

import ctypes
import sys
import time
from json import dumps

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorl import grpo
from nanorl.batch import pack
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model
from nanorl.learner import forward
from nanorl.optim import make_optimizers, update
from nanorl.report.cost import bytes_decoded, causal_sampling_flops, forward_flops
from nanorl.report.rates import device_rates, machine_rates
from nanorl.rollout import Rollout, length_table
from nanorl.runtime import dist
from nanorl.runtime.checkpoint import resolve
from nanorl.runtime.config import configure
from nanorl.tools import naive

# ---- what is measured
model = ""  # rollout, learner, step: a model directory, or a stage's; empty: a random one of --depth and --vocab_size. flips: a trained one
depth = 4  # layers
vocab_size = 512  # tokens
dtype = "auto"  # activations: auto, fp32, bf16
device = "auto"  # auto, cpu, cuda
prompts = 16  # P
samples = 16  # G, samples of each
prompt_tokens = 96  # tokens of a prompt
new_tokens = 128  # most tokens of a completion
stops = 0.0  # share of the vocabulary that ends a completion: 0.02 gives lengths of about 50, a few of them the longest; 0: all are cut off
device_rows = 0  # most rows decoded at once; 0: all
device_tokens = 16384  # learner: tokens of one forward
naive_rows = 8  # rows at a time of the obvious way
# ---- base, flips
width = 128  # base: channels
seq_len = 128  # base: tokens of a row
batch_tokens = 2048  # base: tokens of a step
task = "sum3"  # flips: its task
# ---- how
seconds = 5.0  # base: measured per repetition
repeats = 5  # repetitions, taken in turn
json = False  # print the JSON line alone


class PlainGPT(nn.Module):
    """What one would write first: LayerNorm, GELU, learned positions, fused q/k/v, eager fp32."""

    def __init__(self, layers, width, heads, vocab, context):
        super().__init__()
        self.token, self.position, self.heads = (
            nn.Embedding(vocab, width),
            nn.Embedding(context, width),
            heads,
        )
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    n1=nn.LayerNorm(width),
                    qkv=nn.Linear(width, 3 * width),
                    out=nn.Linear(width, width),
                    n2=nn.LayerNorm(width),
                    up=nn.Linear(width, 4 * width),
                    down=nn.Linear(4 * width, width),
                )
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        B, T = ids.shape
        x = self.token(ids) + self.position(torch.arange(T))
        for b in self.blocks:
            q, k, v = (
                t.view(B, T, self.heads, -1).transpose(1, 2)
                for t in b["qkv"](b["n1"](x)).chunk(3, -1)
            )
            x = x + b["out"](
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(B, T, -1)
            )
            x = x + b["down"](F.gelu(b["up"](b["n2"](x))))
        return F.linear(self.norm(x), self.token.weight)


def base():
    """Tokens/s of train_base.py's step (eager, compiled, and eager in fp32) and of a plain loop, in turn."""
    torch.manual_seed(0)
    head_dim = 64
    config = GPTConfig(
        vocab_size,
        depth,
        width,
        width // head_dim,
        width // head_dim,
        head_dim,
        -(-8 * width // 3 // 64) * 64,
        qk_norm=True,
        tie_embeddings=True,
    )
    ids = torch.randint(0, vocab_size, (batch_tokens // seq_len, seq_len + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def nanorl_step(compute_dtype, compiled):
        model = GPT(config).init_weights()
        model.compute_dtype = compute_dtype
        params, optimizers = (
            list(model.parameters()),
            make_optimizers(model, 0.02, 0.004, muon=False),
        )

        def loss():
            return (
                -model.logprobs(model.hidden(inputs).flatten(0, 1), targets.flatten())[0].sum()
                / batch_tokens
            )

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
    steps = {
        "nanorl": nanorl_step(best, False),
        "nanorl_compiled": nanorl_step(best, True),
        "nanorl_fp32": nanorl_step(torch.float32, False),
        "plain": plain_step,
    }
    for step in steps.values():
        step()
    rounds = [
        {name: tokens_per_second(step) for name, step in steps.items()} for _ in range(repeats)
    ]
    median = lambda values: sorted(values)[len(values) // 2]
    return dict(
        dtype=str(best),
        params=config.n_params()[0],
        plain_params=sum(p.numel() for p in plain.parameters()),
        tok_per_s={name: round(median([r[name] for r in rounds])) for name in steps},
        over_plain={
            name: round(median([r[name] / r["plain"] for r in rounds]), 2) for name in steps
        },
        over_fp32={
            name: round(median([r[name] / r["nanorl_fp32"] for r in rounds]), 2) for name in steps
        },
    )


# ---- rollout, learner, step -------------------------------------------------------------------------------


def made_model(place):
    """The model to measure, and its activations' precision."""
    torch.manual_seed(0)
    weights, activations = dist.dtypes(dtype, place)
    if model:
        net = load_model(resolve(model), weights, place)
    else:
        net = GPT(GPTConfig.from_depth(depth, vocab_size)).init_weights().to(place)
    net.compute_dtype = activations
    return net


def random_prompts(net):
    return torch.randint(0, net.config.n_tokens, (prompts, prompt_tokens)).tolist()


def stop_ids(net):
    return range(round(stops * net.config.n_tokens))


def timed(work, place):
    """(seconds, result) of work()."""
    begun = time.perf_counter()
    result = work()
    dist.synchronize(place)
    return time.perf_counter() - begun, result


def peak_over(work, place):
    """Gigabytes that work() takes at its peak beyond what there was; None where the system does not tell."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        work()
        return round((torch.cuda.max_memory_allocated(place) - before) / 1e9, 3)

    def resident(name):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what is free goes back to the system, or the next peak would hide in it
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak starts anew
        before = resident("VmRSS")
        work()
        return round((resident("VmHWM") - before) / 1e9, 3)
    except (OSError, AttributeError, StopIteration):
        return None


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def in_turns(work, naive_work, place, activations, flops_and_bytes):
    """Repetitions of work() and of naive_work(), which give how many tokens they made, and the machine's rates between them -> figures. flops_and_bytes():
    of the last work()."""
    work(), naive_work()
    rounds = []
    for _ in range(repeats):
        flop_rate, copy_rate = device_rates(place, activations)
        t, tokens = timed(work, place)
        flops, moved = flops_and_bytes()
        t_naive, tokens_naive = timed(naive_work, place)
        rounds.append(
            dict(
                seconds=t,
                tokens=tokens,
                tok_s=tokens / t,
                speedup_over_naive=tokens / t * t_naive / tokens_naive,
                naive_tok_s=tokens_naive / t_naive,
                gflop_s=flop_rate / 1e9,
                gb_s=copy_rate / 1e9,
                floor_s=flops / flop_rate + moved / copy_rate,
                of_floor=(flops / flop_rate + moved / copy_rate) / t,
                mfu=flops / t / flop_rate,
                mbu=moved / t / copy_rate,
            )
        )
    return {name: float(f"{median([r[name] for r in rounds]):.4g}") for name in rounds[0]}


def rollout():
    """The engine, all rows of all prompts together."""
    place = dist.setup(device)
    net = made_model(place)
    engine, some = Engine(net, device_rows), random_prompts(net)

    def work():
        engine.generate(some, samples, new_tokens, stop_ids=stop_ids(net))
        return engine.stats["new_tokens"]

    figures = in_turns(
        work,
        lambda: naive.generate(engine.model, some[:1], naive_rows, new_tokens, stop_ids(net))[1],
        place,
        net.compute_dtype,
        lambda: (causal_sampling_flops(engine), bytes_decoded(engine)),
    )
    live, places = engine.stats["live"], engine.stats["row_slots"]
    t_all, (_, kept_all) = timed(
        lambda: naive.generate(engine.model, some, samples, new_tokens, stop_ids(net)), place
    )
    t_work, kept = timed(work, place)
    prefill = min(timed(lambda: engine.generate(some, samples, 1), place)[0] for _ in range(2))
    return dict(
        figures,
        speedup_over_naive_all_rows=round(kept / t_work * t_all / kept_all, 2),
        ms_per_decode_step=round(1000 * (figures["seconds"] - prefill) / max(len(live), 1), 2),
        prefill_ms=round(1000 * prefill, 1),
        decode_steps=len(live),
        occupancy=round(sum(live) / max(len(live), 1) / places, 3),
        occupancy_over_time=[round(live[i * len(live) // 8] / places, 2) for i in range(8)]
        if live
        else [],
        peak_gb=peak_over(work, place),
        naive_all_rows_peak_gb=peak_over(
            lambda: naive.generate(engine.model, some, samples, new_tokens), place
        ),
    )


def sampled(engine, some):
    """Rollouts from the engine, with random rewards, and their advantages (P, G)."""
    net = engine.learner
    groups = engine.generate(some, samples, new_tokens, stop_ids=stop_ids(net))
    rewards = torch.randint(0, 2, (prompts, samples)).double()
    return [
        Rollout(None, prompt, group, None, None, None) for prompt, group in zip(some, groups)
    ], grpo.advantages(rewards)


def learn(net, rollouts, advantages, work):
    """Forward and backward as train_rl.py does them. work: collects the FLOPs."""
    lengths = length_table(rollouts, samples)
    work["flops"] = work["padded"] = work["inputs"] = 0
    for batch in pack(
        rollouts,
        advantages,
        grpo.token_weights(lengths),
        device_tokens,
        next(net.parameters()).device,
    ):
        outputs = forward(net, batch, with_entropy=True)
        gain = grpo.reinforce(outputs.logprobs, batch.advantages)  # (S,)
        grpo.policy_loss(gain, batch.token_weights, lengths.sum()).backward()
        work["flops"] += 3 * forward_flops(
            net.config, batch.ids.numel(), batch.visible_pairs, len(gain)
        )
        work["padded"] += outputs.computed_slots
        work["inputs"] += batch.ids.numel()
    return int(lengths.sum())


def clear(net):
    for p in net.parameters():
        p.grad = None


def learner():
    """Forward and backward of one step's completions."""
    place = dist.setup(device)
    net = made_model(place)
    rollouts, advantages = sampled(Engine(net, device_rows), random_prompts(net))
    cut = [
        Rollout(
            None, rollouts[0].prompt_ids, rollouts[0].completions[:naive_rows], None, None, None
        )
    ]
    count = {}
    work = lambda: (clear(net), learn(net, rollouts, advantages, count))[1]

    def naive_work():
        clear(net)
        naive.learn(net, cut, advantages.tolist(), naive_rows)
        return sum(len(c.ids) for c in cut[0].completions)

    figures = in_turns(work, naive_work, place, net.compute_dtype, lambda: (count["flops"], 0))
    clear(net)
    peak = peak_over(work, place)
    clear(net)
    rows = max(1, device_tokens // (prompt_tokens + new_tokens))
    return dict(
        figures,
        inputs=count["inputs"],
        inputs_with_prompts_repeated=sum(
            len(r.prompt_ids) + len(c.ids) - 1 for r in rollouts for c in r.completions
        ),
        padding_of_attention=round(1 - count["inputs"] / count["padded"], 3),
        peak_gb=peak,
        naive_same_tokens_peak_gb=peak_over(
            lambda: naive.learn(net, rollouts, advantages.tolist(), rows), place
        ),
    )


def step():
    """A whole step: rollout, learner, optimizer, refresh."""
    place = dist.setup(device)
    net = made_model(place)
    engine, some, count, parts = Engine(net, device_rows), random_prompts(net), {}, []
    params, optimizers = list(net.parameters()), make_optimizers(net, 1e-5, 1e-5, muon=False)

    def finish():
        update(optimizers, params, 1.0, 1.0)
        engine.refresh()

    def work():
        t_rollout, (rollouts, advantages) = timed(lambda: sampled(engine, some), place)
        t_learner, tokens = timed(lambda: learn(net, rollouts, advantages, count), place)
        t_update, _ = timed(finish, place)
        parts.append((t_rollout, t_learner, t_update))
        return tokens

    def naive_work(few=some[:1], rows=naive_rows, at_once=naive_rows):
        ids, kept = naive.generate(engine.model, few, rows, new_tokens, stop_ids(net))
        ends = [
            next((i + 1 for i, x in enumerate(row) if x in stop_ids(net)), len(row))
            for row in ids.tolist()
        ]
        completions = [naive.Sampled(row[:end]) for row, end in zip(ids.tolist(), ends)]
        made = [
            Rollout(None, p, completions[i * rows : (i + 1) * rows], None, None, None)
            for i, p in enumerate(few)
        ]
        naive.learn(net, made, torch.randn(len(few), rows).tolist(), at_once)
        clear(net)  # its optimizer step would be one of the whole step's P * G rows: left out
        return kept

    figures = in_turns(
        work,
        naive_work,
        place,
        net.compute_dtype,
        lambda: (causal_sampling_flops(engine) + count["flops"], bytes_decoded(engine)),
    )
    rollout_s, learner_s, update_s = (median(values) for values in zip(*parts[1:]))
    clear(net)
    peak = peak_over(work, place)
    rows = max(1, device_tokens // (prompt_tokens + new_tokens))
    return dict(
        figures,
        rollout_s=round(rollout_s, 3),
        learner_s=round(learner_s, 3),
        update_s=round(update_s, 3),
        update_share=round(update_s / (rollout_s + learner_s + update_s), 4),
        peak_gb=peak,
        naive_same_rows_peak_gb=peak_over(lambda: naive_work(some, samples, rows), place),
    )


# ---- flips --------------------------------------------------------------------------------------------------


def flips():
    """In each precision, how many of the completions fork, and after how many tokens, when the rows are decoded in fewer places than there are rows,
    from how many they are with all together; and the log-probs of equal tokens beside each other."""
    from nanorl.rollout import prompt_key
    from nanorl.tasks import get_task
    from nanorl.tokenizer import Tokenizer

    policy, tokenizer, source = (
        load_model(resolve(model), torch.float64),
        Tokenizer.from_pretrained(resolve(model)),
        get_task(task, split="val"),
    )
    some = [tokenizer.render_prompt(source.problem(i).prompt) for i in range(prompts)]
    keys = [prompt_key(0, "flips", i) for i in range(prompts)]
    found = {}
    for name, kind in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        net = policy if kind == torch.float64 else load_model(resolve(model), torch.float32)
        net.compute_dtype = kind
        draw = lambda rows: sum(
            Engine(net, rows).generate(
                some, samples, new_tokens, stop_ids=tokenizer.stop_ids, keys=keys
            ),
            [],
        )
        pairs = list(zip(draw(0), draw(3 * samples)))
        same = [
            next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
            for a, b in pairs
        ]  # tokens before the fork
        forks = sum(n < len(a.ids) for n, (a, _) in zip(same, pairs))
        found[name] = dict(
            completions=len(pairs),
            forks=forks,
            tokens=sum(same),
            per_token=forks / sum(same),
            logprob_max=max(
                abs(x - y)
                for n, (a, b) in zip(same, pairs)
                for x, y in zip(a.logprobs[:n], b.logprobs)
            ),
        )
    return found


def main():
    commands = {
        "rollout": rollout,
        "learner": learner,
        "step": step,
        "base": base,
        "flips": flips,
        "rates": dict,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in (*commands, "--help"):
        raise SystemExit(
            f"usage: python -m nanorl.tools.bench {{{','.join(commands)}}} [--name=value]"
        )
    settings = configure(globals(), sys.argv[1:] if sys.argv[1] == "--help" else sys.argv[2:])
    result = commands[sys.argv[1]]()
    if not json:
        for name, value in result.items():
            print(f"{name:28} {value}")
    print(
        dumps(
            dict(
                command=sys.argv[1],
                torch=torch.__version__,
                threads=torch.get_num_threads(),
                machine=machine_rates(),
                settings=settings,
                **result,
            )
        )
    )


if __name__ == "__main__":
    dist.run(main)
