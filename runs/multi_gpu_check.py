#!/usr/bin/env python3
"""What a first run on 2 to 8 GPUs should tell, in six minutes: bash runs/multi_gpu_check.sh

    python runs/multi_gpu_check.py [part ...] [--tiny]

Run it from the project's root; it takes all GPUs there are. Each part has a time limit. --tiny: two
ranks on a CPU, small sizes.

    gradient    fp32: the gradient of fixed completions on all ranks and on one
    reduce      a whole step on all ranks, 256 rows each, and the all-reduce's share of it
    dead        a rank is killed in a run: how the others end, without torchrun and with it

The table at the end and multi_gpu_check.json are read as those of runs/gpu_check.py.
"""

import os
import socket
import sys
import time
from functools import partial

sys.path.insert(0, os.getcwd())
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch
from gpu_checks import table
from gpu_checks.common import (
    D12,
    D20,
    ON_GPU,
    TINY,
    exact_model,
    free_memory,
    options,
    random_rollouts,
    randomize,
    tell,
)
from gpu_checks.parts import results_file, run_all
from gpu_checks.table import Line
from gpu_checks.training import OUT, WORK, finish, launch, write_model

from nanorl import grpo
from nanorl.batch import pack
from nanorl.learner import forward
from nanorl.rollout import length_table
from nanorl.runtime import dist
from nanorl.tools import bench

LIMITS = dict(gradient=80, reduce=130, dead=150)
RANKS = torch.cuda.device_count() if ON_GPU else 2
PATIENCE = 60  # seconds in which the others should end after a rank has died


def main():
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if "RANK" in os.environ:
        on_a_rank(arguments[0])
        return
    if "GPU_CHECK_PART" in os.environ:
        dict(gradient=gradient, reduce=reduce, dead=dead)[os.environ["GPU_CHECK_PART"]]()
        return
    print(__doc__, flush=True)
    if RANKS < 2:
        raise SystemExit("error: this machine has 1 GPU, and the check needs 2: runs/gpu_check.sh")
    unknown = set(arguments) - LIMITS.keys()
    if unknown:
        raise SystemExit(f"error: {min(unknown)} is no part: give some of {', '.join(LIMITS)}")

    limits = {part: LIMITS[part] for part in arguments or LIMITS}
    file = results_file("multi_gpu_check")
    report = run_all(limits, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]], file)
    shown = table.figures(report, lines()) + table.troubles(report)
    print("", *shown, f"\nwrote {file}", sep="\n", flush=True)


def lines():
    """The lines of the table."""
    what = "fp32: gradient, relative difference"
    wanted = [Line(what, "gradient", "difference", form=".1e", most=1e-5)]
    for depth in (D20, D12):
        where = dict(depth=depth)
        for what, field, form in (
            ("ranks", "ranks", ".0f"),
            ("step, seconds", "seconds", ",.3g"),
            ("all-reduce, ms", "reduce_ms", ",.3g"),
            ("all-reduce, share of a step", "share", ".1%"),
            ("tokens/s, all ranks", "tok_s", ",.0f"),
        ):
            wanted.append(Line(f"d{depth} {what}", "reduce", field, where, form))
    for how in ("alone", "torchrun"):
        what = f"dead rank, {how}: seconds until all have ended"
        wanted.append(Line(what, "dead", "seconds", dict(how=how), ".1f", most=PATIENCE))
    return wanted


# ---- ranks ---------------------------------------------------------------------------------------


def torchrun(n, *command):
    """Start a command on n ranks under torchrun's agent -> the agent's process."""
    options_of_agent = [f"--nproc_per_node={n}", f"--master_port={free_port()}", "--"]
    return launch("-m", "torch.distributed.run", *options_of_agent, *command)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(n, part):
    """This file's `part` on n ranks."""
    tiny = ["--tiny"] if TINY else []
    finish(torchrun(n, os.path.abspath(__file__), part, *tiny))


def on_a_rank(part):
    """What each rank does in a part."""
    work = dict(gradient=save_gradient, reduce=measure_steps)[part]
    dist.run(work)


# ---- gradient ------------------------------------------------------------------------------------


def gradient():
    """The gradient of the same completions, by one rank and by all."""
    found = []
    for n in (1, RANKS):
        run_ranks(n, "gradient")
        found.append(torch.load(gradient_file(n), weights_only=True))
    one, all_ranks = found
    difference = (one - all_ranks).norm() / one.norm()
    tell("gradient", ranks=RANKS, difference=float(difference))


def gradient_file(n):
    return os.path.join(WORK, f"gradient-{n}.pt")


