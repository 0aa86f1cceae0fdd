"""Minutes, not seconds: `bash runs/test.sh -m slow`."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from scripts import RL, assert_same_run, call, free_port, wait_for

pytestmark = pytest.mark.slow


def kill_tree(pid):
    """SIGKILL to a process and its children.

    torchrun's workers lead sessions of their own and would outlive it.
    """
    listing = ["ps", "-o", "pid=", "--ppid", str(pid)]
    children = subprocess.run(listing, capture_output=True, text=True).stdout.split()
    for each in [pid, *map(int, children)]:
        try:
            os.kill(each, 9)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("ranks,kills", [(1, 20), (2, 6)])
def test_killed_at_random_moments_and_resumed_equals_the_uninterrupted_run(out, ranks, kills):
    """kill -9 at random moments, inside saves too.

    A step with its save takes some 30 ms, and each kill comes up to 60 ms after a step. With two
    ranks the uninterrupted run has two as well: sums over ranks differ in the last bits from those
    of one.
    """
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        launch += [f"--master_port={free_port()}", "--"]
    steps = 5 * kills
    arguments = ["train_rl.py", *RL, f"--model={out / 'a' / 'sft'}", f"--steps={steps}"]

    def start(run):
        return subprocess.Popen(
            [*launch, *arguments, f"--run_name={run}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(2 // ranks)},
        )

    whole = f"whole{ranks}"
    killed = f"killed{ranks}"
    assert start(whole).wait(600) == 0

    metrics = out / killed / "rl" / "metrics.jsonl"

    def n_rows():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    rng = random.Random(ranks)
    interrupted = 0
    for _ in range(kills):
        # Wait for a step or two more, then for a moment that may lie inside a save.
        goal = n_rows() + rng.randint(1, 2)
        process = start(killed)
        deadline = time.time() + 120
        while process.poll() is None and n_rows() < goal and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(0.06 * rng.random())
        interrupted += process.poll() is None
        kill_tree(process.pid)
        process.wait()
    assert interrupted >= 0.8 * kills

    assert start(killed).wait(600) == 0
    assert_same_run(out / whole / "rl", out / killed / "rl", f"step_{steps:06d}")


def recipe_environment(**more):
    """This process's environment, for a recipe that uses the Python of these tests."""
    return {
        **os.environ,
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", sys.prefix),
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        **more,
    }


