#!/usr/bin/env python3
"""What a first run on a GPU should tell, twelve minutes in all: python runs/gpu_check.py [part ...]

Run from the project's root. Each part is a process of its own with a time limit, so a failure costs only itself; a line a
result, and all of them as JSON lines in gpu_check.jsonl (in the folder $OUT, where it is set). --tiny: small sizes, on a CPU too.

    where     torch, card, which SDPA backends take the learner's shapes
    exact     fp32: engine on the GPU (captured graphs) against the CPU, and one step's gradient
    decode    tokens/s at depth 12 and 20, 256 and 1,024 rows, against bytes over bandwidth
    learner   seconds of a step's forward and backward at depth 12 and 20, with cuDNN's SDPA on and off; MFU
    train     the quickstart's three stages and evaluations on the GPU
    profile   kernels and time by name of a decode step and a learner pass at depth 20
"""

import json
import os
import subprocess
import sys
import tempfile
import time

LIMITS = {"where": 40, "exact": 90, "decode": 150, "learner": 150, "train": 200, "profile": 90}
TINY = "--tiny" in sys.argv
sys.path.insert(0, os.getcwd())


def tell(part, **values):
    line = json.dumps({"part": part, **values})
    print(line, flush=True)
    with open(os.path.join(os.environ.get("OUT", "."), "gpu_check.jsonl"), "a") as f:
        f.write(line + "\n")


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sync():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work, tries=3):
    work(), sync()
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        work(), sync()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def build(depth, vocab=32768, dtype=None, where=None):
    import torch

    from nanorl.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab)).init_weights(torch.Generator().manual_seed(0))
    for p in model.parameters():  # what starts at zero too
        if p.dim() == 2:
            p.data.normal_(0, 0.02)
    model = model.to(where or device())
    model.compute_dtype = dtype or (torch.bfloat16 if device().type == "cuda" else torch.float32)
    return model


def rates():
    import torch

    n = 512 if TINY else 8192
    a = torch.randn(n, n, device=device(), dtype=torch.bfloat16)
    flops = 2 * n**3 / timed(lambda: a @ a, 10)
    x = torch.empty((1 << 20) if TINY else (1 << 29), device=device())
    y = torch.empty_like(x)
    return flops, 8 * x.numel() / timed(lambda: y.copy_(x), 10)


