"""The scripts as tests start them: in this process, in one of their own, on several ranks.

What they leave is read back without the fields of the clock and the machine."""

import contextlib
import gzip
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SMALL = ["--depth=1", "--task=0-20", "--device=cpu"]
TOY = "--task=" + os.path.join(ROOT, "tests", "toy_task.py") + ":Toy"
SPLITS = TOY.replace("Toy", "Splits")
# A step of RL that takes 30 ms: 4 problems x 4 samples, in fp64.
RL = [
    *SMALL,
    TOY,
    "--prompts_per_step=4",
    "--samples_per_prompt=4",
    "--max_new_tokens=12",
    "--eval_problems=10",
    "--probe_prompts=4",
    "--steps=6",
    "--device_rows=8",
    "--eval_every=2",
    "--save_every=1",
    "--lr=1e-3",
    "--dtype=fp64",
]
ROWS = ["--batch_tokens=512", "--seq_len=64"]
BASE = [*SMALL, *ROWS, "--documents=300", "--vocab_size=300", "--dtype=fp64"]
SFT = [*SMALL, *ROWS, "--examples=400", "--dtype=fp64"]

# Fields of the clock and the machine.
MEASURED = ("time", "tok_per_s/", "time/", "memory/", "gpu/", "mfu", "mbu")
# Each rank packs and decodes its own rows, so padding differs, and with it what is computed.
PARTS = ("prefill", "decode", "reference", "forward", "backward", "recompute")
APART = {"padding", "occupancy", "flops_total", "flops_eval_total", *(f"flops/{p}" for p in PARTS)}


# ---- one process ---------------------------------------------------------------------------------


def call(script, *arguments):
    """Run a script in this process; returns its exit message or code (None: it returned)."""
    argv, sys.argv = sys.argv, [script, *arguments]
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
            signal.signal(number, handler)


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for(condition, process, seconds=120):
    """Until the condition holds; fails when the process ends first or the time is over."""
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert condition(), process.poll()


def start_and_kill(script, arguments, directory, steps):
    """kill -9 once the checkpoint of step `steps` is whole."""
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    marker = directory / f"step_{steps:06d}" / "DONE"
    try:
        wait_for(marker.exists, process)
    finally:
        process.kill()
        process.wait()


# ---- several ranks -------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def ranks(command, n=2, **more):
    """Start `command` on n ranks, without an agent -> their processes; none outlives the block."""
    port = str(free_port())
    world = dict(
        WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**world, RANK=str(rank), LOCAL_RANK=str(rank), **more),
        )
        for rank in range(n)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish_ranks(processes, seconds=240):
    """Wait for all -> what each said on stdout; fails unless all end with status 0."""
    said = [process.communicate(timeout=seconds) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


# Several scripts one after the other in one process group: starting Python is most of the time.
ONE_AFTER_ANOTHER = """
import importlib.util, json, sys
import torch.distributed

for script, *sys.argv[1:] in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def call_on_ranks(*calls, n=2, **more):
    """[script, *arguments] of each call, on n ranks -> what each rank said."""
    with ranks(["-c", ONE_AFTER_ANOTHER, json.dumps(calls)], n, **more) as processes:
        return finish_ranks(processes)


def torchrun(*arguments, n=2, options=(), **more):
    """Start train_rl.py under torchrun's agent; returns the agent's process."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    return subprocess.Popen(
        [*launch, f"--master_port={free_port()}", *options, "--", "train_rl.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
    )


def finish(process, code=0, seconds=240):
    """Wait, and return what was said."""
    said = process.communicate(timeout=seconds)[0]
    assert process.returncode == code, said
    return said


# ---- what a run leaves ---------------------------------------------------------------------------


def rows(directory):
    """metrics.jsonl, without the fields of the clock and the machine."""
    with open(directory / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in lines]


def records(path):
    """A file of rollouts, without the time."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in f]


def step_records(run, step):
    """The rollouts of a step of out/<run>/rl."""
    return records(run / "rl" / "rollouts" / f"step_{step:06d}.jsonl.gz")


def weights(directory, step):
    """{name: tensor} of a stage's checkpoint."""
    return load_file(directory / f"step_{step:06d}" / "model.safetensors")


def trainer_state(directory, step):
    return torch.load(directory / f"step_{step:06d}" / "trainer.pt", weights_only=True)


@torch.no_grad()
def movement(before, after):
    """{name: largest absolute change of a weight}, in fp64."""
    return {
        name: float((after[name].double() - old.double()).abs().max())
        for name, old in before.items()
    }


def assert_same_run(a, b, last):
    """Weights, optimizer, rows and rollouts are bitwise the same, fields of the clock apart."""
    assert rows(a) == rows(b)
    one, two = (load_file(d / last / "model.safetensors") for d in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    states = [torch.load(d / last / "trainer.pt", weights_only=True) for d in (a, b)]
    for state in states:
        state["settings"].pop("run_name")
        state["settings"].pop("resume")
        state.get("start", {}).pop("path", None)
    assert str(states[0]) == str(states[1])
    names = sorted(os.listdir(a / "rollouts")) if (a / "rollouts").exists() else []
    for name in names:
        assert records(a / "rollouts" / name) == records(b / "rollouts" / name)


def assert_rows_agree(one, two, apart=APART):
    """Two runs' rows are the same up to fp64 rounding, but for the fields in `apart`."""
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a.keys() - apart:
            assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-11), name
