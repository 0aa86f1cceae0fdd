"""runs/gpu_check.py at its smallest, on a CPU: every part runs and says what it measured."""

import json
import subprocess
import sys

import pytest

from scripts import ROOT, environment


def check(tmp_path, *parts):
    """Runs the parts -> {part: [what it told]}."""
    command = [sys.executable, "runs/gpu_check.py", "--tiny", *parts]
    where = environment(OUT=str(tmp_path))
    ended = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    ends = [line for line in ended.stdout.splitlines() if line.startswith("== ")]
    assert len(ends) == len(parts) and all(": 0, " in line for line in ends), ended.stdout
    told = {part: [] for part in parts}
    for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines():
        values = json.loads(line)
        told[values.pop("part")].append(values)
    return told


def test_decode_and_learner(tmp_path):
    told = check(tmp_path, "decode", "learner")
    (decode,) = told["decode"]
    assert decode["rows"] == 32 and decode["tok_s"] > 0 and 0 < decode["of_floor"] < 1
    assert len(told["learner"]) == 2 and all(0 < run["mfu"] < 1 for run in told["learner"])


@pytest.mark.slow
def test_every_part(tmp_path):
    told = check(tmp_path, "where", "exact", "train", "profile")
    *calls, last = told["exact"]
    assert [call["equal"] for call in calls] == ["64 of 64"] * 3 and last["gradient"] < 1e-5
    assert [run["rc"] for run in told["train"]] == [0, 0, 0]
    assert told["where"][0]["device"] in ("cpu", "cuda")
