"""RL or more SFT: the statistics over seeds and problems, SFT for as many FLOPs, and the report of a small experiment."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from scripts import RL, call, rows

from nanorl.runtime import checkpoint
from nanorl.evaluate.seeds import holm, over_seeds, student_p, student_t, verdict_over_seeds
from nanorl.tools import versus


@pytest.mark.parametrize("df", range(1, 13))
def test_students_t(df):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.1, 0.8, 2.0, 4.3, 30.0, 1000.0):
        assert student_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-11) and student_p(
            -t, df
        ) == student_p(t, df)
    for p in (0.5, 0.4, 0.05, 0.001):
        assert student_t(p, df) == pytest.approx(stats.t.isf(p / 2, df), rel=1e-6)


def test_holm():
    """His procedure on a hand-made case: 0.01 x 4, 0.02 x 3, then never less than before."""
    assert (
        holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
        and holm([0.9, 0.8]) == [1.0, 1.0]
        and holm([]) == []
    )


def outcomes(solved):
    return [dict(index=i, prompt=[i], answer="", solved=[bool(s)]) for i, s in enumerate(solved)]


def arm(*seeds):
    return {seed: outcomes(solved) for seed, solved in enumerate(seeds)}


def test_over_seeds_means_and_intervals():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 200)) < 0.4, rng.random((3, 200)) < np.array([[0.5], [0.7], [0.9]])
    d = over_seeds(arm(*b), arm(*a))
    differences = b.mean(1) - a.mean(1)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert d["difference"] == pytest.approx(differences.mean()) and (
        d["seeds_low"],
        d["seeds_high"],
    ) == (pytest.approx(low), pytest.approx(high))
    assert d["p_seeds"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue) and d["p"] < 1e-3
    assert [d["each"][s]["difference"] for s in range(3)] == pytest.approx(differences.tolist())
    share = b.mean(0) - a.mean(0)
    assert d["low"] < share.mean() < d["high"] and d["high"] - d["low"] == pytest.approx(
        2 * 1.96 * share.std() / math.sqrt(200), rel=0.05
    )
    with pytest.raises(ValueError, match="a comparison needs the same"):
        over_seeds(arm(a[0]), arm(*b))


def test_the_smallest_visible_effect_is_seen_in_four_of_five_cases():
    """Seeds whose true differences scatter by s: an experiment at the stated smallest effect finds it in about 80% of the cases."""
    rng, s = np.random.default_rng(1), 0.05
    smallest = (student_t(0.05, 4) + student_t(0.4, 4)) * s / math.sqrt(5)
    draws = rng.normal(smallest, s, (4000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    assert 0.72 < np.mean(t > student_t(0.05, 4)) < 0.86


def words(of, against):
    return verdict_over_seeds(over_seeds(of, against), "A", "B")


def test_verdicts():
    bad, good, half = [0] * 60, [1] * 55 + [0] * 5, [1] * 30 + [0] * 30
    assert words(arm(good, good[::-1], good), arm(bad, bad, bad)).startswith(
        "A > B: by +91.7 points, over seeds 95% [+"
    )
    assert words(arm(bad, bad, bad), arm(good, good[::-1], good)).startswith(
        "A < B: by -91.7 points"
    )
    assert words(arm(good), arm(half)).startswith(
        "A > B with this seed: by +41.7 points, p = "
    ) and "one seed cannot speak for others" in words(arm(good), arm(half))
    scattered = arm(
        [1] * 60, [1] * 10 + [0] * 50, [1] * 7 + [0] * 53
    )  # better with each, by very different amounts
    said = words(scattered, arm(bad, bad, bad))
    assert (
        said.startswith("A > B with each of these 3 seeds (p at most 0.02 each, over 60 problems)")
        and "how much it is with other seeds, 3 cannot say" in said
    )
    assert words(arm(good, bad), arm(half, half)).startswith(
        "no difference that 2 seeds of 60 problems can see"
    )  # the seeds disagree
    assert words(arm([1] + bad[1:], [1] + bad[1:]), arm(bad, bad)).startswith(
        "no difference that 2 seeds"
    )  # they agree, and neither shows anything
    assert (
        words(arm(half, half), arm(half, half))
        == "no difference that 2 seeds of 60 problems can see (+0.0 points); one below about 6.5 points would likely not show"
    )


def test_seeds_that_agree_by_chance_are_not_certain():
    """Two seeds that each gain one and the same problem of 60: equal differences, and yet no proof."""
    d = over_seeds(arm([1] + [0] * 59, [1] + [0] * 59), arm([0] * 60, [0] * 60))
    assert d["p_seeds"] > 0.3 and d["p"] > 0.3
    few = lambda n: [1] * n + [0] * (200 - n)
    d = over_seeds(
        arm(few(5), few(6), few(5)), arm(few(0), few(0), few(0))
    )  # nearly equal; by the seeds alone p would be 0.004
    assert d["p_seeds"] > 0.1


# ---- SFT for as many FLOPs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms(out):
    """A run of RL from the SFT model of `out`, on its task, and the SFT that follows it."""
    rl = [
        *RL[:2],
        "--task=0-20",
        *RL[4:],
        f"--model={out / 'a' / 'sft'}",
        "--run_name=arms",
        "--max_new_tokens=12",
        "--seed=0",
    ]
    assert (
        call(
            "train_rl.py",
            *rl,
            "--prompts_per_step=8",
            "--problems=300",
            "--device_rows=32",
            "--steps=8",
        )
        is None
    )
    assert (
        call(
            "train_sft.py",
            f"--match_flops={out / 'arms' / 'rl'}",
            "--save_every=2",
            "--eval_problems=10",
        )
        is None
    )
    return out / "arms"


def state_of(stage):
    return checkpoint.load_state(checkpoint.latest(stage))


def test_as_many_flops_from_the_same_start(arms):
    rl, sft = state_of(arms / "rl"), state_of(arms / "sft_more")
    assert sft["start"]["hash"] == rl["start"]["hash"] and sft["step"] > 1
    assert sft["flops"]["train"] == pytest.approx(rl["flops"]["train"], rel=0.01)
    logged = rows(arms / "sft_more")
    assert (
        logged[-1]["flops_total"] == sft["flops"]["train"]
        and logged[0]["step"] == 0
        and "val/accuracy" in logged[0]
        and "val/accuracy" in logged[-1]
    )
    assert sft["settings"]["dtype"] == rl["settings"]["dtype"] == "fp64"
    assert (
        sft["settings"]["task"],
        sft["settings"]["examples"],
        sft["settings"]["batch_tokens"],
        sft["settings"]["seq_len"],
    ) == ("0-20", 300, 512, 64)


def test_killed_and_resumed_it_ends_the_same(arms, out):
    shutil.copytree(arms / "sft_more", out / "arms" / "again")
    for path in sorted((arms / "again").glob("step_*"))[1:]:
        shutil.rmtree(path)
    for name in ("trainer.pt",):  # it is another stage by name, which is a constant like others
        path = checkpoint.latest(arms / "again") + "/" + name
        state = torch.load(path)
        state["settings"]["stage"] = "again"
        torch.save(state, path)
    assert (
        call(
            "train_sft.py",
            f"--match_flops={arms / 'rl'}/",
            "--save_every=2",
            "--eval_problems=10",
            "--stage=again",
        )
        is None
    )
    assert (
        rows(arms / "again") == rows(arms / "sft_more")
        and state_of(arms / "again")["flops"] == state_of(arms / "sft_more")["flops"]
    )


def test_it_goes_on_in_the_data_where_sft_stopped(out, tmp_path, capsys):
    """On all of SFT's own examples: its cursor. On other ones: from the first pass."""
    capsys.readouterr()
    options = [
        *RL[:2],
        "--task=0-20",
        *RL[4:],
        f"--model={out / 'a' / 'sft'}",
        "--steps=8",
        "--prompts_per_step=8",
        "--eval_every=0",
    ]
    assert (
        call("train_rl.py", *options, "--run_name=some", "--problems=400") is None
    )  # as many as SFT had
    assert call("train_sft.py", f"--match_flops={out / 'some' / 'rl'}", "--dtype=fp64") is None
    assert "after what that SFT has seen" in capsys.readouterr().out
    assert call("train_rl.py", *options, "--run_name=other", "--problems=300") is None
    assert call("train_sft.py", f"--match_flops={out / 'other' / 'rl'}", "--dtype=fp64") is None
    said = capsys.readouterr().out
    assert "from the first pass on" in said and "every pass in another order" in said
    before, after = state_of(out / "a" / "sft")["data"], state_of(out / "some" / "sft_more")["data"]
    assert (after["position"], after["offset"]) > (before["position"], before["offset"])


