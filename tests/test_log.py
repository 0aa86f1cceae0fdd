"""metrics.jsonl, rollouts/ and what a resumed run forgets of them."""

import gzip
import json
import math
import os

import pytest

from nanorl.report import terminal
from nanorl.report.watch import Watch
from nanorl.runtime import results
from nanorl.runtime.log import RunLog, duration, size, size_of


def rows(log):
    with open(log._path("metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def stored(tmp_path):
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


def test_rows_are_appended_with_step_and_time(tmp_path):
    log = RunLog(str(tmp_path / "a" / "rl"))  # the folders come with it
    log.row(0, reward=0.25)
    log.row(1, reward=0.5, note="µ")
    RunLog(str(tmp_path / "a" / "rl")).row(2)  # a second process goes on with the same file
    found = rows(log)
    assert [(r["step"], r.get("reward"), r.get("note")) for r in found] == [
        (0, 0.25, None),
        (1, 0.5, "µ"),
        (2, None, None),
    ]
    assert all(r["time"] > 1.7e9 for r in found)


def test_rows_are_json_whatever_the_numbers(tmp_path):
    log = RunLog(str(tmp_path))
    log.row(1, loss=float("nan"), grad_norm=float("inf"), reward=0.5)
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert (strict["loss"], strict["grad_norm"], strict["reward"]) == (None, None, 0.5)


def test_nothing_not_finite_is_written_however_deep(tmp_path):
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    nested = {"parts": [{"correct": float("nan")}, (1.0, float("-inf"))], "text": "NaN"}
    null = {"parts": [{"correct": None}, [1.0, None]], "text": "NaN"}
    log = RunLog(str(tmp_path))
    log.card(**nested)
    card = json.loads((tmp_path / "run.json").read_text(), **strict)
    assert {**card, **null} == card
    log.rollouts(1, [nested])
    with gzip.open(tmp_path / "rollouts" / "step_000001.jsonl.gz") as f:
        assert json.loads(f.read(), **strict) == null
    results.write_json(str(tmp_path), "a.json", nested)
    results.write_lines(str(tmp_path), "a.jsonl", [nested])
    for name in ("a.json", "a.jsonl"):
        assert json.loads((tmp_path / "eval" / name).read_text(), **strict) == null


def test_cut_drops_later_rows_rollouts_and_a_torn_line(tmp_path):
    log = RunLog(str(tmp_path))
    for step in range(1, 13):
        log.row(step, reward=step / 10)
        log.event(step, "warning", f"of step {step}")
        log.rollouts(step, [{"text": str(step)}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        # What a killed process leaves. The step stays, so that only the tear can drop this line.
        f.write('{"step": 3, "rew')
    log.cut(9)
    assert [r["step"] for r in rows(log)] == list(range(1, 10))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["text"] for e in events[:-1]] == [f"of step {step}" for step in range(1, 10)]
    assert events[-1]["kind"] == "removed" and events[-1]["text"].startswith("4 rows after step 9")
    assert stored(tmp_path) == ["events.jsonl", "metrics.jsonl"] + [
        f"rollouts/step_{s:06d}.jsonl.gz" for s in range(1, 10)
    ]
    log.row(10)  # goes on with a line of its own
    assert [r["step"] for r in rows(log)] == list(range(1, 11))


def test_cut_before_anything_was_written(tmp_path):
    RunLog(str(tmp_path)).cut(5)
    assert stored(tmp_path) == []


def test_rollouts_are_records_and_equal_ones_give_equal_bytes(tmp_path, monkeypatch):
    records = [{"text": "#5 ✓", "reward": 1.0}, {"text": "", "reward": 0.0}]
    written = []
    for name, now in [("a", 1.8e9), ("b", 1.9e9)]:
        monkeypatch.setattr("time.time", lambda now=now: now)  # gzip's header would hold it
        log = RunLog(str(tmp_path / name))
        log.rollouts(120, records)
        written.append((tmp_path / name / "rollouts" / "step_000120.jsonl.gz").read_bytes())
    assert written[0] == written[1]
    assert [
        json.loads(line) for line in gzip.decompress(written[0]).decode().splitlines()
    ] == records


def test_the_card_holds_the_constants_and_where_they_ran(tmp_path):
    log = RunLog(str(tmp_path))
    log.card(settings={"lr": 0.1}, parameters=123)
    log.card(settings={"lr": 0.2}, parameters=123)  # the last start's
    card = json.loads((tmp_path / "run.json").read_text())
    assert card["settings"] == {"lr": 0.2} and card["parameters"] == 123
    assert {"commit", "torch", "python", "machine"} <= set(card)
    assert stored(tmp_path) == ["run.json"]  # no half-written file beside it


def test_an_inactive_log_touches_nothing(tmp_path):
    log = RunLog(str(tmp_path / "rank1"), active=False)
    log.card(seed=0)
    log.row(1, reward=0.0)
    log.rollouts(1, [{}])
    log.cut(0)
    assert list(tmp_path.iterdir()) == []
    first = RunLog(str(tmp_path))
    first.row(1), first.rollouts(1, [])
    RunLog(str(tmp_path), active=False).cut(0)  # nor does it cut the first rank's files
    assert stored(tmp_path) == ["metrics.jsonl", "rollouts/step_000001.jsonl.gz"] and [
        r["step"] for r in rows(first)
    ] == [1]


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3599.7, "1h00m"), (7260, "2h01m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "step, words",
    [(2, "1 rows after step 2"), (-1, "3 rows of a run that had saved no checkpoint")],
)
def test_rows_that_go_are_named(tmp_path, capsys, step, words):
    log = RunLog(str(tmp_path))
    log.cut(-1)  # nothing there, nothing to say
    for i in (1, 2, 3):
        log.row(i, reward=0.5)
    log.cut(step)
    said = capsys.readouterr().out
    assert words in said and said.count("removed") == 1
    log.cut(step)
    assert capsys.readouterr().out == ""


def test_the_size_on_disk_is_known_before(tmp_path):
    records = [{"text": "the same again and again " * 20, "reward": 1.0}] * 50
    RunLog(str(tmp_path)).rollouts(1, iter(records))
    assert (
        size_of(records) == os.path.getsize(tmp_path / "rollouts" / "step_000001.jsonl.gz") < 1000
    )


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.2 kB"),
        (5.6e6, "5.6 MB"),
        (7.8e9, "7.8 GB"),
        (3e12, "3.0 TB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_size(n, text):
    assert size(n) == text


QUIET = {
    "reward": 0.5,
    "reward/correct": 0.5,
    "frac_learned_zero_std": 0.1,
    "completions/clipped_ratio": 0.0,
    "entropy": 1.0,
    "logp_diff/mean": 1e-7,
    "reward/errors": 0,
    "reward/timeouts": 0,
    "bad_steps": 0,
    "lr": 0.001,
    "tokens": 320,
    "completions/mean_length": 10.0,
}


def watching(state=None):
    return Watch(state, vocab_size=300)


APART = {"train_set/accuracy": 0.22, "train_set/n": 100, "val/accuracy": 0.055}


@pytest.mark.parametrize(
    "change, words, others",
    [
        ({"frac_learned_zero_std": 0.26}, "above 0.25", "above 0.5"),
        ({"frac_learned_zero_std": 0.51}, "above 0.5", "above 0.25"),
        ({"frac_learned_zero_std": 0.51, "reward/correct": 0.9}, "harder task", "more SFT"),
        ({"frac_learned_zero_std": 0.51, "reward/correct": 0.1}, "more SFT", "harder task"),
        ({"entropy": 0.09}, "--kl_coef", "groups"),
        ({"reward/errors": 3}, "failed on 3 completions", "groups"),
        ({"reward/timeouts": 2}, "too long on 2", "groups"),
        ({"completions/clipped_ratio": 0.21}, "--max_new_tokens", "groups"),
        ({"logp_diff/mean": 5.1e-7}, "--dtype=fp32", "groups"),
        ({"bad_steps": 1}, "the gradient was not finite", "groups"),
        ({"entropy": 2.1}, "lower --lr (this step's is 0.001)", "groups"),
        ({**APART, "train_set/p": 0.009}, "of 100 training problems 22.0% are solved", "groups"),
    ],
)
def test_warnings_in_words_when_something_begins(change, words, others):
    watch = watching()
    assert watch.look(QUIET) == []
    for edge in (
        {"frac_learned_zero_std": 0.25},
        {"entropy": 0.11},
        {"entropy": 1.9},
        {"completions/clipped_ratio": 0.2},
        {"logp_diff/mean": 4.9e-7},
        {**APART, "train_set/p": 0.011},
    ):
        assert watch.look({**QUIET, **edge}) == []
    (said,) = watch.look({**QUIET, **change})
    assert words in said and others not in said and "\n" not in said
    assert watch.look({**QUIET, **change}) == []  # once
    # And not again when the run is resumed.
    assert watching(json.loads(json.dumps(watch.state))).look({**QUIET, **change}) == []


def test_the_warnings_compare_with_the_first_step_also_after_a_resume():
    watch = watching()
    watch.look(QUIET)
    assert watching(watch.state).look({**QUIET, "entropy": 0.05})


def test_rounding_noise_in_fp64_is_no_warning():
    watch = watching()
    watch.look({**QUIET, "logp_diff/mean": 1e-17})
    assert watch.look({**QUIET, "logp_diff/mean": 1e-15}) == []


def said_at(name, values):
    """{number of a step: what is said} of a run in which only this number changes."""
    watch = watching()
    watch.look(QUIET)
    found = {}
    for number, value in enumerate(values):
        sentences = watch.look({**QUIET, name: value})
        if sentences:
            (found[number],) = sentences
    return found


def test_a_warning_is_said_again_when_it_has_become_clearly_worse():
    said = said_at("frac_learned_zero_std", [0.56, 0.6, 0.3, 0.7, 0.8, 0.56, 0.95, 1.0, 1.0])
    assert list(said) == [0, 4, 6, 7]
    assert "(above 0.5)" in said[0]
    assert "(above 0.75)" in said[4]
    assert said[7].startswith("100% of the groups")
    assert "so no reward moves the model" in said[7]

    # Other numbers: when they have doubled.
    assert list(said_at("reward/errors", [1, 1, 2, 3, 1, 4, 7, 8])) == [0, 2, 5, 7]
    assert list(said_at("entropy", [0.09, 0.06, 0.04, 0.06, 0.0])) == [0, 2, 4]
    assert list(said_at("logp_diff/mean", [6e-7, 9e-7, 1.1e-6, math.inf, math.nan])) == [0, 2, 3]


def test_a_warning_is_forgotten_after_fifty_steps_without_it():
    assert list(said_at("frac_learned_zero_std", [1.0] * 200)) == [0]
    assert list(said_at("frac_learned_zero_std", [1.0, *[0.1] * 49, 1.0])) == [0]
    assert list(said_at("frac_learned_zero_std", [1.0, *[0.1] * 50, 1.0])) == [0, 51]


def test_what_checkpoints_of_before_there_were_levels_have_said_is_not_said_again():
    watch = watching({"first": {"entropy": 1.0, "logp_diff/mean": 1e-7}, "said": ["dead 0.5"]})
    assert watch.look({**QUIET, "frac_learned_zero_std": 0.6}) == []
    assert watch.look({**QUIET, "frac_learned_zero_std": 1.0})
    watch = watching({"first": {}, "said": ["dead 0.25", "cut"]})
    assert watch.look({**QUIET, "frac_learned_zero_std": 0.3}) == []
    assert watch.look({**QUIET, "completions/clipped_ratio": 0.3}) == []
    assert watch.look({**QUIET, "frac_learned_zero_std": 0.6})


def test_the_cause_is_named_before_what_follows_from_it():
    watch = watching()
    watch.look(QUIET)
    cut = {"completions/clipped_ratio": 0.9, "frac_learned_zero_std": 1.0, "reward/correct": 0.0}
    noise, dead, cut_off = watch.look({**QUIET, **cut, "entropy": 5.65, "lr": 3e4})
    assert "tokens taken blindly have 5.70" in noise
    for sentence in (noise, dead, cut_off):
        assert "start again with a lower --lr (this step's is 30000)" in sentence
        assert "--max_new_tokens" not in sentence

    # The model that RL started from was noise.
    sentences = watching().look({**QUIET, **cut, "entropy": 5.65})
    assert len(sentences) == 3
    assert all("more SFT" in sentence and "--lr" not in sentence for sentence in sentences)

    # The reward failed.
    errors, dead = watching().look({**QUIET, "frac_learned_zero_std": 1.0, "reward/errors": 17})
    assert "mend that first" in dead
    assert "more SFT" not in dead
    errors, dead = watching().look({**QUIET, "frac_learned_zero_std": 1.0, "reward/errors": 16})
    assert "mend that first" not in dead

    # Completions are cut off.
    dead, _ = watching().look({**QUIET, **cut})
    assert "raise --max_new_tokens first" in dead


def test_a_line_of_base_says_speed_share_pass_and_time_to_come_in_100_columns(capsys):
    row = {"grad_norm": 13.761, "tok_per_s/learner": 1234567.8, "mfu": 0.453, "epoch": 11.204}
    row["val/bits_per_byte"] = 0.8121
    terminal.base_line(21400, 21400, row, [10.5, 10.7], 23 * 3600 + 120)
    line, val = capsys.readouterr().out.splitlines()
    assert "loss 10.600" in line
    assert line.endswith("grad 13.76  1,234,568 tok/s  MFU 45%  pass 11.20  ETA 23h02m")
    assert len(line) <= 100
    assert val.strip() == "val 0.812 bits/byte"
