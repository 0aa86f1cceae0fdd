"""Which problems a step takes, and what is said of them before the first."""

import pytest

from nanorl import problems
from nanorl.problems import Problems
from scripts import RL, TOY, assert_same_run, call, rows, step_records


class Words:
    """A tokenizer whose tokens are words."""

    def render_prompt(self, messages):
        return messages[0]["content"].split()


def training(kind, limit=0, taken=0, longest=100):
    return Problems(
        TOY.removeprefix("--task=").replace("Toy", kind), "", 1, limit, taken, Words(), longest
    )


def indices(asked):
    return [int(problem.prompt[0]["content"].split()[2]) for _, problem in asked]


def test_a_problem_that_does_not_fit_is_passed_over_and_the_next_takes_its_turn():
    train = training("Uneven")
    first, second = train.take(0, 5), train.take(1, 9)
    assert sorted(indices(first + second)) == sorted(2 * [0, 1, 3, 4, 7, 8, 9])
    assert train.taken >= 14 + 3

    # What is taken next depends on how many were taken before, and on nothing else.
    again = training("Uneven")
    again.take(0, 5)
    resumed = training("Uneven", taken=again.taken)
    assert [number for number, _ in resumed.take(1, 9)] == [number for number, _ in second]
    assert [number for number, _ in training("Uneven").peek(5)] == [n for n, _ in first]
    numbers = [number for number, _ in first + second]
    assert numbers == sorted(set(numbers))


def test_what_a_step_left_out_is_named_once_unless_the_user_knows(monkeypatch):
    train = training("Uneven")
    train.take(0, 10)
    [sentence] = train.newly_left_out()
    assert "training problems are left out, such as problem(" in sentence
    assert "has 1,103 tokens: beside --max_new_tokens there is room for 100" in sentence
    train.take(1, 10)
    assert train.left_out and train.newly_left_out() == []
    known = training("Uneven")
    [look] = known.check(4, 0, 10)
    assert [index for index, _ in look["too_long"]] == [2, 5, 6]
    known.take(0, 10)
    assert len(known.left_out) >= 3 and known.newly_left_out() == []

    # Of a large set only the first are looked at.
    monkeypatch.setattr(problems, "LOOKED_AT", 4)
    large = training("Uneven")
    [look] = large.check(4, 0, 10)
    assert (look["n"], look["looked_at"], look["different"]) == (10, 4, 4)
    large.take(0, 10)
    [sentence] = large.newly_left_out()
    assert sentence.startswith("2 training problems")


@pytest.mark.parametrize(
    "kind, longest, per_step, words",
    [
        ("Uneven", 100, 8, "of 10 only 7 fit the model"),
        ("Toy", 2, 4, "no training problem of .*Toy fits the model: a prompt has 3 tokens"),
    ],
)
def test_too_few_that_fit_are_refused_before_the_first_step(kind, longest, per_step, words):
    with pytest.raises(ValueError, match=words):
        training(kind, longest=longest).check(per_step, 0, 10)


def test_even_if_nothing_that_comes_later_fits_a_run_ends(monkeypatch):
    with pytest.raises(ValueError, match="no training problem of .*Toy fits"):
        training("Toy", longest=2).take(0, 1)


@pytest.mark.parametrize(
    "kind, limit, n, different, shared",
    [("Toy", 0, 50, 50, 0), ("Toy", 8, 8, 8, 0), ("Everywhere", 8, 8, 8, 8), ("Same", 0, 50, 1, 1)],
)
def test_different_problems_and_held_out_ones_are_counted(kind, limit, n, different, shared):
    [look] = training(kind, limit).check(4, 0, 20)
    assert (look["n"], look["different"], look["shared"]) == (n, different, shared)
    assert look["held_out"] == (1 if kind == "Same" else 20)


def test_a_run_leaves_overlong_prompts_out_and_resumes_to_the_same_end(out, capsys):
    """Also where the held-out problems are of that kind."""
    run = [*RL, TOY.replace("Toy", "Uneven"), f"--model={out / 'a' / 'sft'}", "--steps=4"]
    assert call("train_rl.py", *run, "--run_name=uneven") is None
    said = capsys.readouterr().out
    assert "WARNING: 3 training problems are left out, such as problem(2), whose prompt has" in said
    assert "(3 prompts do not fit the model and count as not solved)" in said
    assert call("train_rl.py", *run, "--run_name=uneven2", "--steps=2") is None
    assert call("train_rl.py", *run, "--run_name=uneven2", "--resume=must") is None
    assert_same_run(out / "uneven" / "rl", out / "uneven2" / "rl", "step_000004")
    left_out = [row["left_out"] for row in rows(out / "uneven" / "rl")[1:]]
    # Passes so far: those that are left out have had their turn.
    epochs = [row["epoch"] for row in rows(out / "uneven" / "rl")[1:]]
    taken = [4 * step + sum(left_out[:step]) for step in range(1, len(epochs) + 1)]
    assert epochs == pytest.approx([number / 10 for number in taken])
    # 16 problems are 2 passes over 7 and a part of a third.
    assert 6 <= sum(left_out) <= 9
    assert not any(" now" in record["prompt"] for record in step_records(out / "uneven", 1))


def test_learning_by_heart_is_said(out, capsys):
    run = [*RL, TOY.replace("Toy", "ByHeart"), f"--model={out / 'a' / 'sft'}", "--eval_problems=20"]
    run += ["--steps=2", "--max_new_tokens=40"]
    assert call("train_rl.py", *run, "--run_name=heart", "--problems=20") is None
    said = capsys.readouterr().out
    assert "20 training problems (20 different, 0 among the 20 held-out ones)" in said
    before, _, after = rows(out / "heart" / "rl")
    for row in (before, after):
        assert row["train_set/n"] == row["val/n"] == 20
        assert row["train_set/accuracy"] > 0.5 > row["val/accuracy"] == 0
        assert row["train_set/p"] < 0.01
    assert "WARNING, step 2: of 20 training problems" in said and "learnt by heart" in said
    assert f"trained problems {after['train_set/accuracy']:.1%}" in said


def test_the_same_problems_in_both_splits_are_said(out, capsys):
    run = [*RL, TOY.replace("Toy", "Everywhere"), f"--model={out / 'a' / 'sft'}", "--steps=1"]
    assert call("train_rl.py", *run, "--run_name=everywhere", "--dry_run") is None
    said = capsys.readouterr().out
    assert "50 training problems (50 different, 10 among the 10 held-out ones)" in said
    assert "WARNING: 10 of the 10 held-out problems are training problems too" in said
    assert call("train_rl.py", *run, TOY.replace("Toy", "Same"), "--dry_run") is None
    assert "training problems are only 1 different ones" in capsys.readouterr().out


def test_only_of_a_fixed_set_are_problems_evaluated_and_they_are_the_first_that_were_asked(
    monkeypatch,
):
    monkeypatch.setattr(problems, "TRIED", 5)
    train = training("Toy")
    _, tried = train.fixed()
    assert tried == indices(train.take(0, 5))
    _, tried = training("Uneven").fixed()
    assert tried and not {2, 5, 6} & set(tried)
    monkeypatch.setattr(problems, "SMALL", 49)
    assert training("Toy").fixed()[1] == []
    assert len(training("Toy", limit=50).fixed()[1]) == 5
