"""RL or more SFT.

The statistics over seeds and problems, SFT for as many FLOPs, and the report of a small experiment.
"""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from nanorl.evaluate.seeds import holm, over_seeds, student_p, student_t, verdict_over_seeds
from nanorl.runtime import checkpoint, equal_flops
from nanorl.tools import learnt, versus
from scripts import RL, call, rows


@pytest.mark.parametrize("df", range(1, 13))
def test_students_t(df):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.1, 0.8, 2.0, 4.3, 30.0, 1000.0):
        assert student_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-11)
        assert student_p(-t, df) == student_p(t, df)
    for p in (0.5, 0.4, 0.05, 0.001):
        assert student_t(p, df) == pytest.approx(stats.t.isf(p / 2, df), rel=1e-6)


def test_holm():
    """His procedure on a hand-made case: 0.01 x 4, 0.02 x 3, then never less than before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def outcomes(solved):
    """What an evaluation keeps: one sample a problem, solved or not."""
    return [dict(index=i, prompt=[i], answer="", solved=[bool(s)]) for i, s in enumerate(solved)]


def arm(*seeds):
    """{seed: outcomes} of an arm. seeds: for each, whether each problem is solved."""
    return {seed: outcomes(solved) for seed, solved in enumerate(seeds)}


def test_over_seeds_means_and_intervals():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a = rng.random((3, 200)) < 0.4
    b = rng.random((3, 200)) < np.array([[0.5], [0.7], [0.9]])
    d = over_seeds(arm(*b), arm(*a))

    # Over seeds: Student's t of the three differences.
    differences = b.mean(1) - a.mean(1)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert d["difference"] == pytest.approx(differences.mean())
    assert d["seeds_low"] == pytest.approx(low)
    assert d["seeds_high"] == pytest.approx(high)
    assert d["p_seeds"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert d["p"] < 1e-3
    assert [d["each"][s]["difference"] for s in range(3)] == pytest.approx(differences.tolist())

    # Over problems: each problem's difference is a mean over seeds.
    share = b.mean(0) - a.mean(0)
    width = 2 * 1.96 * share.std() / math.sqrt(200)
    assert d["low"] < share.mean() < d["high"]
    assert d["high"] - d["low"] == pytest.approx(width, rel=0.05)

    with pytest.raises(ValueError, match="a comparison needs the same"):
        over_seeds(arm(a[0]), arm(*b))


def test_the_smallest_visible_effect_is_seen_in_four_of_five_cases():
    """The true differences of seeds scatter by s.

    An experiment at the stated smallest effect finds it in about 80% of the cases.
    """
    rng = np.random.default_rng(1)
    s = 0.05
    smallest = (student_t(0.05, 4) + student_t(0.4, 4)) * s / math.sqrt(5)
    draws = rng.normal(smallest, s, (4000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    assert 0.72 < np.mean(t > student_t(0.05, 4)) < 0.86

    # It is what the comparison states.
    before = (rng.random((5, 20)) < 0.5).astype(int)
    after = (rng.random((5, 20)) < 0.6).astype(int)
    found = over_seeds(arm(*after), arm(*before))
    error = (found["seeds_high"] - found["difference"]) / student_t(0.05, 4)
    expected = (student_t(0.05, 4) + student_t(0.4, 4)) * error
    assert found["smallest"] == pytest.approx(expected)


def words(of, against):
    return verdict_over_seeds(over_seeds(of, against), "A", "B")


def test_verdicts():
    none = [0] * 60
    one = [1] + [0] * 59
    half = [1] * 30 + [0] * 30
    most = [1] * 55 + [0] * 5

    # Every seed says the same.
    said = words(arm(most, most[::-1], most), arm(none, none, none))
    assert said.startswith("A > B: by +91.7 points, over seeds 95% [+")
    said = words(arm(none, none, none), arm(most, most[::-1], most))
    assert said.startswith("A < B: by -91.7 points")

    # A single seed.
    said = words(arm(most), arm(half))
    assert said.startswith("A > B with this seed: by +41.7 points, p = ")
    assert "one seed cannot speak for others" in said

    # Better with each, by very different amounts.
    scattered = arm([1] * 60, [1] * 10 + [0] * 50, [1] * 7 + [0] * 53)
    said = words(scattered, arm(none, none, none))
    assert said.startswith(
        "A > B with each of these 3 seeds (p at most 0.02 each, over 60 problems)"
    )
    assert "how much it is with other seeds, 3 cannot say" in said

    # The seeds disagree.
    said = words(arm(most, none), arm(half, half))
    assert said.startswith("no difference that 2 seeds of 60 problems can see")

    # They agree, and neither shows anything.
    said = words(arm(one, one), arm(none, none))
    assert said.startswith("no difference that 2 seeds")

    assert words(arm(half, half), arm(half, half)) == (
        "no difference that 2 seeds of 60 problems can see (+0.0 points); one below about "
        "6.5 points would likely not show"
    )


def test_seeds_that_agree_by_chance_are_not_certain():
    """Two seeds that each gain one and the same problem of 60: equal differences, yet no proof."""
    none = [0] * 60
    one = [1] + [0] * 59
    d = over_seeds(arm(one, one), arm(none, none))
    assert d["p_seeds"] > 0.3
    assert d["p"] > 0.3

    def few(n):
        return [1] * n + [0] * (200 - n)

    # Nearly equal: by the seeds alone p would be 0.004.
    d = over_seeds(arm(few(5), few(6), few(5)), arm(few(0), few(0), few(0)))
    assert d["p_seeds"] > 0.1


# ---- SFT for as many FLOPs -----------------------------------------------------------------------


def rl_options(out):
    """RL from the SFT model of `out`, on the task of that model."""
    return [*RL[:2], "--task=0-20", *RL[4:], f"--model={out / 'a' / 'sft'}"]


@pytest.fixture(scope="module")
def arms(out):
    """A run of RL from the SFT model of `out`, on its task, and the SFT that follows it."""
    rl = [*rl_options(out), "--run_name=arms", "--max_new_tokens=12", "--seed=0"]
    rl += ["--prompts_per_step=8", "--problems=300", "--device_rows=32", "--steps=8"]
    assert call("train_rl.py", *rl) is None

    sft = [f"--match_flops={out / 'arms' / 'rl'}", "--save_every=2", "--eval_problems=10"]
    assert call("train_sft.py", *sft) is None
    return out / "arms"


def state_of(stage):
    return checkpoint.load_state(checkpoint.latest(stage))


def test_as_many_flops_from_the_same_start(arms):
    rl, sft = state_of(arms / "rl"), state_of(arms / "sft_more")
    assert sft["start"]["hash"] == rl["start"]["hash"] and sft["step"] > 1
    assert sft["flops"]["train"] == pytest.approx(rl["flops"]["train"], rel=0.01)
    logged = rows(arms / "sft_more")
    assert logged[-1]["flops_total"] == sft["flops"]["train"]
    assert logged[0]["step"] == 0
    assert "val/accuracy" in logged[0]
    assert "val/accuracy" in logged[-1]

    settings = sft["settings"]
    assert settings["dtype"] == rl["settings"]["dtype"] == "fp64"
    assert settings["task"] == "0-20"
    assert settings["examples"] == 300
    assert settings["batch_tokens"] == 512
    assert settings["seq_len"] == 64


def test_killed_and_resumed_it_ends_the_same(arms, out):
    shutil.copytree(arms / "sft_more", out / "arms" / "again")
    for path in sorted((arms / "again").glob("step_*"))[1:]:
        shutil.rmtree(path)

    # It is another stage by name, which is a constant like others.
    path = checkpoint.latest(arms / "again") + "/trainer.pt"
    state = torch.load(path)
    state["settings"]["stage"] = "again"
    torch.save(state, path)

    options = [f"--match_flops={arms / 'rl'}/", "--save_every=2", "--eval_problems=10"]
    assert call("train_sft.py", *options, "--stage=again") is None
    assert rows(arms / "again") == rows(arms / "sft_more")
    assert state_of(arms / "again")["flops"] == state_of(arms / "sft_more")["flops"]


def test_it_goes_on_in_the_data_where_sft_stopped(out, tmp_path, capsys):
    """On all of SFT's own examples: its cursor. On other ones: from the first pass."""
    capsys.readouterr()
    options = [*rl_options(out), "--steps=8", "--prompts_per_step=8", "--eval_every=0"]

    # As many problems as SFT had.
    assert call("train_rl.py", *options, "--run_name=some", "--problems=400") is None
    assert call("train_sft.py", f"--match_flops={out / 'some' / 'rl'}", "--dtype=fp64") is None
    assert "after what that SFT has seen" in capsys.readouterr().out

    # Fewer.
    assert call("train_rl.py", *options, "--run_name=other", "--problems=300") is None
    assert call("train_sft.py", f"--match_flops={out / 'other' / 'rl'}", "--dtype=fp64") is None
    said = capsys.readouterr().out
    assert "from the first pass on" in said
    assert "every pass in another order" in said

    before = state_of(out / "a" / "sft")["data"]
    after = state_of(out / "some" / "sft_more")["data"]
    assert (after["position"], after["offset"]) > (before["position"], before["offset"])


