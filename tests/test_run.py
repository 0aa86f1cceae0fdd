"""A run of a stage: what may change when it goes on, who may be in its folder, how it gives up."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nanorl.runtime import checkpoint, dist, results
from nanorl.runtime.run import Run
from scripts import BASE, RL, ROOT, SFT, call, rows, trainer_state


@pytest.fixture
def rl(out):
    """Run train_rl.py from the SFT model -> its exit message; and the folder of the run."""

    def start(name, *options):
        run = [*RL, f"--model={out / 'a' / 'sft'}", "--eval_every=0", f"--run_name={name}"]
        return call("train_rl.py", *run, *options), out / name / "rl"

    return start


# ---- what may change -----------------------------------------------------------------------------


def test_what_changes_only_speed_and_rounding_may_change_and_is_said_and_recorded(rl, capsys):
    assert rl("memory", "--steps=1")[0] is None
    capsys.readouterr()
    less = ["--device_tokens=64", "--recompute", "--probe_prompts=2", "--device_rows=4"]
    said, run = rl("memory", "--steps=2", *less)
    assert said is None
    changed = [
        "probe_prompts: 4 -> 2",
        "device_rows: 8 -> 4",
        "steps: 1 -> 2",
        "device_tokens: 16384 -> 64",
        "recompute: False -> True",
    ]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "with other constants" in x]
    assert sorted(line.split(": ", 1)[1].split("; ")) == sorted(changed)
    assert rl("memory", "--steps=2", *less, "--resume=must")[0] is None  # nothing changed
    assert "other constants" not in capsys.readouterr().out
    (change,) = json.loads((run / "run.json").read_text())["changes"]
    assert change["step"] == 1 and sorted(change["constants"]) == sorted(changed)


def test_a_refused_change_names_a_way_that_works(rl, out):
    assert rl("refused", "--steps=1")[0] is None
    said, run = rl("refused", "--steps=2", "--lr=5e-4")
    model = f"--model={run / 'step_000001'}"
    assert "lr: 0.001 -> 0.0005" in said and f"(and {model} to start" in said
    assert rl("refused2", "--steps=1", "--lr=5e-4", model)[0] is None


def test_auto_stays_the_precision_that_the_run_began_with(rl, monkeypatch, capsys):
    monkeypatch.setattr(dist, "auto_dtype", lambda device: "fp32")
    assert rl("precision", "--dtype=auto", "--steps=1")[0] is None
    monkeypatch.setattr(dist, "auto_dtype", lambda device: "bf16")
    said, run = rl("precision", "--dtype=auto", "--steps=2")
    assert said is None and "--dtype=auto stays fp32" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["dtype"] == "torch.float32"
    assert trainer_state(run, 2)["dtype"] == "fp32"


# ---- one process in a folder ---------------------------------------------------------------------

HOLD = """
import sys
sys.path.insert(0, sys.argv[2])
from nanorl.runtime import lock
file, holder = lock.take(sys.argv[1])
print(holder or "held", flush=True)
sys.stdin.read()
"""


def hold(path):
    """Another process that tries to take a lock -> (the process, what it says)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), ROOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_a_second_process_is_refused_until_the_first_is_dead(rl, capsys):
    said, run = rl("shared", "--steps=1")
    assert said is None
    before = rows(run)
    other, answer = hold(run / "lock")
    assert answer == "held"
    try:
        said, _ = rl("shared", "--steps=2")
        assert f"process {other.pid} on" in said and "--run_name" in said and "\n" not in said
        assert rows(run) == before
        # These write nothing, and may look on.
        assert rl("shared", "--steps=2", "--dry_run")[0] is None
        assert rl("shared", "--steps=2", "--selfcheck")[0] is None
    finally:
        other.kill()
        other.wait()
    assert rl("shared", "--steps=2")[0] is None


def test_a_run_holds_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    run = Run(dict(run_name="x", resume="auto", after_save="", track=""), "rl")
    other, answer = hold(tmp_path / "x" / "rl" / "lock")
    other.communicate("")
    assert answer.startswith(f"process {os.getpid()} on ") and run.lock


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_evaluations_of_a_model_do_not_lose_each_others_results(tmp_path):
    children = []
    for name in "ab":
        child = os.fork()
        if child == 0:
            for i in range(50):
                results.add_to_summary(str(tmp_path), f"{name}{i}", "x" * 1000)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(json.loads((tmp_path / "eval" / "summary.json").read_text())) == 100