@pytest.mark.parametrize(
    "mistake, words",
    [
        (["--task=sum3"], "--task=sum3 with --match_flops="),
        (["--steps=7"], "--steps=7 with --match_flops="),
        (["--data=x.jsonl"], "--data=x.jsonl with"),
        (["--examples=3"], "--examples=3 with"),
    ],
)
def test_what_the_rl_run_gives_cannot_be_set(arms, mistake, words):
    assert words in call(
        "train_sft.py", f"--match_flops={arms / 'rl'}", "--run_name=mistake", *mistake
    )


def test_only_an_rl_run_can_be_matched(arms, out, tmp_path):
    assert "is no checkpoint of RL" in call("train_sft.py", f"--match_flops={out / 'a' / 'sft'}")
    assert "no checkpoint there" in call("train_sft.py", f"--match_flops={tmp_path}")
    shutil.copytree(arms / "rl", tmp_path / "rl")
    path = os.path.join(checkpoint.latest(tmp_path / "rl"), "trainer.pt")
    for change, words in (
        (dict(steps=100), "is at step 8 of 100: let it end first"),
        (dict(steps=8, task="0-20 until 2; sum3"), "its task is a curriculum"),
    ):
        state = torch.load(path)
        state["settings"].update(change)
        torch.save(state, path)
        assert words in call("train_sft.py", f"--match_flops={tmp_path / 'rl'}")
    state["settings"]["task"] = "0-20"
    state["flops"]["train"] /= 100
    torch.save(state, path)
    assert "too much to match them within 1%: lower --seq_len" in call(
        "train_sft.py", f"--match_flops={tmp_path / 'rl'}", "--run_name=tiny"
    )


