"""Minutes, not seconds: `bash runs/test.sh -m slow`."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from scripts import RL, assert_same_run, call, free_port

pytestmark = pytest.mark.slow


def kill_tree(pid):
    """SIGKILL to a process and its children: torchrun's workers lead sessions of their own and would outlive it."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split()
    for each in [pid, *map(int, children)]:
        try:
            os.kill(each, 9)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("ranks,kills", [(1, 20), (2, 6)])
def test_killed_at_random_moments_and_resumed_equals_the_uninterrupted_run(out, ranks, kills):
    """kill -9 at random moments, inside saves too: a step with its save takes some 30 ms, each kill comes up to 60 ms after
    a step. With two ranks the uninterrupted run has two as well: sums over ranks differ in the last bits from those of one."""
    launch = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
            "--",
        ]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    steps = 5 * kills
    arguments = ["train_rl.py", *RL, f"--model={out / 'a' / 'sft'}", f"--steps={steps}"]
    start = lambda run: subprocess.Popen(
        [*launch, *arguments, f"--run_name={run}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    whole, killed = f"whole{ranks}", f"killed{ranks}"
    assert start(whole).wait(600) == 0
    metrics = out / killed / "rl" / "metrics.jsonl"
    rows_there = lambda: metrics.read_text().count("\n") if metrics.exists() else 0
    rng, interrupted = random.Random(ranks), 0
    for _ in range(kills):
        goal = rows_there() + rng.randint(1, 2)
        process, deadline = start(killed), time.time() + 120
        while process.poll() is None and rows_there() < goal and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(0.06 * rng.random())
        interrupted += process.poll() is None
        kill_tree(process.pid)
        process.wait()
    assert interrupted >= 0.8 * kills
    assert start(killed).wait(600) == 0
    assert_same_run(out / whole / "rl", out / killed / "rl", f"step_{steps:06d}")


def test_quickstart_shows_what_rl_is_for(tmp_path):
    """The README's command, and its promise: RL at least 97%, 40 points over SFT, intervals apart, longer answers."""
    environment = {
        **os.environ,
        "NANORL_OUT": str(tmp_path),
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", sys.prefix),
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    }
    result = subprocess.run(
        ["bash", "runs/quickstart.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert list(summary) == ["base", "sft", "rl"]
    assert all(
        {"accuracy", "low", "high", "n", "length", "seconds"} <= s.keys() for s in summary.values()
    )
    sft, rl = summary["sft"], summary["rl"]
    assert rl["n"] >= 1000 and rl["accuracy"] >= 0.97 and rl["accuracy"] >= sft["accuracy"] + 0.4
    assert rl["low"] > sft["high"] and rl["length"] > sft["length"]
    assert all(s["peak_gb"] < 3 for s in summary.values())
    assert "The same problems before and after RL" in result.stdout


def test_gsm8k_end_to_end(real_data, tmp_path, monkeypatch, capfd):
    """The real files through every stage; a model this small is told that it gets little signal there."""
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    monkeypatch.setenv("NANORL_DATA", real_data)
    common = ["--run_name=g", "--depth=2", "--task=gsm8k", "--device=cpu"]
    assert (
        call(
            "train_base.py",
            *common,
            "--vocab_size=1024",
            "--documents=2000",
            "--steps=30",
            "--batch_tokens=2048",
            "--seq_len=256",
        )
        is None
    )
    assert (
        call("train_sft.py", *common, "--steps=20", "--batch_tokens=4096", "--seq_len=1024") is None
    )
    assert (
        call(
            "train_rl.py",
            *common,
            "--steps=2",
            "--prompts_per_step=4",
            "--samples_per_prompt=8",
            "--max_new_tokens=48",
            "--eval_problems=50",
            "--probe_prompts=8",
        )
        is None
    )
    said = capfd.readouterr().out
    assert "WARNING" in said and "without signal" in said
    assert (
        call(
            "eval.py",
            f"--model={tmp_path / 'g' / 'rl'}",
            "--task=gsm8k",
            "--problems=0",
            "--samples=0",
            "--max_new_tokens=48",
        )
        is None
    )
    assert "473 problems" in capfd.readouterr().out


def test_rl_or_more_sft_in_one_command(tmp_path):
    """The recipe at its smallest, two seeds: equal FLOPs, benchmarks, a report with a verdict and a plot; a second call finds all done."""
    from test_choice import write_files

    write_files(tmp_path)
    environment = {
        **os.environ,
        "NANORL_OUT": str(tmp_path / "out"),
        "NANORL_DATA": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", sys.prefix),
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    }
    rows = "--batch_tokens=512 --seq_len=64"
    command = [
        "bash",
        "runs/rl_vs_sft.sh",
        "--depth=1",
        "--task=0-20",
        "--seeds=0,1",
        "--name=tiny run",
        "--problems=40",
        "--bench=4",
        "--new_tokens=12",
        f"--sft=--steps=40 {rows}",
        f"--base=--documents=300 --vocab_size=300 --steps=20 --sample_tokens=0 {rows}",
        "--rl=--steps=5 --eval_problems=20 --probe_prompts=4",
    ]
    folder, made = tmp_path / "out" / "versus" / "tiny_run", []
    for _ in range(2):
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        made.append(json.loads((folder / "report.json").read_text()))
    assert (
        made[0] == made[1] and result.stdout.count("greedy        ") == 0
    )  # nothing was evaluated again
    assert made[0]["verdict"] in result.stdout and (folder / "accuracy.png").stat().st_size > 10_000
    assert all(
        abs(seed["B"]["train"] / seed["A"]["train"] - 1) < 0.01
        for seed in made[0]["flops"].values()
    ) and list(made[0]["flops"]) == ["0", "1"]
    assert {"mmlu likelihood", "arc_easy likelihood", "spelling greedy"} <= set(
        made[0]["benchmarks"]
    )
    text = (folder / "report.md").read_text()
    assert (
        "| **mean** |" in text
        and "(accuracy.png)" in text
        and all(
            words in text
            for words in (
                "## The task",
                "## What both arms took",
                "## The six benchmarks",
                "## To read",
            )
        )
    )
    mistake = subprocess.run(
        ["bash", "runs/rl_vs_sft.sh", "--taks=sum3"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert mistake.returncode == 1 and mistake.stderr.startswith("error: --taks=sum3")
