"""nanorl/tools/dynamics.py on checkpoints of real runs: above all, the next step that it foresees
is the one that the run then made."""

import json

import pytest
import torch

from nanorl.dynamics import noise, vectors
from nanorl.dynamics.online import Halves
from nanorl.dynamics.source import load
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from nanorl.tools import dynamics
from nanorl.tools import dynamics_report as report
from scripts import RL, call, rows, trainer_state

TOOL = "nanorl/tools/dynamics.py"
FEW = ["--problems=32", "--completions=6"]


def run_rl(out, name, *constants):
    model = f"--model={out / 'a' / 'sft'}"
    few = ["--steps=3", "--keep=all", "--eval_every=0"]
    assert call("train_rl.py", *RL, model, *few, f"--run_name={name}", *constants) is None
    return out / name / "rl"


OPTIONS = {
    "adamw": ["--weight_decay=0.1", "--beta1=0.8", "--lr_schedule=linear"],
    "rmsprop": ["--optimizer=rmsprop", "--loss_norm=sequence", "--advantage=loo"],
    "sgd": ["--optimizer=sgd", "--lr=0.5", "--max_grad_norm=0.1", "--temperature=0.8"],
    "lora": ["--lora_rank=2", "--max_grad_norm=0", "--overlong=mask", "--loss_norm=constant"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_step_by_hand_is_the_one_that_the_run_makes(out, name):
    run = run_rl(out, name, *OPTIONS[name])
    source = load(str(run / "step_000002"))
    next_step = dynamics.NextStep(source, dynamics.Sizes(32, 6, 0))
    ratio, cosine = dynamics.compare_with_disk(source, next_step)
    assert ratio == pytest.approx(1, abs=1e-9) and cosine == pytest.approx(1, abs=1e-12)
    # Of a run in fp64, cast to fp32: the same up to its rounding, with the moments cast too.
    source = load(str(run / "step_000002"), torch.float32)
    for state in source.optimizers[0].state.values():
        for moment, numbers in state.items():
            assert numbers.dtype == torch.float32, moment
    next_step = dynamics.NextStep(source, dynamics.Sizes(32, 6, 0))
    ratio, cosine = dynamics.compare_with_disk(source, next_step)
    assert ratio == pytest.approx(1, abs=0.02) and cosine > 0.99
    n = sum(p.numel() for p in source.measured.theta.values())
    assert (n < 20_000) == (name == "lora") == ("lora_A" in next(iter(source.named)))


PRINTED = (
    "tr Sigma",
    "sum H_k",
    "difference / norm",
    "norm ratio",
    "first order",
    "(unbiased)",
    "largest |cov_k|",
    "in words",
)


def test_all_measures_are_printed_and_written(out, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run = run_rl(out, "measured")
    path = str(run / "step_000002")
    capsys.readouterr()
    assert call(TOOL, path, *FEW, "--prompts=3", f"--out={tmp_path}") is None
    said = capsys.readouterr().out
    for piece in PRINTED:
        assert piece in said
    with open(tmp_path / "dynamics.json", encoding="utf-8") as f:
        (found,) = json.load(f)
    assert found["after"] == 2 and found["step"]["off"] < 1e-10
    # Of one quantity several measures tell the same.
    shares, slope = found["covariance"]["change"], found["kernel"]["gradient"]["mean"]
    assert shares == pytest.approx(slope, rel=1e-6)
    off, off_at_first = found["kernel"]["foreseen_off"], found["kernel"]["linear_off"]
    assert off_at_first < 0.1 and off_at_first < off / 5
    curve = {eta: change / eta for eta, change, _, _ in found["change"]["curve"]}
    assert curve[1e-7] == pytest.approx(found["change"]["first"]["mean"], rel=1e-2)
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000
    # Nothing of the run has changed.
    assert trainer_state(run, 2)["step"] == 2 and len(list((run / "step_000002").iterdir())) == 8

    # A series, in less.
    series = [str(run / f"step_00000{step}") for step in (1, 3)]
    few = ["--measure=entropy", "--small", "--dtype=fp32", f"--out={tmp_path}"]
    assert call(TOOL, *series, *few) is None
    with open(tmp_path / "dynamics.json", encoding="utf-8") as f:
        found = json.load(f)
    assert [one["after"] for one in found] == [1, 3]
    assert all("entropy" in one and "noise" not in one for one in found)


def test_mistakes_are_refused_in_a_line(out):
    assert "name a checkpoint of RL" in call(TOOL)
    assert "--measure=heat: it takes some of" in call(TOOL, "x", "--measure=noise,heat")
    assert "at least 2, because" in call(TOOL, "x", "--prompts=1")
    assert "fp64 or fp32" in call(TOOL, "x", "--dtype=bf16")
    with pytest.raises(ValueError, match="no checkpoint in nowhere"):
        load("nowhere")
    with pytest.raises(ValueError, match="checkpoint of another stage"):
        load(str(out / "a" / "sft"))


def test_no_linear_range_of_a_slope_that_is_not_told_from_0():
    change = dict(lr=0.1, one=-0.02, one_error=0.005, linear=(1e-10, 0.1), at_lr=dict(mean=-0.021))
    assert "linear (within 10%) from 1.0e-10" in report.range_of_eta(change)
    assert "Yes, within 10%" in report.linear_answer(change)
    assert "rounding hides" in report.range_of_eta(dict(change, linear=None))
    lost = dict(change, one_error=0.015)
    assert "not told from 0" in report.range_of_eta(lost)
    assert "not told from 0" in report.linear_answer(lost)


def test_a_ratio_to_nothing_is_not_printed():
    noise = dict(problems=32, samples=4, prompts=4, seconds=1.0, law=[], more_samples=0.8)
    noise.update(dict.fromkeys(("trace", "within", "between"), (1.0, 0.1)))
    noise.update(scale=(10.0, 1.0), to_signal=(2.5, 0.25))
    for signal, told in (((0.1, 0.06), False), ((0.1, 0.04), True)):
        text = "\n".join(report.noise_lines(dict(noise, signal=signal)))
        assert ("noise scale tr Sigma / |g|^2: 10" in text) == told
        words = "\n".join(report.noise_answers(dict(noise, signal=signal)))
        assert ("71% is noise" in words) == told and ("raise --problems" in words) != told


def test_the_noise_of_a_step_in_training(out, capsys):
    """What is logged of step 3 is what step 2's checkpoint says of its halves; over a window the
    tool divides the means."""
    run = run_rl(out, "noise", "--noise_scale", "--device_tokens=150")
    source = load(str(run / "step_000002"))
    measured, settings = source.measured, source.settings
    rollouts = source.next_batch(4)
    whole, N = noise.gain_gradient(measured, rollouts, settings)
    half, _ = noise.gain_gradient(measured, rollouts[:2], settings)
    squares = vectors.dot(half, half) * (2 / N) ** 2, vectors.dot(whole, whole) / N**2
    trace, signal = noise.from_two_sizes(*squares, 2, 4)
    row = rows(run)[-1]
    assert row["noise/trace"] == pytest.approx(trace, rel=1e-8)
    assert row["noise/signal"] == pytest.approx(signal, rel=1e-8)

    assert call(TOOL, str(run / "step_000003"), "--measure=online", "--window=2") is None
    said = capsys.readouterr().out
    traces = [row["noise/trace"] for row in rows(run)[-2:]]
    assert "the last 2 steps of 4 problems" in said and f"{sum(traces) / 2:.4g} +- " in said
    assert "noise/trace" not in rows(run_rl(out, "silent"))[-1]
    one = [f"--model={run / 'step_000003'}", "--run_name=one", "--prompts_per_step=1"]
    assert "each rank needs two problems" in call("train_rl.py", *RL, *one, "--noise_scale")


def test_the_halves_know_which_completion_is_which():
    """The rollouts on disk get each token's entropy by these numbers."""
    rollouts = []
    for p in range(5):
        ids = [[10 * p + g] * (3 + g) for g in range(2)]
        completions = [Completion(some, [-1.0] * len(some), True) for some in ids]
        rollouts.append(Rollout(None, [1, 2, 3], completions, None, None, None))
    table = torch.ones(5, 2)
    batches = Halves([], True, 5).pack(rollouts, table, table, 20, torch.device("cpu"))
    seen = []
    for batch in batches:
        for (p, g), targets in zip(batch.numbers, batch.targets.split(batch.lengths.tolist())):
            assert targets.tolist() == rollouts[p].completions[g].ids
            seen.append((p, g))
    assert sorted(seen) == [(p, g) for p in range(5) for g in range(2)]