@pytest.mark.parametrize(
    "mistake, message",
    [
        (["--task=sum3"], "--task=sum3 with --match_flops="),
        (["--steps=7"], "--steps=7 with --match_flops="),
        (["--data=x.jsonl"], "--data=x.jsonl with"),
        (["--examples=3"], "--examples=3 with"),
    ],
)
def test_what_the_rl_run_gives_cannot_be_set(arms, mistake, message):
    options = [f"--match_flops={arms / 'rl'}", "--run_name=mistake"]
    assert message in call("train_sft.py", *options, *mistake)


def test_only_an_rl_run_can_be_matched(arms, out, tmp_path):
    assert "is no checkpoint of RL" in call("train_sft.py", f"--match_flops={out / 'a' / 'sft'}")
    assert "no checkpoint there" in call("train_sft.py", f"--match_flops={tmp_path}")

    shutil.copytree(arms / "rl", tmp_path / "rl")
    match = f"--match_flops={tmp_path / 'rl'}"
    path = os.path.join(checkpoint.latest(tmp_path / "rl"), "trainer.pt")
    cases = [
        (dict(steps=100), "is at step 8 of 100: let it end first"),
        (dict(steps=8, task="0-20 until 2; sum3"), "its task is a curriculum"),
    ]
    for change, message in cases:
        state = torch.load(path)
        state["settings"].update(change)
        torch.save(state, path)
        assert message in call("train_sft.py", match)

    # One step of SFT is more than all of this RL run.
    state["settings"]["task"] = "0-20"
    state["flops"]["train"] /= 100
    torch.save(state, path)
    message = "too much to match them within 1%: lower --seq_len"
    assert message in call("train_sft.py", match, "--run_name=tiny")


