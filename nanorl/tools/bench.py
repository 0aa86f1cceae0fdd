"""Speed, against the machine's own rates and against the obvious way, both in the same run.

    python -m nanorl.tools.bench rollout [--name=value ...]

    rollout  tokens/s of the engine, milliseconds a decode step, occupancy, memory
    learner  forward and backward over completions, prompts computed once a group
    step     one whole step on random rewards: both of these, the optimizer and the refresh
    base     train_base.py's step against a plain eager fp32 loop of as many parameters
    loader   text -> token files -> batches: tokens/s, and hours for the text of a d20: --data=
    flips    tokens that differ when the same samples are drawn in other company:
             --model=<a trained one> --task=
    rates    the device's fp32 and bf16 matrix rates and its copy bandwidth

The floor of a shape is its FLOPs over the matrix rate plus its bytes over the copy rate. Both rates
are measured between the repetitions. (Where a device overlaps the two, the larger of them is the
true floor, and not the sum.) Bytes are the weights and caches that decode steps read. The learner's
are not counted. `of_floor` is floor / time.

The obvious way is nanorl/tools/naive.py. `speedup_over_naive` is against one prompt and
--naive_rows=8 of its samples at a time, measured in turns. `speedup_over_naive_all_rows` is against
all rows at once.

--stops=0.02 gives completions of about 50 tokens, a few of them the longest.

The last line is JSON. Compare ratios: they are of the same minute. Absolute figures depend on what
else the machine does.
"""

import ctypes
import sys
import time
from dataclasses import dataclass
from functools import partial
from json import dumps
from statistics import median_high
from types import SimpleNamespace

import torch

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
from nanorl.tools.bench_base import measure_base
from nanorl.tools.bench_flips import measure_flips
from nanorl.tools.bench_loader import measure_loader

# ---- what is measured
model = ""  # a model directory, or a stage's; empty: a random one of --depth and --vocab_size
depth = 4  # layers
vocab_size = 512  # tokens
dtype = "auto"  # activations: auto, fp32, bf16
device = "auto"  # auto, cpu, cuda
prompts = 16  # P
samples = 16  # G, samples of each
prompt_tokens = 96  # tokens of a prompt
new_tokens = 128  # most tokens of a completion
stops = 0.0  # share of the vocabulary that ends a completion; 0: all completions are cut off
device_rows = 0  # most rows decoded at once; 0: all
device_tokens = 16384  # learner: tokens of one forward
naive_rows = 8  # rows at a time of the obvious way
# ---- base, loader, flips
width = 128  # base: channels
seq_len = 128  # base: tokens of a row
batch_tokens = 2048  # base: tokens of a step
data = ""  # loader: text, as train_base.py's --data
task = "sum3"  # flips: its task
# ---- how
seconds = 5.0  # base, loader: measured per repetition
repeats = 5  # repetitions, taken in turn
json = False  # print the JSON line alone


def main():
    commands = {
        "rollout": measure_rollout,
        "learner": measure_learner,
        "step": measure_step,
        "base": measure_base,
        "loader": measure_loader,
        "flips": measure_flips,
        "rates": no_figures,
    }
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in (*commands, "--help"):
        raise SystemExit(
            f"usage: python -m nanorl.tools.bench {{{','.join(commands)}}} [--name=value]"
        )
    command = arguments[0]
    settings = configure(globals(), arguments if command == "--help" else arguments[1:])
    figures = commands[command](SimpleNamespace(**settings))
    if not json:
        for name, value in figures.items():
            print(f"{name:28} {value}")
    line = dict(
        command=command,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        machine=machine_rates(dist.setup(device)),
        settings=settings,
        **figures,
    )
    print(dumps(line))


def no_figures(_options):
    """`rates`: the device's rates are in every command's last line."""
    return {}


# ---- rollout -------------------------------------------------------------------------------------
# In this and the next parts `options` has the constants above.