def save_gradient():
    """On each rank: its share of the completions, and the sum over ranks, as train_rl.py does."""
    device = dist.setup("auto", exact=True)
    model = exact_model(device)

    P, G = 16, 8
    advantages = torch.linspace(-1, 1, P * G, dtype=torch.float64).view(P, G)
    mine = dist.share(P)
    rollouts, advantages = random_rollouts(P, G, 60, 64)[mine], advantages[mine]
    lengths = length_table(rollouts, G)  # (P, G)
    N = dist.total(grpo.denominator(lengths))
    for batch in pack(rollouts, advantages, grpo.token_weights(lengths), 4096, device):
        outputs = forward(model, batch)
        gain = grpo.reinforce(outputs.logprobs, batch.advantages)  # (S,)
        grpo.policy_loss(gain, batch.token_weights, N).backward()

    params = list(model.parameters())
    dist.sum_gradients(params)
    if dist.is_main():
        flat = torch.cat([p.grad.flatten().double().cpu() for p in params])
        torch.save(flat, gradient_file(dist.world_size()))


# ---- reduce --------------------------------------------------------------------------------------


def reduce():
    """A whole step on all ranks."""
    run_ranks(RANKS, "reduce")


class RankStep(bench.WholeStep):
    """A whole step, with the sum of the gradients over ranks before the update."""

    reductions = ()

    def finish(self):
        # A rank that is early waits outside of what is measured.
        dist.barrier()
        reducing = partial(dist.sum_gradients, self.params)
        seconds, _ = bench.timed(reducing, self.device)
        self.reductions = (*self.reductions, seconds)
        super().finish()


def measure_steps():
    """On each rank."""
    dist.setup("auto")
    for depth in (D20, D12):
        free_memory()
        case = RankStep(options(depth))
        randomize(case.net)
        case.engine.refresh()
        for _ in range(2):
            case.work()
        times = []
        for _ in range(3):
            dist.barrier()
            seconds, tokens = bench.timed(case.work, case.device)
            times.append((dist.total(seconds, "max"), case.reductions[-1]))
        seconds, reduce_s = min(times)
        reduce_s = dist.total(reduce_s, "max")
        if dist.is_main():
            tell(
                "reduce",
                depth=depth,
                ranks=dist.world_size(),
                seconds=seconds,
                reduce_ms=1000 * reduce_s,
                share=reduce_s / seconds,
                tok_s=dist.world_size() * tokens / seconds,
            )
        del case


# ---- dead ----------------------------------------------------------------------------------------


def dead():
    """kill -9 to the last rank of a run, without an agent and under torchrun's."""
    model = os.path.join(WORK, "random")
    write_model(model, D12)
    for how in ("alone", "torchrun"):
        arguments = run_arguments(model, how)
        if how == "torchrun":
            processes = [torchrun(RANKS, "train_rl.py", *arguments)]
        else:
            processes = start_alone(arguments)
        wait_for_step(os.path.join(OUT, how, "rl", "metrics.jsonl"), processes[0])
        kill_last(processes, how)
        tell("dead", how=how, **end_of(processes))


def run_arguments(model, name):
    """A run that would go on for long."""
    task = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu_checks", "words_task.py")
    arguments = [f"--model={model}", f"--run_name={name}", f"--task={task}:Words"]
    arguments += ["--steps=100000", "--max_new_tokens=16", "--eval_every=0", "--save_every=0"]
    return [*arguments, "--eval_problems=4", "--probe_prompts=4", "--prompts_per_step=8"]


def start_alone(arguments):
    """train_rl.py on each rank, as a scheduler starts it -> the processes."""
    world = dict(WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    world.update(MASTER_PORT=str(free_port()))
    processes = []
    for rank in range(RANKS):
        world.update(RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(launch("train_rl.py", *arguments, **world))
    return processes


def wait_for_step(metrics, process):
    """Until a run has written the row of a step. Raises RuntimeError if it ends before."""
    while process.poll() is None:
        if os.path.exists(metrics):
            with open(metrics, encoding="utf-8") as f:
                if len(f.readlines()) >= 3:
                    return
        time.sleep(0.05)
    finish(process)
    raise RuntimeError("the run ended before its second step")


def kill_last(processes, how):
    """kill -9: the last rank's process, under torchrun one of the agent's children."""
    if how == "alone":
        processes.pop().kill()
        return
    agent = processes[0].pid
    with open(f"/proc/{agent}/task/{agent}/children", encoding="utf-8") as f:
        os.kill(int(f.read().split()[-1]), 9)


def end_of(processes):
    """Wait for the ranks that are left -> {seconds, codes, lines}: how they have ended.

    seconds: until the last, or PATIENCE, when those that are left are killed. lines: what each
    said of an error, or its last.
    """
    begun = time.perf_counter()
    while any(process.poll() is None for process in processes):
        if time.perf_counter() - begun > PATIENCE:
            break
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    codes, last_lines = [], []
    for process in processes:
        if process.poll() is None:
            process.kill()
        codes.append(process.wait())
        process.log.seek(0)
        said = process.log.read()
        print(said, flush=True)
        last_lines.append(last_line(said))
    return dict(seconds=seconds, codes=codes, lines=last_lines)


def last_line(said):
    """What a process said of an error, or its last line."""
    lines_said = said.strip().splitlines() or [""]
    errors = [line for line in lines_said if line.startswith("error: ")]
    return (errors or lines_said)[-1][:300]


if __name__ == "__main__":
    main()