def test_quickstart_shows_what_rl_is_for(tmp_path):
    """The README's command, and its promise.

    RL solves at least 97%, 40 points more than SFT, with intervals apart and longer answers.
    """
    result = subprocess.run(
        ["bash", "runs/quickstart.sh"],
        cwd=ROOT,
        env=recipe_environment(NANORL_OUT=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert list(summary) == ["base", "sft", "rl"]
    fields = {"accuracy", "low", "high", "n", "length", "seconds"}
    assert all(fields <= stage.keys() for stage in summary.values())
    sft, rl = summary["sft"], summary["rl"]
    assert rl["n"] >= 1000
    assert rl["accuracy"] >= 0.97
    assert rl["accuracy"] >= sft["accuracy"] + 0.4
    assert rl["low"] > sft["high"]
    assert rl["length"] > sft["length"]
    assert all(stage["peak_gb"] < 3 for stage in summary.values())
    assert "The same problems before and after RL" in result.stdout


def test_gsm8k_end_to_end(real_data, tmp_path, monkeypatch, capfd):
    """The real files through every stage.

    A model this small is told that it gets little signal from them.
    """
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    monkeypatch.setenv("NANORL_DATA", real_data)
    common = ["--run_name=g", "--depth=2", "--task=gsm8k", "--device=cpu"]

    base = ["--vocab_size=1024", "--documents=2000", "--steps=30"]
    base += ["--batch_tokens=2048", "--seq_len=256"]
    assert call("train_base.py", *common, *base) is None

    sft = ["--steps=20", "--batch_tokens=4096", "--seq_len=1024"]
    assert call("train_sft.py", *common, *sft) is None

    rl = ["--steps=2", "--prompts_per_step=4", "--samples_per_prompt=8", "--max_new_tokens=48"]
    rl += ["--eval_problems=50", "--probe_prompts=8"]
    assert call("train_rl.py", *common, *rl) is None
    said = capfd.readouterr().out
    assert "WARNING" in said
    assert "without signal" in said

    evaluation = [f"--model={tmp_path / 'g' / 'rl'}", "--task=gsm8k", "--problems=0"]
    evaluation += ["--samples=0", "--max_new_tokens=48"]
    assert call("eval.py", *evaluation) is None
    assert "473 problems" in capfd.readouterr().out


def test_rl_or_more_sft_in_one_command(tmp_path):
    """The recipe at its smallest, with two seeds.

    Equal FLOPs, benchmarks, a report with a verdict and a plot. A second call finds all done.
    """
    from test_choice import write_files

    write_files(tmp_path)
    settings = recipe_environment(
        NANORL_OUT=str(tmp_path / "out"), NANORL_DATA=str(tmp_path), HF_HUB_OFFLINE="1"
    )
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
    folder = tmp_path / "out" / "versus" / "tiny_run"
    reports = []
    for _ in range(2):
        result = subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        reports.append(json.loads((folder / "report.json").read_text()))

    # Nothing was evaluated again.
    report = reports[0]
    assert report == reports[1]
    assert result.stdout.count("greedy        ") == 0

    assert report["verdict"] in result.stdout
    assert (folder / "accuracy.png").stat().st_size > 10_000
    assert list(report["flops"]) == ["0", "1"]
    for seed in report["flops"].values():
        assert abs(seed["B"]["train"] / seed["A"]["train"] - 1) < 0.01
    some = {"mmlu likelihood", "arc_easy likelihood", "spelling greedy"}
    assert some <= set(report["benchmarks"])

    text = (folder / "report.md").read_text()
    assert "| **mean** |" in text
    assert "(accuracy.png)" in text
    headings = ("The task", "What both arms took", "The six benchmarks", "To read")
    for heading in headings:
        assert f"## {heading}" in text

    mistake = subprocess.run(
        ["bash", "runs/rl_vs_sft.sh", "--taks=sum3"],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
    )
    assert mistake.returncode == 1
    assert mistake.stderr.startswith("error: --taks=sum3")


def test_the_laptop_recipe_goes_on_after_a_kill_and_does_nothing_twice(tmp_path):
    """All of runs/laptop.sh at its smallest, on the built-in documents. SFT is killed."""
    small = recipe_environment(
        NANORL_OUT=str(tmp_path / "out"),
        NANORL_DATA="",
        OMP_NUM_THREADS="1",
        COMPILE="",
        AFTER_SAVE=f"echo {{dir}} {{run}} >> {tmp_path}/left",
        BASE="--steps=4 --eval_tokens=2048 --save_every=2",
        SFT="--steps=60 --eval_problems=10 --examples=300 --save_every=2 --batch_tokens=1024",
        RL="--steps=2 --prompts_per_step=4 --eval_problems=10 --probe_prompts=4",
        EVAL="--problems=10",
    )
    command = ["bash", "runs/laptop.sh"]
    run = tmp_path / "out" / "laptop"

    # All processes of the recipe are killed once SFT has saved something.
    with open(tmp_path / "said", "w") as said:
        first = subprocess.Popen(command, cwd=ROOT, env=small, stdout=said, start_new_session=True)
    wait_for((run / "sft" / "step_000002" / "DONE").exists, first, seconds=300)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (run / "rl").exists()
    assert "train_base.py" in (tmp_path / "said").read_text()

    second = subprocess.run(command, cwd=ROOT, env=small, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "done before: train_base.py" in second.stdout
    assert f"resumed {run}/sft/step_" in second.stdout
    assert f"resumed {run}/rl/step_" not in second.stdout

    # The table of before and after, which leaves too.
    report = (run / "report.md").read_text()
    assert "| spelling, greedy |" in report
    assert report in second.stdout
    left = (tmp_path / "left").read_text().splitlines()
    assert set(left) == {f"{run} laptop"}
    assert len(left) >= 8

    before = sorted(path for path in run.rglob("*"))
    third = subprocess.run(command, cwd=ROOT, env=small, capture_output=True, text=True)
    assert third.returncode == 0
    assert third.stdout.count("done before: ") == 6
    assert "$ python train" not in third.stdout
    assert "$ python eval" not in third.stdout
    assert before == sorted(path for path in run.rglob("*"))
