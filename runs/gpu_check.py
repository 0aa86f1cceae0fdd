#!/usr/bin/env python3
"""What a first run on a GPU should tell, in twelve minutes: python runs/gpu_check.py [part ...]

Run it from the project's root. Each part is a process of its own with a time limit, so a failure
costs only itself. Each result is a line of JSON, and gpu_check.jsonl keeps them all (in the folder
$OUT, where it is set). --tiny: small sizes, on a CPU too.

    where     torch, card, which SDPA backends take the learner's shapes
    exact     fp32: engine on the GPU (captured graphs) against the CPU, and one step's gradient
    decode    tokens/s at depth 12 and 20, 256 and 1,024 rows, against bytes over bandwidth
    learner   seconds of a step's forward and backward at depth 12 and 20, with cuDNN's SDPA on
              and off; MFU
    train     the quickstart's three stages and evaluations on the GPU
    profile   kernels and time by name of a decode step and a learner pass at depth 20

The letters in the code are those of nanorl/gpt.py.
"""

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median_high

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.report.cost import bytes_decoded
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from nanorl.tools import bench

LIMITS = {"where": 40, "exact": 90, "decode": 150, "learner": 150, "train": 200, "profile": 90}
TINY = "--tiny" in sys.argv
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DEPTHS = (2,) if TINY else (12, 20)


def main():
    parts = dict(
        where=where,
        exact=exact,
        decode=decode,
        learner=learner,
        train=train,
        profile=profile,
    )
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(wanted) == 1:
        parts[wanted[0]]()
    else:
        for part in wanted or LIMITS:
            run_part(part)


def run_part(part):
    """One part, in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), part]
    if TINY:
        command.append("--tiny")
    begun = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=LIMITS[part]).returncode
    except subprocess.TimeoutExpired:
        code = "time limit"
    print(f"== {part}: {code}, {time.perf_counter() - begun:.0f} s", flush=True)


def tell(part, **values):
    """A result: a line on the console, and one in gpu_check.jsonl."""
    line = json.dumps({"part": part, **values})
    print(line, flush=True)
    with open(os.path.join(os.environ.get("OUT", "."), "gpu_check.jsonl"), "a") as f:
        f.write(line + "\n")


# ---- measuring -----------------------------------------------------------------------------------


def median_seconds(work, tries=3):
    """The median of some runs of work(), after one to warm up."""
    bench.timed(work, DEVICE)
    times = []
    for _ in range(tries):
        seconds, _ = bench.timed(work, DEVICE)
        times.append(seconds)
    return median_high(times)


def rates():
    """-> (FLOP/s of matrix products in bf16, bytes/s of copying)."""
    n = 512 if TINY else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    flop_rate = 2 * n**3 / median_seconds(lambda: a @ a, 10)
    x = torch.empty((1 << 20) if TINY else (1 << 29), device=DEVICE)
    y = torch.empty_like(x)
    copy_rate = 8 * x.numel() / median_seconds(lambda: y.copy_(x), 10)
    return flop_rate, copy_rate


def peak_gb():
    return torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else None


# ---- what is measured ----------------------------------------------------------------------------


def build(depth, vocabulary=32768, dtype=None):
    """A random model. dtype: of its activations; by default bf16 on a GPU, else fp32."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(depth, vocabulary)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    # Some weights start at zero. They are random too here, so that every layer counts.
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.02)
    model = model.to(DEVICE)
    default = torch.bfloat16 if ON_GPU else torch.float32
    model.compute_dtype = dtype or default
    return model


def sampling(engine, prompts, new_tokens):
    """A call that samples 16 completions of each prompt. None of them stops early."""
    return partial(
        engine.generate,
        prompts,
        samples_per_prompt=16,
        max_new_tokens=new_tokens,
        stop_ids=[],
        keys=list(range(len(prompts))),
    )