# ---- giving up -----------------------------------------------------------------------------------


def remedy(said):
    """The options that a message names, as far as they can be copied."""
    words = said.split("start again with ")[1].split()
    return [word for word in words if word.startswith("--model=")]


def test_after_bad_steps_the_advice_is_a_model_from_before_them(rl, out):
    """Step 2 takes the weights to 1e22, and step 3 is the first whose gradient is not finite."""
    sound = ["--lr_schedule=constant", "--save_every=1", "--max_bad_steps=2", "--steps=9"]
    assert rl("ruin", *sound, "--steps=1")[0] is None
    run = out / "ruin" / "rl"
    path = os.path.join(run, "step_000001", "trainer.pt")
    state = torch.load(path, weights_only=True)
    for group in state["optimizers"][0]["param_groups"]:
        group["initial_lr"] = 1e300
    torch.save(state, path)
    said, _ = rl("ruin", *sound)
    assert "in 2 steps in a row" in said and "since step 2 has ruined the weights" in said
    assert remedy(said) == [f"--model={checkpoint.path_of(str(run), 1)}"] and "a lower --lr" in said
    assert "fp32" not in said  # it was in fp64
    assert rl("ruin2", "--steps=1", *remedy(said))[0] is None

    # Where no checkpoint is older than the ruin, the start is.
    said, _ = rl("ruin3", *sound, "--lr=1e300", "--save_every=0")
    assert remedy(said) == [f"--model={checkpoint.latest(out / 'a' / 'sft')}"]


def test_sfts_advice_names_a_model_that_another_run_name_finds(out):
    ruin = [*SFT, "--max_bad_steps=2", "--warmup=0", "--steps=50", "--optimizer=adamw"]
    ruin += [f"--model={out / 'a' / 'base'}", "--matrix_lr=1e300", "--run_name=ruinedsft"]
    said = call("train_sft.py", *ruin)
    assert remedy(said) == [f"--model={checkpoint.latest(out / 'a' / 'base')}"]
    assert call("train_sft.py", *SFT, "--run_name=other", "--steps=1", *remedy(said)) is None


def test_bases_advice_names_no_model(out):
    ruin = [*BASE, "--max_bad_steps=2", "--warmup=0", "--other_lr=1e300", "--sample_tokens=0"]
    said = call("train_base.py", *ruin, "--run_name=ruinedbase", "--steps=9")
    assert "--model" not in said and "a lower --matrix_lr or --other_lr" in said


# ---- what is said --------------------------------------------------------------------------------


def test_a_warm_up_longer_than_the_run_is_said(rl, out, capsys):
    runs = [
        (["train_base.py", *BASE, "--sample_tokens=0"], "base"),
        (["train_sft.py", *SFT, f"--model={out / 'a' / 'base'}"], "sft"),
        (["train_rl.py", *RL, f"--model={out / 'a' / 'sft'}", "--eval_every=0"], "rl"),
    ]
    for command, stage in runs:
        for warmup, words in ((10, "the rate rises to 20% of that at most"), (1, "")):
            name = f"--run_name=short{warmup}{stage}"
            assert call(*command, name, "--steps=2", f"--warmup={warmup}") is None
            said = capsys.readouterr().out
            assert words in said and ("the rate rises" in said) == bool(words)


@pytest.mark.parametrize("rate, words", [("0.1", "taken blindly"), ("3e4", "hardly differ")])
def test_a_policy_that_a_rate_ruins_is_told_of_the_rate(rl, capsys, rate, words):
    assert rl(f"ruin{rate}", "--steps=3", f"--lr={rate}")[0] is None
    said = capsys.readouterr().out
    late = [line for line in said.splitlines() if "WARNING, step 2" in line]
    assert any(words in line for line in late)
    assert all("a lower --lr" in line for line in late)
    assert all("--max_new_tokens" not in line for line in late)
    assert f"(this step's is {float(rate):g})" in said
