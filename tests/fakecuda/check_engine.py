"""python tests/fakecuda/check_engine.py fp64|fp32|bf16

The engine on the simulated GPU, with captured and replayed graphs, against the engine on the CPU,
over calls with other prompts, other weights and other settings. Then labels by likelihood, and one
micro-batch of the learner. Where something is wrong, it says what and ends with status 1. In bf16
nothing has to be equal.

A line of JSON a call: how many completions are equal, how far their log-probs are apart, how many
graphs were captured, how often the host waited for the GPU. In the last line: the micro-batch's
waits by function, and the kernels of one captured step.
"""

import collections
import json
import os
import random
import sys

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.getcwd()]
import fakecuda  # before torch, which asks once what devices there are
import torch
from emulated import flex_attention

from nanorl import attention, flex, grpo, learner
from nanorl.batch import pack
from nanorl.cache import DecodeBatch
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.rollout import Rollout, length_table

torch.set_num_threads(1)
# The type of the activations, of the weights, and how far log-probs may be apart. Where the two
# types differ, the engine decodes from a copy, which a refresh has to bring up to date.
DTYPES = {
    "fp64": (torch.float64, torch.float32, 1e-12),
    "fp32": (torch.float32, torch.float32, 1e-4),
    "bf16": (torch.bfloat16, torch.float32, float("inf")),
}
CONFIG = GPTConfig(50, 3, 32, 4, 2, 8, 64, context=256, qk_norm=True, tie_embeddings=False)
VOCABULARY, ROWS, STOP_IDS = 50, 12, {3}
LOOK_EVERY = 8  # decode steps

# How often the host waits for the GPU in a micro-batch of the learner, at most: its tensors are
# copied to the GPU, then what the attention needs, and the sums for the log are looked at once.
# Attention by rectangles: for each its slots and its mask, then where the outputs are. In one
# kernel: each slot's run, and the squares.
MAKE_BATCH = 2
A_RECTANGLE = 3
OUTPUTS = 1
ONE_KERNEL = 2
TOKEN_SUMS = 1


def build(dtype):
    compute_dtype, weight_dtype, _ = DTYPES[dtype]
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.3)
    model = model.to(weight_dtype)
    model.compute_dtype = compute_dtype
    return model


def build_on_gpu(dtype):
    model = build(dtype).to("cuda")
    model.compute_dtype = DTYPES[dtype][0]
    return model


def make_calls():
    """(prompts, samples, new tokens, temperature) of each call."""
    rng = random.Random(0)

    def prompts(n, longest):
        lengths = [rng.randint(1, longest) for _ in range(n)]
        return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]

    usual = [(prompts(6, 20), 4, 40, 1.0) for _ in range(2)]
    greedy = (prompts(9, 7), 1, 40, 0.0)
    after_greedy = (prompts(6, 20), 4, 40, 1.0)
    longer = (prompts(5, 90), 4, 40, 1.0)
    cooler = (prompts(6, 20), 4, 40, 0.7)
    return [*usual, greedy, after_greedy, longer, cooler]


def sample(engine, number, prompts, samples, new_tokens, temperature):
    """One call, then other weights -> the completions of all prompts."""
    keys = [100 * number + i for i in range(len(prompts))]
    groups = engine.generate(prompts, samples, new_tokens, temperature, STOP_IDS, keys=keys)
    with torch.no_grad():
        for p in engine.learner.parameters():
            p.mul_(1.02)
    engine.refresh()
    return [completion for group in groups for completion in group]


def largest_gap(a, b):
    """Of the log-probs of the completions that are equal."""
    gaps = []
    for x, y in zip(a, b):
        if x.ids == y.ids:
            gaps += [abs(u - v) for u, v in zip(x.logprobs, y.logprobs)]
    return max(gaps, default=0.0)


def must(holds, what):
    if not holds:
        sys.exit(f"FAILED: {what}")


# ---- sampling ------------------------------------------------------------------------------------


def check_calls(dtype, log):
    """All calls, on the CPU and on the GPU -> the engine on the GPU."""
    compute_dtype, _, bound = DTYPES[dtype]
    exact = compute_dtype != torch.bfloat16
    on_cpu, on_gpu = Engine(build(dtype), ROWS), Engine(build_on_gpu(dtype), ROWS)
    prefills = count_prefills()
    for number, call in enumerate(make_calls()):
        expected = sample(on_cpu, number, *call)
        before = fakecuda.CUDAGraph.captures
        log.syncs.clear()
        prefills.clear()
        found = sample(on_gpu, number, *call)
        row = dict(
            equal=sum(a.ids == b.ids for a, b in zip(found, expected)),
            of=len(expected),
            gap=largest_gap(found, expected),
            captures=fakecuda.CUDAGraph.captures - before,
            steps=len(on_gpu.stats["live"]),
            prefills=prefills["cuda"],
            syncs=sum(log.syncs.values()),
            syncs_in_steps=fakecuda.syncs_within("cache.py step"),
            looks=fakecuda.syncs_within("engine.py _gone"),
        )
        print(json.dumps(row), flush=True)
        must(not exact or row["equal"] == row["of"], f"call {number}: other tokens: {row}")
        must(row["gap"] <= bound, f"call {number}: other log-probs: {row}")
        must(row["syncs_in_steps"] == 0, f"call {number}: a sync in a decode step: {log.syncs}")

        # Also after prompts came in, if that is when a look is due.
        looks = row["steps"] // LOOK_EVERY + row["prefills"]
        must(row["looks"] <= looks, f"call {number}: {row['looks']} looks, at most {looks}")
    return on_cpu, on_gpu


