"""python tests/fakecuda/count_kernels.py

Kernels of a captured decode step in the shape of depth 20 (10 query heads, 5 key/value heads, QK
norm, bf16), for a layer and for the rest, from models of two and of three layers. Prints a line of
JSON. Each operator counts as one kernel. On a GPU an RMSNorm of part of a common product is two: it
copies its input first.
"""

import collections
import json
import os
import sys

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.getcwd()]
import fakecuda
import torch

from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig

torch.set_num_threads(1)
SIZES = dict(vocab_size=64, n_embd=80, n_head=10, n_kv_head=5, head_dim=8, n_inner=64)


def kernels_of(layers):
    """Of a captured step, {operator: how often}."""
    with fakecuda.device():
        model = GPT(GPTConfig(n_layer=layers, context=256, qk_norm=True, **SIZES)).to("cuda")
        model.compute_dtype = torch.bfloat16
        engine = Engine(model)
        for _ in range(3):
            engine.generate([[1, 2, 3]] * 4, 4, 24)
        (batch,) = engine.batches.values()
        graphs = [graph for graph in batch.graphs.values() if graph is not None]
        return collections.Counter(str(op.func) for op in graphs[-1].recording.ops)


def main():
    two, three = kernels_of(2), kernels_of(3)
    layer = three - two
    rest = two - collections.Counter({name: 2 * n for name, n in layer.items()})
    print(json.dumps(dict(layer=layer.total(), rest=rest.total(), by_op=layer)))


if __name__ == "__main__":
    main()