def where():
    import torch

    values = dict(torch=torch.__version__, device=str(device()))
    if torch.cuda.is_available():
        values.update(
            card=torch.cuda.get_device_name(),
            memory_gb=round(torch.cuda.get_device_properties(0).total_memory / 1e9),
        )
    flops, bandwidth = rates()
    tell("where", **values, bf16_tflops=flops / 1e12, copy_tb_s=bandwidth / 1e12)
    if torch.cuda.is_available():
        import torch.nn.functional as F

        q = torch.randn(16, 10, 384, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, bias = (
            torch.randn(16, 5, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            torch.zeros(16, 1, 384, 512, device="cuda", dtype=torch.bfloat16),
        )
        for name, kv, gqa, mask in (
            ("mask+gqa", k, True, bias),
            ("mask, repeated kv", k.repeat_interleave(2, 1), False, bias),
            ("causal+gqa", k[:, :, :384], True, None),
        ):
            try:
                choice = int(
                    torch._fused_sdp_choice(q, kv, kv, mask, 0.0, mask is None, enable_gqa=gqa)
                )
                begun = time.perf_counter()
                F.scaled_dot_product_attention(
                    q, kv, kv, mask, is_causal=mask is None, enable_gqa=gqa
                ).sum().backward()
                sync()
                first = time.perf_counter() - begun
                tell(
                    "where",
                    sdpa=name,
                    backend=choice,
                    first_s=first,
                    then_s=timed(
                        lambda: (
                            F.scaled_dot_product_attention(
                                q, kv, kv, mask, is_causal=mask is None, enable_gqa=gqa
                            )
                            .sum()
                            .backward()
                        ),
                        5,
                    ),
                )
            except Exception as error:
                tell("where", sdpa=name, error=str(error)[:200])


def rollouts(model, P, G, prompt_tokens, new_tokens, ragged=True):
    import random

    from nanorl.rollout import Rollout
    from nanorl.sampling import Completion

    rng = random.Random(0)
    some = []
    for _ in range(P):
        n = rng.randint(prompt_tokens // 2, prompt_tokens) if ragged else prompt_tokens
        lengths = [
            rng.randint(new_tokens // 4, new_tokens) if ragged else new_tokens for _ in range(G)
        ]
        completions = [
            Completion([rng.randrange(100) for _ in range(t)], [-1.0] * t, True) for t in lengths
        ]
        some.append(
            Rollout(None, [rng.randrange(100) for _ in range(n)], completions, [""] * G, None, None)
        )
    return some


def learn(model, some, G, tokens=16384):
    """One step's forward and backward, as train_rl.py has it."""
    import torch

    from nanorl import grpo, learner
    from nanorl.batch import pack
    from nanorl.report.cost import forward_flops
    from nanorl.rollout import length_table

    lengths = length_table(some, G)  # (P, G)
    a = torch.linspace(-1, 1, G, dtype=torch.float64).repeat(len(some), 1)  # (P, G)
    weights = grpo.token_weights(lengths, "token", 256)  # (P, G)
    needed = 0
    for batch in pack(some, a, weights, tokens, model.cos.device):
        outputs = learner.forward(model, batch, 1.0, with_entropy=True)
        gain = batch.advantages * outputs.logprobs  # (S,)
        grpo.policy_loss(gain, batch.token_weights, grpo.denominator(lengths)).backward()
        needed += 3 * forward_flops(model.config, batch.ids.numel(), batch.visible_pairs, len(gain))
    return needed


def exact():
    import copy
    import random

    import torch

    from nanorl.engine import Engine

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    gpu = build(1 if TINY else 4, 512, torch.float32)
    cpu = copy.deepcopy(gpu).to("cpu")
    cpu.compute_dtype = torch.float32
    rng = random.Random(1)
    prompts = [[rng.randrange(500) for _ in range(rng.randint(3, 60))] for _ in range(8)]
    kw = dict(
        samples_per_prompt=8,
        max_new_tokens=64,
        temperature=1.0,
        stop_ids=[3, 4],
        keys=list(range(8)),
    )
    engine = Engine(gpu, 48)  # fewer places than rows: waiting ones come in
    for call in range(3):
        a, b = engine.generate(prompts, **kw), Engine(cpu, 48).generate(prompts, **kw)
        pairs = [(x, y) for g, h in zip(a, b) for x, y in zip(g, h)]
        same = [(x, y) for x, y in pairs if x.ids == y.ids]
        gap = max(
            (abs(u - v) for x, y in same for u, v in zip(x.logprobs, y.logprobs)), default=None
        )
        tell("exact", call=call, equal=f"{len(same)} of {len(pairs)}", gap=gap)
    grads = []
    for model in (gpu, cpu):
        learn(model, rollouts(model, 4, 8, 60, 64), 8)
        grads.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()]))
    tell("exact", gradient=float((grads[0] - grads[1]).norm() / grads[1].norm()))


def decode():
    import torch

    from nanorl.engine import Engine
    from nanorl.report.cost import bytes_decoded

    _, bandwidth = rates()
    for depth in (2,) if TINY else (12, 20):
        model = build(depth)
        engine, c = Engine(model), model.config
        for P in (2,) if TINY else (16, 64):
            prompts = [[(i * 7 + j) % 1000 for j in range(128)] for i in range(P)]
            work = lambda: engine.generate(
                prompts,
                samples_per_prompt=16,
                max_new_tokens=16 if TINY else 256,
                stop_ids=[],
                keys=list(range(P)),
            )
            begun = time.perf_counter()
            work(), sync()
            first = time.perf_counter() - begun
            seconds, rows = timed(work, 2), P * 16
            floor = bytes_decoded(engine) / bandwidth
            tell(
                "decode",
                depth=depth,
                rows=rows,
                first_s=first,
                seconds=seconds,
                tok_s=engine.stats["new_tokens"] / seconds,
                ms_step=1e3 * seconds / len(engine.stats["live"]),
                of_floor=floor / seconds,
                peak_gb=torch.cuda.max_memory_allocated() / 1e9
                if torch.cuda.is_available()
                else None,
            )
        del engine, model


def learner():
    import torch

    flops, _ = rates()
    for depth in (2,) if TINY else (12, 20):
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            model = build(depth)
            some = rollouts(model, 2 if TINY else 16, 16, 128, 32 if TINY else 256)
            begun = time.perf_counter()
            needed = learn(model, some, 16)
            sync()
            first = time.perf_counter() - begun
            seconds = timed(lambda: learn(model, some, 16), 2)
            tell(
                "learner",
                depth=depth,
                cudnn=cudnn,
                first_s=first,
                seconds=seconds,
                mfu=needed / seconds / flops,
                tokens=sum(len(c.ids) for r in some for c in r.completions),
                peak_gb=torch.cuda.max_memory_allocated() / 1e9
                if torch.cuda.is_available()
                else None,
            )
            del model


def train():
    os.environ["NANORL_OUT"] = os.path.join(tempfile.mkdtemp(), "out")
    name = "run_name" if "\nrun_name = " in open("train_rl.py").read() else "run"
    common = [f"--{name}=q", "--depth=3", "--task=sum3", "--seed=0"]
    small = ["--batch_tokens=2048", "--seq_len=128", "--log_every=50"]
    base, sft, rl = (3, 3, 2) if TINY else (150, 300, 40)
    few = (
        ["--depth=1", "--max_new_tokens=8", "--eval_problems=10", "--probe_prompts=2"]
        if TINY
        else []
    )
    for script, *args in (
        ("train_base.py", *common, "--documents=12000", f"--steps={base}", *small, *few[:1]),
        ("train_sft.py", *common, f"--steps={sft}", *small, *few[:1]),
        ("train_rl.py", *common, f"--steps={rl}", "--eval_every=20", *few),
    ):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        tell(
            "train",
            script=script,
            rc=done.returncode,
            seconds=time.perf_counter() - begun,
            last=[line[:220] for line in lines[-4 if done.returncode == 0 else -14 :]],
        )
        if done.returncode:
            return


def profile():
    import torch

    from nanorl.engine import Engine

    model = build(2 if TINY else 20)
    engine = Engine(model)
    prompts = [[(i + j) % 1000 for j in range(128)] for i in range(16)]
    go = lambda: engine.generate(
        prompts,
        samples_per_prompt=16,
        max_new_tokens=8 if TINY else 64,
        stop_ids=[],
        keys=list(range(16)),
    )
    go()
    some = rollouts(model, 4, 16, 128, 64 if TINY else 256)
    learn(model, some, 16)
    kinds = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    )
    for name, work in (("decode", go), ("learner", lambda: learn(model, some, 16))):
        with torch.profiler.profile(activities=kinds) as p:
            work(), sync()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(p.key_averages().table(sort_by=by, row_limit=22, max_name_column_width=60)[:6000])


if __name__ == "__main__":
    wanted = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(wanted) == 1:
        globals()[wanted[0]]()
    else:
        for part in wanted or LIMITS:
            begun = time.perf_counter()
            try:
                code = subprocess.run(
                    [
                        sys.executable,
                        os.path.abspath(__file__),
                        part,
                        *(["--tiny"] if TINY else []),
                    ],
                    timeout=LIMITS[part],
                ).returncode
            except subprocess.TimeoutExpired:
                code = "time limit"
            print(f"== {part}: {code}, {time.perf_counter() - begun:.0f} s", flush=True)