class Sampling:
    """The engine, all rows of all prompts together."""

    def __init__(self, options):
        self.options = options
        self.device = dist.setup(options.device)
        self.net = make_model(options, self.device)
        self.engine = Engine(self.net, options.device_rows)
        self.prompts = random_prompts(self.net, options)
        self.stop_ids = make_stop_ids(self.net, options)

    def work(self):
        self.engine.generate(
            self.prompts,
            self.options.samples,
            self.options.new_tokens,
            stop_ids=self.stop_ids,
        )
        return self.engine.stats["new_tokens"]

    def needed(self):
        return causal_sampling_flops(self.engine), bytes_decoded(self.engine)

    def prefill(self):
        """A token a row: the prefill, and next to nothing else."""
        self.engine.generate(self.prompts, self.options.samples, 1)

    def naive_work(self):
        return self.sample_naively(self.prompts[:1], self.options.naive_rows, self.stop_ids)

    def naive_all_rows(self):
        return self.sample_naively(self.prompts, self.options.samples, self.stop_ids)

    def naive_longest(self):
        """All rows, and none stops: for the memory that it may take."""
        return self.sample_naively(self.prompts, self.options.samples, ())

    def sample_naively(self, prompt_ids, rows, stop_ids):
        """`rows` completions of each prompt -> their tokens."""
        _, kept = naive.generate(
            self.engine.model,
            prompt_ids,
            rows,
            self.options.new_tokens,
            stop_ids,
        )
        return kept