def test_an_rl_run_from_before_lora_can_be_followed():
    kept = equal_flops.kept_settings({"run": "old"}, {"examples": 1, "matrix_lr": 0.5})
    assert kept == {"stage": "sft_more", "run_name": "old", "matrix_lr": 0.5}


# ---- the report ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(arms, out, tmp_path_factory):
    """The arms as two seeds of an experiment, each model evaluated."""
    for model in (out / "a" / "sft", arms / "rl", arms / "sft_more"):
        common = ["--device=cpu", "--dtype=fp64", f"--model={model}"]
        task = ["--task=0-20", "--problems=20", "--samples=2", "--sample_problems=10"]
        assert call("eval.py", *common, *task, "--max_new_tokens=12") is None
        spelling = ["--task=spelling", "--problems=10", "--how=greedy"]
        assert call("eval.py", *common, *spelling) is None
    folder = tmp_path_factory.mktemp("experiment")
    for seed in (0, 1):
        shutil.copytree(arms, folder / f"seed{seed}")
    return folder


def summary_of(stage):
    return os.path.join(checkpoint.latest(stage), "eval", "summary.json")


def test_the_report(experiment, arms, out, capsys):
    versus.main(str(experiment))
    said = capsys.readouterr().out
    text = (experiment / "report.md").read_text()
    numbers = json.loads((experiment / "report.json").read_text())
    assert numbers["verdict"] in said
    assert numbers["verdict"][1:] in text
    assert "# RL or more SFT? 0-20" in text

    # The row of seed 1 has each model's greedy accuracy.
    accuracies = []
    for stage in (out / "a" / "sft", arms / "rl", arms / "sft_more"):
        with open(summary_of(stage)) as f:
            accuracies.append(json.load(f)["0-20"]["greedy"]["accuracy"])
    line = next(line for line in text.splitlines() if line.startswith("| 1 | "))
    cells = line.split("|")[2:5]
    assert len(cells) == 3
    for cell, accuracy in zip(cells, accuracies):
        assert cell.strip().startswith(f"{accuracy:.1%} [")
    comparison = numbers["comparison"]["0-20 greedy"]["A - B"]
    assert comparison["difference"] == pytest.approx(accuracies[1] - accuracies[2])

    assert "| spelling | greedy | 10 |" in text
    assert numbers["regression"] in text
    a = state_of(arms / "rl")["flops"]["train"]
    b = state_of(arms / "sft_more")["flops"]["train"]
    assert f"| 0 | {a:.4g} | {b:.4g} | {b / a - 1:+.2%} |" in text

    parts = numbers["flops"]["0"]["parts of A"]
    assert sum(parts.values()) == pytest.approx(a)
    share = parts["decode"] / a
    assert f"{parts['decode']:.4g} ({share:.0%})" in text
    assert "| decode of A |" in text
    assert "| 0 (0%) |" in text  # of the reference

    for name, curve in numbers["curves"].items():
        evaluated = [row for row in rows(arms / versus.ARMS[name]) if "val/accuracy" in row]
        assert curve[0] == [[row["flops_total"], row["val/accuracy"]] for row in evaluated]
        assert len(curve[0]) >= 2
    assert ("accuracy.png)" in text) == (experiment / "accuracy.png").exists()