# ---- the report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(arms, out, tmp_path_factory):
    """The arms as two seeds of an experiment, each model evaluated."""
    for model in (out / "a" / "sft", arms / "rl", arms / "sft_more"):
        assert (
            call(
                "eval.py",
                "--device=cpu",
                "--dtype=fp64",
                f"--model={model}",
                "--task=0-20",
                "--problems=20",
                "--samples=2",
                "--sample_problems=10",
                "--max_new_tokens=12",
            )
            is None
        )
        assert (
            call(
                "eval.py",
                "--device=cpu",
                "--dtype=fp64",
                f"--model={model}",
                "--task=spelling",
                "--problems=10",
                "--how=greedy",
            )
            is None
        )
    folder = tmp_path_factory.mktemp("experiment")
    for seed in (0, 1):
        shutil.copytree(arms, folder / f"seed{seed}")
    return folder


def test_the_report(experiment, arms, out, capsys):
    versus.main(str(experiment))
    said = capsys.readouterr().out
    text, numbers = (
        (experiment / "report.md").read_text(),
        json.loads((experiment / "report.json").read_text()),
    )
    assert (
        numbers["verdict"] in said
        and numbers["verdict"][1:] in text
        and "# RL or more SFT? 0-20" in text
    )
    summaries = [
        json.load(open(os.path.join(checkpoint.latest(stage), "eval", "summary.json")))
        for stage in (out / "a" / "sft", arms / "rl", arms / "sft_more")
    ]
    cells = [f"{s['0-20']['greedy']['accuracy']:.1%} [" for s in summaries]
    line = next(line for line in text.splitlines() if line.startswith("| 1 | "))
    assert [cell.strip().startswith(c) for cell, c in zip(line.split("|")[2:5], cells)] == [
        True
    ] * 3
    assert numbers["comparison"]["0-20 greedy"]["A - B"]["difference"] == pytest.approx(
        summaries[1]["0-20"]["greedy"]["accuracy"] - summaries[2]["0-20"]["greedy"]["accuracy"]
    )
    assert "| spelling | greedy | 10 |" in text and numbers["regression"] in text
    a, b = (state_of(stage)["flops"]["train"] for stage in (arms / "rl", arms / "sft_more"))
    assert f"| 0 | {a:.4g} | {b:.4g} | {b / a - 1:+.2%} |" in text
    for name, curve in numbers["curves"].items():
        logged = rows(arms / versus.ARMS[name])
        assert (
            curve[0]
            == [
                [row["flops_total"], row["val/accuracy"]] for row in logged if "val/accuracy" in row
            ]
            and len(curve[0]) >= 2
        )
    assert ("accuracy.png)" in text) == (experiment / "accuracy.png").exists()


def damaged(experiment, tmp_path, change):
    shutil.copytree(experiment, tmp_path / "damaged")
    path = os.path.join(
        checkpoint.latest(tmp_path / "damaged" / "seed1" / "sft_more"), "trainer.pt"
    )
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        versus.main(str(tmp_path / "damaged"))
    return str(error.value)


def test_unequal_flops_are_refused(experiment, tmp_path):
    assert "seed 1: RL took" in damaged(
        experiment,
        tmp_path,
        lambda state: state["flops"].update(train=state["flops"]["train"] * 1.02),
    )


def test_another_start_is_refused(experiment, tmp_path):
    assert "which are not the same weights" in damaged(
        experiment, tmp_path, lambda state: state["start"].update(hash="other")
    )


def test_what_is_missing_is_said(experiment, tmp_path):
    with pytest.raises(ValueError, match="no seed0, seed1"):
        versus.main(str(tmp_path))
    shutil.copytree(experiment, tmp_path / "b")
    path = os.path.join(checkpoint.latest(tmp_path / "b" / "seed1" / "rl"), "eval", "summary.json")
    with open(path) as f:
        summary = json.load(f)
    del summary["0-20"]
    with open(path, "w") as f:
        json.dump(summary, f)
    with pytest.raises(ValueError, match="were evaluated on 0-20, greedily"):
        versus.main(str(tmp_path / "b"))
    shutil.copytree(experiment, tmp_path / "a")
    os.remove(
        os.path.join(checkpoint.latest(tmp_path / "a" / "seed0" / "rl"), "eval", "summary.json")
    )
    with pytest.raises(ValueError, match="has not been evaluated"):
        versus.main(str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a" / "seed1" / "sft_more")
    shutil.rmtree(tmp_path / "a" / "seed0")
    with pytest.raises(ValueError, match="no checkpoint in"):
        versus.main(str(tmp_path / "a"))