def measure_rollout(options):
    """-> figures of the engine."""
    case = Sampling(options)
    figures = in_turns(case, options.repeats)
    live, row_slots = case.engine.stats["live"], case.engine.stats["row_slots"]
    steps = len(live)

    # Once against the obvious way with all rows at once.
    naive_seconds, naive_tokens = timed(case.naive_all_rows, case.device)
    work_seconds, tokens = timed(case.work, case.device)
    speedup = tokens / work_seconds * naive_seconds / naive_tokens

    # What is not prefill is decode steps.
    prefill_seconds = min(timed(case.prefill, case.device)[0] for _ in range(2))
    decode_seconds = figures["seconds"] - prefill_seconds
    figures.update(
        speedup_over_naive_all_rows=round(speedup, 2),
        ms_per_decode_step=round(1000 * decode_seconds / max(steps, 1), 2),
        prefill_ms=round(1000 * prefill_seconds, 1),
    )

    # The share of the row slots that is taken: over all steps, and at eight points in time.
    occupancy = sum(live) / max(steps, 1) / row_slots
    over_time = []
    if live:
        over_time = [round(live[i * steps // 8] / row_slots, 2) for i in range(8)]
    figures.update(
        decode_steps=steps,
        occupancy=round(occupancy, 3),
        occupancy_over_time=over_time,
        peak_gb=peak_over(case.work, case.device),
        naive_all_rows_peak_gb=peak_over(case.naive_longest, case.device),
    )
    return figures


# ---- learner -------------------------------------------------------------------------------------


class Learning:
    """Forward and backward of one step's completions."""

    def __init__(self, options):
        self.options = options
        self.device = dist.setup(options.device)
        self.net = make_model(options, self.device)
        engine = Engine(self.net, options.device_rows)
        prompt_ids = random_prompts(self.net, options)
        self.rollouts, self.advantages = sample(engine, prompt_ids, options)

        # As much of it as the obvious way takes at once.
        first = self.rollouts[0]
        few_completions = first.completions[: options.naive_rows]
        self.few_rollouts = [bare_rollout(first.prompt_ids, few_completions)]
        self.few_tokens = sum(len(completion.ids) for completion in few_completions)

    def work(self):
        clear_gradients(self.net)
        budget = self.options.device_tokens
        self.learnt = learn(self.net, self.rollouts, self.advantages, budget)
        return self.learnt.tokens

    def needed(self):
        return self.learnt.flops, 0

    def naive_work(self):
        clear_gradients(self.net)
        rows = self.options.naive_rows
        naive.learn(self.net, self.few_rollouts, self.advantages.tolist(), rows)
        return self.few_tokens

    def naive_same_tokens(self):
        """All completions, as many tokens in a forward as in one of ours."""
        rows_at_once = rows_of_a_forward(self.options)
        naive.learn(self.net, self.rollouts, self.advantages.tolist(), rows_at_once)


def measure_learner(options):
    """-> figures of the learner."""
    case = Learning(options)
    figures = in_turns(case, options.repeats)
    clear_gradients(case.net)
    peak = peak_over(case.work, case.device)
    clear_gradients(case.net)

    learnt = case.learnt
    repeated = 0
    for rollout in case.rollouts:
        for completion in rollout.completions:
            repeated += len(rollout.prompt_ids) + len(completion.ids) - 1
    return dict(
        figures,
        inputs=learnt.slots,
        inputs_with_prompts_repeated=repeated,
        padding_of_attention=round(1 - learnt.slots / learnt.computed_slots, 3),
        peak_gb=peak,
        naive_same_tokens_peak_gb=peak_over(case.naive_same_tokens, case.device),
    )


# ---- step ----------------------------------------------------------------------------------------


class WholeStep:
    """Rollout, learner, optimizer, refresh."""

    def __init__(self, options):
        self.options = options
        self.device = dist.setup(options.device)
        self.net = make_model(options, self.device)
        self.engine = Engine(self.net, options.device_rows)
        self.prompts = random_prompts(self.net, options)
        self.params = list(self.net.parameters())
        self.optimizers = make_optimizers(self.net, 1e-5, 1e-5, muon=False)
        self.parts = []  # (seconds of the rollout, of the learner, of the update), a step each

    def work(self):
        net, budget = self.net, self.options.device_tokens
        sampling = partial(sample, self.engine, self.prompts, self.options)
        rollout_s, (rollouts, advantages) = timed(sampling, self.device)
        learning = partial(learn, net, rollouts, advantages, budget)
        learner_s, self.learnt = timed(learning, self.device)
        update_s, _ = timed(self.finish, self.device)
        self.parts.append((rollout_s, learner_s, update_s))
        return self.learnt.tokens

    def finish(self):
        update(self.optimizers, self.params, 1.0, 1.0)
        self.engine.refresh()

    def needed(self):
        flops = causal_sampling_flops(self.engine) + self.learnt.flops
        return flops, bytes_decoded(self.engine)

    def naive_work(self):
        rows = self.options.naive_rows
        return self.step_naively(self.prompts[:1], rows, rows)

    def naive_same_rows(self):
        """All rows, as many tokens in a forward as in one of ours."""
        rows_at_once = rows_of_a_forward(self.options)
        return self.step_naively(self.prompts, self.options.samples, rows_at_once)

    def step_naively(self, prompt_ids, rows, rows_at_once):
        """Sample `rows` completions of each prompt, and learn from them -> their tokens."""
        stop_ids = make_stop_ids(self.net, self.options)
        ids, kept = naive.generate(
            self.engine.model,
            prompt_ids,
            rows,
            self.options.new_tokens,
            stop_ids,
        )
        completions = [naive.Sampled(up_to_stop(row, stop_ids)) for row in ids.tolist()]
        rollouts = []
        for i, prompt in enumerate(prompt_ids):
            group = completions[i * rows : (i + 1) * rows]
            rollouts.append(bare_rollout(prompt, group))
        advantages = torch.randn(len(prompt_ids), rows)  # (P, rows)
        naive.learn(self.net, rollouts, advantages.tolist(), rows_at_once)

        # Its optimizer step would be one of the whole step's P * G rows: it is left out.
        clear_gradients(self.net)
        return kept


def measure_step(options):
    """-> figures of a whole step."""
    case = WholeStep(options)
    figures = in_turns(case, options.repeats)
    repetitions = case.parts[1:]  # the first was to warm up
    rollout_s, learner_s, update_s = (median_high(times) for times in zip(*repetitions))
    clear_gradients(case.net)
    peak = peak_over(case.work, case.device)
    return dict(
        figures,
        rollout_s=round(rollout_s, 3),
        learner_s=round(learner_s, 3),
        update_s=round(update_s, 3),
        update_share=round(update_s / (rollout_s + learner_s + update_s), 4),
        peak_gb=peak,
        naive_same_rows_peak_gb=peak_over(case.naive_same_rows, case.device),
    )


# ---- what is sampled and learnt from -------------------------------------------------------------


def make_model(options, device):
    """The model to measure, on a torch.device."""
    torch.manual_seed(0)
    weight_dtype, compute_dtype = dist.dtypes(options.dtype, device)
    if options.model:
        net = load_model(resolve(options.model), weight_dtype, device)
    else:
        config = GPTConfig.from_depth(options.depth, options.vocab_size)
        with device:  # a GPU fills its own memory; a CPU takes 10 seconds for depth 20
            net = GPT(config).init_weights()
    net.compute_dtype = compute_dtype
    return net


def random_prompts(net, options):
    """P lists of ids."""
    shape = (options.prompts, options.prompt_tokens)
    return torch.randint(0, net.config.n_tokens, shape).tolist()


def make_stop_ids(net, options):
    """The ids that end a completion: the first of the vocabulary."""
    return range(round(options.stops * net.config.n_tokens))


def up_to_stop(ids, stop_ids):
    """A row's ids up to its first stop token, which is kept."""
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[: i + 1]
    return ids


def sample(engine, prompt_ids, options):
    """P lists of ids -> the engine's Rollouts, and advantages (P, G) of random rewards."""
    stop_ids = make_stop_ids(engine.learner, options)
    groups = engine.generate(prompt_ids, options.samples, options.new_tokens, stop_ids=stop_ids)
    rewards = torch.randint(0, 2, (options.prompts, options.samples)).double()  # (P, G)
    rollouts = [bare_rollout(prompt, group) for prompt, group in zip(prompt_ids, groups)]
    return rollouts, grpo.advantages(rewards)


def bare_rollout(prompt_ids, completions):
    """As much of a Rollout as learning needs."""
    return Rollout(None, prompt_ids, completions, None, None, None)


@dataclass
class Learnt:
    """What `learn` has gone over."""

    tokens: int  # sampled
    flops: int = 0  # needed, forward and backward
    slots: int = 0  # inputs of the packed rows
    computed_slots: int = 0  # the same, with the padding of attention


def learn(net, rollouts, advantages, token_budget):
    """Forward and backward of REINFORCE over Rollouts, as train_rl.py does them -> Learnt.

    advantages: (P, G). token_budget: tokens of one forward.
    """
    lengths = length_table(rollouts, advantages.size(1))  # (P, G)
    token_weights = grpo.token_weights(lengths)  # (P, G)
    N = int(lengths.sum())
    learnt = Learnt(tokens=N)
    for batch in pack(rollouts, advantages, token_weights, token_budget, net.cos.device):
        outputs = forward(net, batch, with_entropy=True)
        gain = grpo.reinforce(outputs.logprobs, batch.advantages)  # (S,)
        grpo.policy_loss(gain, batch.token_weights, N).backward()

        slots = batch.ids.numel()
        one_pass = forward_flops(net.config, slots, batch.visible_pairs, len(gain))
        learnt.flops += 3 * one_pass  # backward takes two products for each of forward's
        learnt.slots += slots
        learnt.computed_slots += outputs.computed_slots
    return learnt


def clear_gradients(net):
    for p in net.parameters():
        p.grad = None


def rows_of_a_forward(options):
    """How many whole rows, prompt and all, are about `device_tokens`."""
    return max(1, options.device_tokens // (options.prompt_tokens + options.new_tokens))


# ---- how it is measured --------------------------------------------------------------------------


def in_turns(case, repetitions):
    """The fast way, the obvious way and the machine's rates, in turns -> medians of the figures.

    case: a Sampling, Learning or WholeStep. Its `work` and `naive_work` return how many tokens they
    made; `needed` the FLOPs and the bytes of the last `work`.
    """
    case.work()
    case.naive_work()
    rounds = []
    for _ in range(repetitions):
        flop_rate, copy_rate = device_rates(case.device, case.net.compute_dtype)
        work_seconds, tokens = timed(case.work, case.device)
        flops, moved = case.needed()
        naive_seconds, naive_tokens = timed(case.naive_work, case.device)
        floor = flops / flop_rate + moved / copy_rate
        figures = dict(
            seconds=work_seconds,
            tokens=tokens,
            tok_s=tokens / work_seconds,
            speedup_over_naive=tokens / work_seconds * naive_seconds / naive_tokens,
            naive_tok_s=naive_tokens / naive_seconds,
            gflop_s=flop_rate / 1e9,
            gb_s=copy_rate / 1e9,
            floor_s=floor,
            of_floor=floor / work_seconds,
            mfu=flops / work_seconds / flop_rate,
            mbu=moved / work_seconds / copy_rate,
        )
        rounds.append(figures)

    medians = {}
    for name in rounds[0]:
        value = median_high([figures[name] for figures in rounds])
        medians[name] = float(f"{value:.4g}")
    return medians


def timed(work, device):
    """(seconds, result) of work() on a torch.device."""
    begun = time.perf_counter()
    result = work()
    dist.synchronize(device)
    return time.perf_counter() - begun, result


def peak_over(work, device):
    """Gigabytes that work() takes at its peak, beyond what was in use before.

    None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device)
        return round((peak - before) / 1e9, 3)

    try:
        # What is free goes back to the system, or the next peak would hide in it.
        ctypes.CDLL(None).malloc_trim(0)
        # The system's record of the peak starts anew.
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = process_memory("VmRSS")
        work()
        peak = process_memory("VmHWM")
    except (OSError, AttributeError, StopIteration):
        return None
    return round((peak - before) / 1e9, 3)


def process_memory(field):
    """Bytes, by a field of /proc/self/status: VmRSS is in use now, VmHWM was the peak."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(field))
    kilobytes = int(line.split()[1])
    return kilobytes * 1024


if __name__ == "__main__":
    dist.run(main)