def rl_rows(n, dead, right=0.0, **changes):
    """n rows of an RL run, after the evaluation before it; 8 samples a step."""
    row = {"frac_reward_zero_std": 0.0, "frac_learned_zero_std": dead, "reward": 5.0, "updated": 1}
    row.update({"reward/correct": right, "reward/errors": 0, "reward/timeouts": 0})
    row.update({"tokens": 80, "completions/mean_length": 10.0, **changes})
    return [{"step": 0, "val/accuracy": 0.0}] + [dict(row) for _ in range(n)]


def test_what_a_run_without_signal_says_nothing_about():
    live = rl_rows(10, dead=0.5)
    assert learnt.caution({0: live}) == ""
    assert learnt.caution({0: rl_rows(5, dead=1.0) + rl_rows(5, dead=0.89)}) == ""

    said = learnt.caution({0: rl_rows(6, dead=1.0) + rl_rows(4, dead=0.5)})
    assert said == (
        "RL received no signal in 6 of 10 steps: only 0.0% of the samples there are right, "
        "so this says little about the reward"
    )
    said = learnt.caution({0: rl_rows(1, dead=1.0) + rl_rows(8, dead=0.94, right=0.03) + live[:2]})
    assert "no signal in 1 of 10 steps and almost none in 8: only 2.7%" in said
    assert said.endswith("says nothing about the reward")

    # No update changed the weights, whatever the rewards were.
    assert "no signal in 7 of 7 steps" in learnt.caution({0: rl_rows(7, dead=0.0, updated=0)})

    # There was nothing left to learn, or the reward failed.
    said = learnt.caution({0: rl_rows(9, dead=1.0, right=0.99)})
    assert said.endswith("99.0% of the samples there are right, so little is left to learn")
    said = learnt.caution({0: rl_rows(9, dead=1.0, **{"reward/errors": 4, "reward/timeouts": 1})})
    assert "the task's reward failed on 45 of 72 samples there" in said

    # Of several seeds: most steps of one of them, or of all together.
    said = learnt.caution({0: live, 1: rl_rows(10, dead=1.0)[:9], 2: live})
    assert "in 8 of 8 steps (seed 1: 8 of 8)" in said
    said = learnt.caution({0: rl_rows(3, dead=1.0) + live[:6], 1: rl_rows(10, dead=1.0)})
    assert "in 13 of 18 steps (seed 0: 3 of 8, seed 1: 10 of 10)" in said