def random_rollouts(P, G, prompt_tokens, new_tokens):
    """P Rollouts of G random completions. Prompts and completions have at most so many tokens."""
    rng = random.Random(0)
    rollouts = []
    for _ in range(P):
        prompt_length = rng.randint(prompt_tokens // 2, prompt_tokens)
        lengths = [rng.randint(new_tokens // 4, new_tokens) for _ in range(G)]
        completions = []
        for length in lengths:
            ids = random_ids(rng, length, below=100)
            completions.append(Completion(ids, [-1.0] * length, True))
        prompt = random_ids(rng, prompt_length, below=100)
        rollouts.append(Rollout(None, prompt, completions, [""] * G, None, None))
    return rollouts


def random_ids(rng, n, below):
    return [rng.randrange(below) for _ in range(n)]


def learn(model, rollouts, G):
    """One step's forward and backward, as train_rl.py has it -> the FLOPs that it needed."""
    advantages = torch.linspace(-1, 1, G, dtype=torch.float64).repeat(len(rollouts), 1)  # (P, G)
    return bench.learn(model, rollouts, advantages, token_budget=16384).flops


# ---- where ---------------------------------------------------------------------------------------


def where():
    values = dict(torch=torch.__version__, device=str(DEVICE))
    if ON_GPU:
        memory = torch.cuda.get_device_properties(0).total_memory
        values.update(card=torch.cuda.get_device_name(), memory_gb=round(memory / 1e9))
    flop_rate, copy_rate = rates()
    tell("where", **values, bf16_tflops=flop_rate / 1e12, copy_tb_s=copy_rate / 1e12)
    if not ON_GPU:
        return

    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    q = torch.randn(16, 10, 384, 128, **bf16, requires_grad=True)  # (B, H, T, D)
    k = torch.randn(16, 5, 512, 128, **bf16, requires_grad=True)  # (B, K, T, D)
    bias = torch.zeros(16, 1, 384, 512, **bf16)
    tell_sdpa("mask+gqa", q, k, bias, gqa=True)
    tell_sdpa("mask, repeated kv", q, k.repeat_interleave(2, 1), bias, gqa=False)
    tell_sdpa("causal+gqa", q, k[:, :, :384], None, gqa=True)


def tell_sdpa(name, q, kv, mask, gqa):
    """Which backend takes these shapes, and how long it takes at first and afterwards."""
    causal = mask is None
    work = partial(sdpa, q, kv, mask, causal, gqa)
    try:
        choice = torch._fused_sdp_choice(q, kv, kv, mask, 0.0, causal, enable_gqa=gqa)
        first, _ = bench.timed(work, DEVICE)
        then = median_seconds(work, 5)
        tell("where", sdpa=name, backend=int(choice), first_s=first, then_s=then)
    except Exception as error:
        tell("where", sdpa=name, error=str(error)[:200])


def sdpa(q, kv, mask, causal, gqa):
    """Attention, forward and backward."""
    y = F.scaled_dot_product_attention(q, kv, kv, mask, is_causal=causal, enable_gqa=gqa)
    y.sum().backward()


# ---- exact ---------------------------------------------------------------------------------------


def exact():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    gpu = build(1 if TINY else 4, 512, torch.float32)
    cpu = copy.deepcopy(gpu).to("cpu")
    cpu.compute_dtype = torch.float32

    rng = random.Random(1)
    prompts = [random_ids(rng, rng.randint(3, 60), below=500) for _ in range(8)]
    settings = dict(
        samples_per_prompt=8,
        max_new_tokens=64,
        temperature=1.0,
        stop_ids=[3, 4],
        keys=list(range(8)),
    )
    # Fewer row slots than rows: some have to wait, and come in later.
    engine = Engine(gpu, 48)
    for call in range(3):
        on_gpu = engine.generate(prompts, **settings)
        on_cpu = Engine(cpu, 48).generate(prompts, **settings)
        equal, total, gap = compare(on_gpu, on_cpu)
        tell("exact", call=call, equal=f"{equal} of {total}", gap=gap)

    gradients = []
    for model in (gpu, cpu):
        learn(model, random_rollouts(4, 8, 60, 64), 8)
        flat = [p.grad.flatten().double().cpu() for p in model.parameters()]
        gradients.append(torch.cat(flat))
    of_gpu, of_cpu = gradients
    tell("exact", gradient=float((of_gpu - of_cpu).norm() / of_cpu.norm()))


def compare(groups, other_groups):
    """-> equal completions, all completions, the largest gap of the equal ones' log-probs."""
    equal, total, gaps = 0, 0, []
    for group, other_group in zip(groups, other_groups):
        for a, b in zip(group, other_group):
            total += 1
            if a.ids == b.ids:
                equal += 1
                gaps += [abs(x - y) for x, y in zip(a.logprobs, b.logprobs)]
    return equal, total, max(gaps, default=None)


# ---- decode, learner -----------------------------------------------------------------------------


def decode():
    _, copy_rate = rates()
    for depth in DEPTHS:
        decode_at(depth, copy_rate)


def decode_at(depth, copy_rate):
    engine = Engine(build(depth))
    for P in (2,) if TINY else (16, 64):
        prompts = [[(i * 7 + j) % 1000 for j in range(128)] for i in range(P)]
        work = sampling(engine, prompts, 16 if TINY else 256)
        first, _ = bench.timed(work, DEVICE)
        seconds = median_seconds(work, 2)
        floor = bytes_decoded(engine) / copy_rate
        tell(
            "decode",
            depth=depth,
            rows=P * 16,
            first_s=first,
            seconds=seconds,
            tok_s=engine.stats["new_tokens"] / seconds,
            ms_step=1e3 * seconds / len(engine.stats["live"]),
            of_floor=floor / seconds,
            peak_gb=peak_gb(),
        )


def learner():
    flop_rate, _ = rates()
    for depth in DEPTHS:
        for cudnn in (True, False):
            learner_at(depth, cudnn, flop_rate)


def learner_at(depth, cudnn, flop_rate):
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    model = build(depth)
    rollouts = random_rollouts(2 if TINY else 16, 16, 128, 32 if TINY else 256)
    work = partial(learn, model, rollouts, 16)
    first, needed = bench.timed(work, DEVICE)
    seconds = median_seconds(work, 2)
    lengths = [len(completion.ids) for rollout in rollouts for completion in rollout.completions]
    tell(
        "learner",
        depth=depth,
        cudnn=cudnn,
        first_s=first,
        seconds=seconds,
        mfu=needed / seconds / flop_rate,
        tokens=sum(lengths),
        peak_gb=peak_gb(),
    )


# ---- train ---------------------------------------------------------------------------------------


def train():
    os.environ["NANORL_OUT"] = os.path.join(tempfile.mkdtemp(), "out")
    common = ["--run_name=q", "--depth=3", "--task=sum3", "--seed=0"]
    text = [*common, "--batch_tokens=2048", "--seq_len=128", "--log_every=50"]
    base = ["train_base.py", *text, "--documents=12000"]
    sft = ["train_sft.py", *text]
    rl = ["train_rl.py", *common, "--eval_every=20"]
    if TINY:
        base += ["--steps=3", "--depth=1"]
        sft += ["--steps=3", "--depth=1"]
        rl += ["--steps=2", "--depth=1", "--max_new_tokens=8"]
        rl += ["--eval_problems=10", "--probe_prompts=2"]
    else:
        base += ["--steps=150"]
        sft += ["--steps=300"]
        rl += ["--steps=40"]
    for command in (base, sft, rl):
        if not run_script(*command):
            return


def run_script(script, *arguments):
    """Run a stage, and tell its last lines -> whether it ended well."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    ended_well = done.returncode == 0
    lines = (done.stdout + done.stderr).strip().splitlines()
    last = [line[:220] for line in lines[-4 if ended_well else -14 :]]
    tell("train", script=script, rc=done.returncode, seconds=seconds, last=last)
    return ended_well


# ---- profile -------------------------------------------------------------------------------------


def profile():
    model = build(2 if TINY else 20)
    prompts = [[(i + j) % 1000 for j in range(128)] for i in range(16)]
    sample = sampling(Engine(model), prompts, 8 if TINY else 64)
    rollouts = random_rollouts(4, 16, 128, 64 if TINY else 256)
    update = partial(learn, model, rollouts, 16)

    # Once without the profiler: what happens only at first is not of interest.
    sample()
    update()
    print_profile(sample)
    print_profile(update)


def print_profile(work):
    """The 22 kernels that take the most time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as found:
        bench.timed(work, DEVICE)
    table = found.key_averages().table(sort_by=order, row_limit=22, max_name_column_width=60)
    print(table[:6000])


if __name__ == "__main__":
    main()