def count_prefills():
    """From now on counts them by device."""
    counts = collections.Counter()
    original = DecodeBatch.prefill

    def prefill(batch, prompts):
        counts[batch.device.type] += 1
        return original(batch, prompts)

    DecodeBatch.prefill = prefill
    return counts


def check_likelihood(on_cpu, on_gpu, log, bound):
    prompts, _, _, _ = make_calls()[0]
    candidates = [[1, 2, 5]] * len(prompts)
    expected = on_cpu.next_logprobs(prompts, candidates)
    log.syncs.clear()
    pairs = zip(expected, on_gpu.next_logprobs(prompts, candidates))
    gap = max(abs(a - b) for x, y in pairs for a, b in zip(x, y))
    must(gap <= bound, f"likelihoods of labels {gap} apart")

    # All prompts of a rectangle: they and their candidates go to the GPU, and the answer comes.
    waits = fakecuda.syncs_within("engine.py next_logprobs")
    must(waits <= 3, f"{waits} syncs in next_logprobs, at most 3")


# ---- learning ------------------------------------------------------------------------------------


def learn(engine, prompts, groups):
    """One micro-batch of these completions -> (gradients, sums for the log, rectangles)."""
    model = engine.learner
    rollouts = [Rollout(None, p, group, None, None, None) for p, group in zip(prompts, groups)]
    lengths = length_table(rollouts, len(groups[0]))  # (P, G)
    advantages = grpo.advantages((lengths % 2).double())  # (P, G)
    weights = grpo.token_weights(lengths)  # (P, G)
    (batch,) = pack(rollouts, advantages, weights, 10**6, model.cos.device)
    outputs = learner.forward(model, batch, with_entropy=True)
    gain = batch.advantages * outputs.logprobs  # (S,)
    (-(batch.token_weights * gain).sum() / lengths.sum().item()).backward()
    sums = learner.token_sums(outputs, batch, grpo.Objective())
    gradients = [p.grad.cpu() for p in model.parameters()]
    model.zero_grad()
    rectangles = len(attention.SharedPrefixAttention(batch.rows, "cpu").blocks)
    return gradients, sums, rectangles


def check_learner(on_cpu, on_gpu, log, exact, one_kernel):
    """-> how often the host waited for the GPU, by function.

    one_kernel: whether attention on the GPU is PackedFlexAttention.
    """
    flex.flex_serves = lambda _rows, device, *_: one_kernel and device.type == "cuda"
    flex.compiled_flex = lambda: flex_attention
    prompts, samples, new_tokens, _ = make_calls()[0]
    groups = on_cpu.generate(prompts, samples, new_tokens, stop_ids=STOP_IDS)
    expected, expected_sums, rectangles = learn(on_cpu, prompts, groups)
    log.syncs.clear()
    found, sums, _ = learn(on_gpu, prompts, groups)
    if exact:
        sums["computed_slots"] = expected_sums["computed_slots"]  # one kernel pads otherwise
        gaps = [float((a - b).abs().max()) for a, b in zip(found, expected)]
        must(max(gaps) < 1e-4, f"other gradients: {gaps}")
        pairs = zip(sums.pop("entropies"), expected_sums.pop("entropies"), strict=True)
        off = {"entropies": max(abs(a - b) for a, b in pairs)}
        for name in sums:
            off[name] = abs(sums[name] - expected_sums[name])
        must(max(off.values()) < 1e-3, f"other sums: {off}")

    counts = {
        "make_batch": fakecuda.syncs_within("batch.py make_batch"),
        "forward": fakecuda.syncs_within("learner.py forward"),
        "token_sums": fakecuda.syncs_within("learner.py token_sums"),
    }
    counts["elsewhere"] = sum(log.syncs.values()) - sum(counts.values()) - len(found)
    bounds = {
        "make_batch": MAKE_BATCH,
        "forward": ONE_KERNEL if one_kernel else A_RECTANGLE * rectangles + OUTPUTS,
        "token_sums": TOKEN_SUMS,
        "elsewhere": 0,  # none in backward
    }
    for name, count in counts.items():
        must(count <= bounds[name], f"{count} syncs in {name}, at most {bounds[name]}: {log.syncs}")
    return {**counts, "rectangles": rectangles}


def main():
    dtype = sys.argv[1]
    compute_dtype, _, bound = DTYPES[dtype]
    with fakecuda.device() as log:
        on_cpu, on_gpu = check_calls(dtype, log)
        *_, batch = on_gpu.batches.values()
        graphs = [graph for graph in batch.graphs.values() if graph is not None]
        check_likelihood(on_cpu, on_gpu, log, bound)
        exact = compute_dtype != torch.bfloat16
        micro_batch = check_learner(on_cpu, on_gpu, log, exact, one_kernel=False)
        in_one_kernel = check_learner(on_cpu, on_gpu, log, exact, one_kernel=True)
        kernels = collections.Counter(str(op.func) for op in graphs[0].recording.ops)
        last = dict(
            micro_batch=micro_batch,
            in_one_kernel=in_one_kernel,
            kernels=sum(kernels.values()),
            by_op=kernels,
        )
        print(json.dumps(last))


if __name__ == "__main__":
    main()