def test_the_verdict_begins_with_what_makes_it_mean_less(experiment, tmp_path, capsys):
    shutil.copytree(experiment, tmp_path / "dead")
    for seed in (0, 1):
        stage = tmp_path / "dead" / f"seed{seed}" / "rl"
        logged = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
        for row in logged[1:]:
            row["frac_learned_zero_std"] = 1.0
        (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
        with open(summary_of(stage)) as f:
            summary = json.load(f)
        summary["0-20"]["greedy"].update(failed=3, failure="no verifier")
        with open(summary_of(stage), "w") as f:
            json.dump(summary, f)
    versus.main(str(tmp_path / "dead"))
    said = capsys.readouterr().out
    text = (tmp_path / "dead" / "report.md").read_text()
    for words in (said, text):
        assert "RL received no signal in 16 of 16 steps (seed 0: 8 of 8, seed 1: 8 of 8)" in words
        assert "the task's reward failed on 6 of 40 answers of A: RL, which count as not" in words
    assert text.splitlines()[2].startswith("**RL received no signal")
    assert "| 1 | 8 | 8 | 0 |" in text


def damaged(experiment, tmp_path, change):
    """The error of a report on the experiment, after a change to the state of an arm of seed 1."""
    shutil.copytree(experiment, tmp_path / "damaged")
    stage = tmp_path / "damaged" / "seed1" / "sft_more"
    path = os.path.join(checkpoint.latest(stage), "trainer.pt")
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        versus.main(str(tmp_path / "damaged"))
    return str(error.value)


def test_unequal_flops_are_refused(experiment, tmp_path):
    def two_percent_more(state):
        state["flops"]["train"] *= 1.02

    assert "seed 1: RL took" in damaged(experiment, tmp_path, two_percent_more)


def test_another_start_is_refused(experiment, tmp_path):
    def another_start(state):
        state["start"]["hash"] = "other"

    assert "which are not the same weights" in damaged(experiment, tmp_path, another_start)


def test_what_is_missing_is_said(experiment, tmp_path):
    with pytest.raises(ValueError, match="no seed0, seed1"):
        versus.main(str(tmp_path))

    # A model was evaluated, but not on the task.
    shutil.copytree(experiment, tmp_path / "b")
    path = summary_of(tmp_path / "b" / "seed1" / "rl")
    with open(path) as f:
        summary = json.load(f)
    del summary["0-20"]
    with open(path, "w") as f:
        json.dump(summary, f)
    with pytest.raises(ValueError, match="were evaluated on 0-20, greedily"):
        versus.main(str(tmp_path / "b"))

    # A model was not evaluated at all.
    shutil.copytree(experiment, tmp_path / "a")
    os.remove(summary_of(tmp_path / "a" / "seed0" / "rl"))
    with pytest.raises(ValueError, match="has not been evaluated"):
        versus.main(str(tmp_path / "a"))

    # An arm is missing.
    shutil.rmtree(tmp_path / "a" / "seed1" / "sft_more")
    shutil.rmtree(tmp_path / "a" / "seed0")
    with pytest.raises(ValueError, match="no checkpoint in"):
        versus.main(str(tmp_path / "a"))
