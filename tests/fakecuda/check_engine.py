"""python tests/fakecuda/check_engine.py fp64|fp32|bf16

The engine on the simulated GPU, with captured and replayed graphs, against the engine on the CPU,
over calls with other prompts, other weights and other settings. A line of JSON a call: how many
completions are equal, how far their log-probs are apart, how many graphs were captured. In the last
line: where the host waited for the GPU, and the kernels of one captured step.
"""

import collections
import json
import os
import random
import sys

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.getcwd()]
import fakecuda  # before torch, which asks once what devices there are
import torch

from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig

torch.set_num_threads(1)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = GPTConfig(50, 3, 32, 4, 2, 8, 64, context=256, qk_norm=True, tie_embeddings=False)
VOCABULARY, ROWS, STOP_IDS = 50, 12, {3}


def build(dtype):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.3)
    model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    model.compute_dtype = dtype
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
    after_longer = (prompts(6, 20), 4, 40, 1.0)
    return [*usual, greedy, after_greedy, longer, after_longer]


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


def main():
    dtype = DTYPES[sys.argv[1]]
    calls = make_calls()
    on_cpu = Engine(build(dtype), ROWS)
    expected = [sample(on_cpu, number, *call) for number, call in enumerate(calls)]
    with fakecuda.device() as log:
        model = build(dtype).to("cuda")
        model.compute_dtype = dtype
        engine = Engine(model, ROWS)
        for number, call in enumerate(calls):
            before = fakecuda.CUDAGraph.count
            log.syncs.clear()
            found = sample(engine, number, *call)
            row = dict(
                equal=sum(a.ids == b.ids for a, b in zip(found, expected[number])),
                of=len(found),
                gap=largest_gap(found, expected[number]),
                captures=fakecuda.CUDAGraph.count - before,
                steps=len(engine.stats["live"]),
            )
            print(json.dumps(row))

        graphs = [graph for graph in engine.batch.graphs.values() if graph is not None]
        kernels = collections.Counter(str(op.func) for op in graphs[0].recording.ops)
        last = dict(syncs=log.syncs, kernels=sum(kernels.values()), by_op=kernels)
        print(json.dumps(last))


if __name__ == "__main__":
    main()
