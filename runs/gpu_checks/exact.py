"""What the machine is, and whether it computes the right thing."""

import copy
import random
from functools import partial

import torch
from gpu_checks.common import (
    D12,
    D20,
    ON_GPU,
    TINY,
    exact_model,
    kernels_of,
    median_seconds,
    random_ids,
    random_rollouts,
    rates,
    start,
    tell,
)

from nanorl.attention import CausalAttention, MaskedAttention
from nanorl.engine import Engine
from nanorl.gpt import GPTConfig
from nanorl.runtime import dist
from nanorl.tools import bench

# A part of a kernel's name -> the backend that it belongs to. cuDNN's names have "flash" too.
BACKENDS = {
    "flex": "flex",
    "cudnn": "cuDNN",
    "flash": "flash",
    "fmha": "memory-efficient",
    "softmax": "math",
}


# ---- where ---------------------------------------------------------------------------------------


def where():
    """The machine's rates, and which kernel takes each shape of attention."""
    device = start()
    flop_rate, copy_rate = rates(device)
    tell("where", rates=str(device), tflops=flop_rate / 1e12, copy_tb_s=copy_rate / 1e12)
    dtype = dist.dtypes("auto", device)[1]

    # Head dim 64 is the quickstart's, 128 that of the depths from 8 on.
    for depth in (3, D12, D20):
        config = GPTConfig.from_depth(depth, 512)
        rows, t, u = (2, 16, 8) if TINY else (16, 256, 128)
        q, k, v = inputs(config, rows, t, u, dtype, device)
        allowed = torch.ones(t, u + t, dtype=torch.bool, device=device).tril(u)
        masked = MaskedAttention(allowed.expand(rows, 1, t, u + t))
        tell_attention(f"depth {depth}, completions", masked, q, k, v)

        q, k, v = inputs(config, rows, t, 0, dtype, device)
        tell_attention(f"depth {depth}, causal rows", MaskedAttention(), q, k, v)
        tell_attention(f"depth {depth}, prefill", MaskedAttention(), q, k, v, gradient=False)

        document = torch.arange(t, device=device).div(t // 2, rounding_mode="floor")
        packed = CausalAttention(document.expand(rows, t)).masked
        tell_attention(f"depth {depth}, packed documents", packed, q, k, v)


def inputs(config, rows, t, u, dtype, device):
    """-> q (rows, H, t, D), k and v (rows, K, u + t, D), with a gradient."""
    tensors = []
    for heads, length in ((config.n_head, t), (config.n_kv_head, u + t), (config.n_kv_head, u + t)):
        shape = (rows, heads, length, config.head_dim)
        tensors.append(torch.randn(shape, dtype=dtype, device=device).requires_grad_())
    return tensors


def tell_attention(name, attention, q, k, v, gradient=True):
    """Which backend takes these inputs, how long it takes at first and afterwards."""
    work = partial(attend, attention, q, k, v, gradient)
    try:
        first, _ = bench.timed(work, q.device)
        seconds = median_seconds(work, q.device, 5)
        kernels = kernels_of(work)
    except RuntimeError as error:
        tell("where", attention=name, backend=None, error=str(error)[:200])
        return
    backend, longest = backend_of(kernels)
    tell("where", attention=name, backend=backend, first_s=first, seconds=seconds, kernel=longest)


def attend(attention, q, k, v, gradient):
    """Attention forward, and backward where there is a gradient."""
    with torch.set_grad_enabled(gradient):
        y = attention(q, k, v)
        if gradient:
            y.sum().backward()


def backend_of(kernels):
    """(name, microseconds) pairs -> (the backend, the name of the kernel that took longest)."""
    if not kernels:
        return None, None
    longest, _ = max(kernels, key=duration)
    names = " ".join(name for name, _ in kernels).lower()
    for word, backend in BACKENDS.items():
        if word in names:
            return backend, longest[:100]
    return "other", longest[:100]


def duration(kernel):
    _, microseconds = kernel
    return microseconds


# ---- exact ---------------------------------------------------------------------------------------


def exact():
    """In fp32: completions of the engine, and the gradient of a step, on the GPU and on the CPU."""
    device = dist.setup("auto", exact=True)
    gpu = exact_model(device)
    cpu = copy.deepcopy(gpu).to("cpu")

    # Fewer row slots than rows: some have to wait, and come in later.
    rng = random.Random(1)
    prompts = [random_ids(rng, rng.randint(3, 60)) for _ in range(8)]
    new_tokens = 16 if TINY else 64
    engines = Engine(gpu, 48), Engine(cpu, 48)
    for call in range(3):
        completions = []
        for engine in engines:
            completions.append(engine.generate(prompts, 8, new_tokens, stop_ids=[3, 4]))
        on_gpu, on_cpu = completions
        equal, total, gap = compare(on_gpu, on_cpu)
        graphs = sum(len(batch.graphs) for batch in engines[0].batches.values())
        tell("exact", call=call, equal=equal, of=total, gap=gap, graphs=graphs)

    gradients = []
    advantages = torch.linspace(-1, 1, 8, dtype=torch.float64).repeat(4, 1)  # (P, G)
    for model in (gpu, cpu):
        bench.learn(model, random_rollouts(4, 8, 60, new_tokens), advantages, 16384)
        flat = [p.grad.flatten().double().cpu() for p in model.parameters()]
        gradients.append(torch.cat(flat))
    of_gpu, of_cpu = gradients
    tell("exact", gradient=float((of_gpu - of_cpu).norm() / of_cpu.norm()), on_gpu=ON_GPU)


def compare(groups, other_groups):
    """-> equal completions, all completions, the largest gap of the equal ones' log-probs."""
    equal, total, gaps = 0, 0, [0.0]
    for group, other_group in zip(groups, other_groups, strict=True):
        for a, b in zip(group, other_group, strict=True):
            total += 1
            if a.ids == b.ids:
                equal += 1
                gaps += [abs(x - y) for x, y in zip(a.logprobs, b.logprobs)]
    return equal, total, max(gaps)
