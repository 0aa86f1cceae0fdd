"""Runs of several seeds as a table."""

import json
import subprocess
import sys

import pytest

from nanorl.tools import summary, table
from scripts import ROOT


def run(folder, name, rewards, before, after):
    """Write the metrics of a run: a row a step, and the accuracy before and after training."""
    rows = [{"step": 0, "val/accuracy": before, "val/length": 5.0}]
    for i, r in enumerate(rewards):
        row = {"step": i + 1, "reward": 9.0, "reward/correct": r}
        row.update({"frac_reward_zero_std": 0.5, "time/step": 2.0})
        rows.append(row)
    rows[-1].update({"val/accuracy": after, "val/length": 7.0})
    stage = folder / name / "rl"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_means_over_seeds_with_each_seed_beside_them(tmp_path):
    run(tmp_path / "kl", "beta=0.1-0", [0.0, 0.5] + [1.0] * 6, 0.25, 0.75)
    run(tmp_path / "kl", "beta=0.1-1", [0.0] * 8, 0.25, 0.5)
    run(tmp_path / "base", "defaults-0", [1.0], 0.0, 1.0)
    lines = table.table(table.read([str(tmp_path / "base"), str(tmp_path / "kl")]))
    assert len(lines) == 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert lines[2].startswith("| defaults | 1 | 0.0% (0.0) | 100.0% (100.0) | 100.0%")
    assert lines[3].startswith(
        "| beta=0.1 | 8 | 25.0% (25.0, 25.0) | 62.5% (75.0, 50.0) | 40.6% (81.2, 0.0) "
        "| 50.0% (100.0, 0.0) | 50.0% (50.0, 50.0) | 7 | 16 |"
    )


def test_differences_are_paired_by_seed_with_an_interval(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.7, 0.75), (0.2, 0.35)]):
        run(tmp_path / "x", f"none-{seed}", [a], 0.0, a)
        run(tmp_path / "x", f"some-{seed}", [b], 0.0, b)
    run(tmp_path / "x", "some-7", [0.0], 0.0, 0.0)  # a seed that the other lacks
    (line,) = table.differences(table.read([str(tmp_path / "x")]))
    low, high = stats.t.interval(0.95, 2, 10.0, stats.sem([10.0, 5.0, 15.0]))
    assert f"greedy after +10.0 [{low:+.1f}, {high:+.1f}]" in line
    assert line.endswith("3 seeds")


def test_runs_that_have_not_made_a_step_are_left_out_and_names_must_differ(tmp_path):
    run(tmp_path / "a", "n=1-0", [1.0], 0.0, 1.0)
    before_any_step = tmp_path / "a" / "n=2-0" / "rl"
    before_any_step.mkdir(parents=True)
    row = {"step": 0, "val/accuracy": 0.5}
    (before_any_step / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert len(table.table(table.read([str(tmp_path / "a")]))) == 3
    with pytest.raises(SystemExit, match="n=1-0 is in two"):
        table.read([str(tmp_path / "a")] * 2)


def test_a_folder_that_is_not_there_gets_one_line(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "nanorl.tools.table", str(tmp_path / "no")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("usage:")
    assert "Traceback" not in ended.stderr


def test_runs_that_say_little_are_named(tmp_path):
    run(tmp_path / "x", "some-0", [0.5] * 4, 0.0, 0.5)
    run(tmp_path / "x", "none-0", [0.0] * 4, 0.0, 0.0)
    runs = table.read([str(tmp_path / "x")])
    assert table.cautions(runs) == []
    for row in runs["none"][0][1:]:
        row.update({"frac_reward_zero_std": 1.0, "reward/errors": 0, "reward/timeouts": 0})
        row.update({"tokens": 10, "completions/mean_length": 5.0})
    runs["none"][0][-1]["val/failed"] = 3
    no_signal, failed = table.cautions(runs)
    assert no_signal.startswith("none: RL received no signal in 4 of 4 steps")
    assert failed == "none: the reward failed on 3 held-out answers"


def test_the_stages_of_a_run_say_what_makes_them_mean_less(tmp_path):
    run(tmp_path, "a-0", [0.0] * 4, 0.0, 0.0)
    stage = {"clipped": 0.9}
    found = {"base": stage, "sft": {"clipped": 0.1}, "rl": {"clipped": 0.1}}
    assert summary.cautions(str(tmp_path / "a-0"), found) == []

    found["rl"] = {"clipped": 0.9, "failed": 3, "failure": "no verifier"}
    failed, cut_off = summary.cautions(str(tmp_path / "a-0"), found)
    assert failed.startswith("rl: WARNING: the task's reward failed on 3 samples")
    assert cut_off == "rl: 90% of the answers are cut off"
