"""The CUDA path on a machine without a GPU, by the simulated device in tests/fakecuda."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from scripts import RL, ROOT, call, environment, rows

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and not torch.version.cuda,
    reason="the simulated CUDA device needs g++",
)


def on_fake_gpu(*arguments):
    """A script of tests/fakecuda in a process of its own, since it must come before torch."""
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("dtype, bound", [("fp64", 1e-12), ("fp32", 1e-4)])
def test_the_engine_gives_the_cpus_completions(dtype, bound):
    """From captured graphs, over calls with other prompts, weights and settings."""
    said = on_fake_gpu("tests/fakecuda/check_engine.py", dtype)
    *calls, last = [json.loads(line) for line in said.splitlines()]
    assert len(calls) == 6 and all(call["equal"] == call["of"] for call in calls)
    assert all(call["gap"] < bound and call["steps"] > 20 for call in calls)
    assert calls[0]["captures"] > 5 > 2 > calls[1]["captures"]  # the same settings: replayed
    assert 300 < last["kernels"] < 350


def test_a_script_runs_on_the_fake_gpu_as_on_the_cpu(out):
    """One step of RL: the gradient of the CPU's, and a count of the host's waits."""
    few = [*RL, f"--model={out / 'a' / 'sft'}", "--steps=1", "--eval_every=0"]
    assert call("train_rl.py", *few, "--run_name=cpu") is None
    said = on_fake_gpu(
        "tests/fakecuda/fake_run.py", "train_rl.py", *few, "--device=cuda", "--run_name=gpu"
    )
    assert "captures" in said and "syncs:" in said
    cpu, gpu = (rows(out / name / "rl")[1] for name in ("cpu", "gpu"))
    for name in ("reward", "completions/mean_length", "grad_norm", "entropy"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-9), name
