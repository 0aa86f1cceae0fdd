"""From problems to micro-batches: what is trained on is what was sampled."""

import json

import numpy as np
import pytest
import torch

from conftest import toy_model
from nanorl import grpo, rollout
from nanorl.batch import pack
from nanorl.engine import Engine
from nanorl.report.forecast import learning_lines
from nanorl.report.metrics import rollout_metrics
from nanorl.sampling import Completion
from nanorl.tasks import Problem, Reward, get_task
from nanorl.tasks.countdown import Countdown
from nanorl.tasks.pool import RAISED, Failure


def made(prompt, completions, rewards, task=""):
    """A Rollout by hand. completions: (ids, finished) pairs; rewards: a number each."""
    return rollout.Rollout(
        problem=Problem([], "", task=task),
        prompt_ids=prompt,
        completions=[
            Completion(ids, [-0.1 * i for i in ids], finished) for ids, finished in completions
        ],
        texts=[str(ids) for ids, _ in completions],
        rewards=[Reward(r, {"correct": r}) for r in rewards],
        failures=[None] * len(rewards),
    )


# Token 0 is sampled, ends a row, and is also the padding. Only the record of what was sampled can
# tell these apart.
ROLLOUTS = [
    made([7, 8], [([5, 0, 4, 0], True), ([0], True)], [1.0, 0.0]),
    made([9], [([1, 2, 3, 4, 5, 6], False), ([6, 6], True)], [0.0, 0.0]),
]


@pytest.mark.parametrize("budget", [1, 8, 1000])
def test_targets_are_exactly_the_sampled_tokens(budget):
    a = grpo.advantages(rollout.reward_table(ROLLOUTS, 2))
    lengths = rollout.length_table(ROLLOUTS, 2)
    assert lengths.tolist() == [[4, 1], [6, 2]]

    seen = []
    for batch in pack(ROLLOUTS, a, grpo.token_weights(lengths, "sequence"), budget, "cpu"):
        assert batch.ids.numel() <= budget or len(batch.lengths) == 1
        ids = batch.ids[0].tolist()
        positions = batch.positions[0].tolist()
        # What the batch holds of each sampled token, cut into completions.
        fields = (
            batch.predicted_at,
            batch.targets,
            batch.advantages,
            batch.token_weights,
            batch.sampler_logprobs,
        )
        by_completion = zip(*(field.split(batch.lengths.tolist()) for field in fields))
        for at, targets, advantages, weights, logprobs in by_completion:
            sampled = targets.tolist()
            first = int(at[0])
            prompt = ids[first - positions[first] : first + 1]
            # Each input predicts the next, and stands right after the prompt.
            assert [ids[i] for i in at[1:]] == sampled[:-1]
            start = len(prompt) - 1
            assert [positions[i] for i in at] == list(range(start, start + len(sampled)))
            assert (advantages == advantages[0]).all()
            row = (float(advantages[0]), float(weights[0]), logprobs.tolist())
            seen.append((prompt + sampled, sampled, *row))

    expected = []
    for group, group_advantages in zip(ROLLOUTS, a):
        for c, advantage in zip(group.completions, group_advantages):
            row = (float(advantage), 1 / len(c.ids), c.logprobs)
            expected.append((group.prompt_ids + c.ids, c.ids, *row))
    assert sorted(seen) == sorted(expected)


class Raising:
    """A reward that raises where the text has an x."""

    def reward(self, problem, text):
        if "x" in text:
            raise RuntimeError("no")
        return Reward(1.0)


def count(failures):
    return sum(failure is not None for failure in failures)


def test_a_reward_that_raises_scores_what_silence_does_and_is_counted():
    # Silence would have earned 1, but a failure earns never above 0.
    rewards, failures = rollout.score(Raising(), None, ["a", "x", "b"], [True] * 3)
    assert [r.total for r in rewards] == [1.0, 0.0, 1.0]
    assert count(failures) == 1

    class Signed(Raising):
        def reward(self, problem, text):
            return super().reward(problem, text) if text else Reward(-1.0)

    # To break the verifier must not pay.
    rewards, failures = rollout.score(Signed(), None, ["a", "x", "b"], [True] * 3)
    assert [r.total for r in rewards] == [1.0, -1.0, 1.0]
    assert count(failures) == 1


@pytest.mark.parametrize(
    "value, words",
    [
        (1.0, "gave 1.0: it must give Reward"),
        (None, "gave None: it must give Reward"),
        (Reward(float("nan")), "total is nan"),
        (Reward(np.float32("inf")), "total is inf"),
        (Reward(None), "total is None"),
        (Reward(1.0, {"steps": None}), "steps is None"),
        (Reward(1.0, {"steps": np.array([1, 2])}), "no number"),
        (Reward(1.0, {"steps": torch.tensor(float("nan"))}), "steps is nan"),
        (SystemExit(0), "SystemExit: 0"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_a_reward_that_is_none_or_not_finite_has_failed(value, words):
    class Task:
        def reward(self, problem, text):
            if isinstance(value, BaseException):
                raise value
            return value

    [reward], [failure] = rollout.score(Task(), None, ["a"], [True])
    assert reward == Reward(0.0) and words in failure.text


def test_numpys_and_torchs_numbers_become_pythons():
    class Task:
        def reward(self, problem, text):
            return Reward(np.float32(0.5), {"n": np.int64(3), "t": torch.tensor(1.5), "ok": True})

    [reward], [failure] = rollout.score(Task(), None, ["a"], [True])
    assert failure is None
    assert json.dumps(vars(reward)) == '{"total": 0.5, "parts": {"n": 3.0, "t": 1.5, "ok": 1.0}}'


def test_ctrl_c_during_a_reward_is_the_users():
    class Task:
        def reward(self, problem, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.score(Task(), None, ["a"], [True])


def test_a_completion_that_was_cut_off_earns_nothing():
    class Task:
        def reward(self, problem, text):
            return Reward(float(text), {"correct": float(text)})

    rewards, *_ = rollout.score(Task(), None, ["1", "1", "-1"], [True, False, False])
    # float("") raises: then the least of the others is what silence would earn.
    assert [r.total for r in rewards] == [1.0, -1.0, -1.0]
    assert [r.parts["correct"] for r in rewards] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("rewards, nothing", [("binary", 0), ("signed", -1), ("graded", -1)])
def test_what_was_cut_off_earns_what_silence_does_however_right_it_is(rewards, nothing):
    """Where a wrong answer costs something, rambling past the limit must not avoid the cost."""
    task = get_task("0-20", rewards=rewards)
    problem = Problem([], "12", {"numbers": [7, 5], "signs": ["+"]})
    texts = ["#12", "#11", "#35", ""]
    scored, failures = rollout.score(task, problem, ["#12"] + texts, [True] + [False] * 4)
    assert [r.total for r in scored] == [1] + [nothing] * 4
    assert count(failures) == 0
    no_parts = {"format": 0, "answered": 0, "correct": 0}
    assert all(r.parts == no_parts for r in scored[1:])


def test_a_format_that_was_cut_off_earns_nothing_either(monkeypatch):
    monkeypatch.setattr("nanorl.tasks.countdown._problems", lambda *args: [])
    problem = Problem([], "33", {"numbers": [3, 7, 12]})
    text = "<think></think><answer>3*7+12</answer>"
    (whole, cut), *_ = rollout.score(Countdown(), problem, [text, text], [True, False])
    assert (whole.total, cut.total) == (1, 0)
    assert set(cut.parts.values()) == {0}


@pytest.mark.parametrize(
    "silence, otherwise, expected",
    [
        (1.0, 0.5, 0.0),
        (1.0, -0.5, -0.5),
        (-2.0, 1.0, -2.0),
        (-2.0, -3.0, -3.0),
        (None, 1.0, 0.0),
        (None, -1.0, -1.0),
    ],
)
def test_what_was_cut_off_earns_no_more_than_silence_and_than_zero(silence, otherwise, expected):
    class Task:
        def reward(self, problem, text):
            if not text and silence is None:
                raise RuntimeError("no")
            return Reward(otherwise if text else silence)

    scored, failures = rollout.score(Task(), None, ["a", "a"], [False, True])
    assert [r.total for r in scored] == [expected, otherwise]
    assert count(failures) == 0  # a silence that raised was nobody's completion


def test_a_reward_that_raises_on_what_was_cut_off_is_counted():
    scored, failures = rollout.score(Raising(), None, ["x", "a"], [False, False])
    assert [r.total for r in scored] == [0, 0]
    assert count(failures) == 1


def test_a_reward_is_asked_once_a_completion_when_all_are_whole():
    asked = []

    class Task:
        def reward(self, problem, text):
            asked.append(text)
            return Reward(0.0)

    rollout.score(Task(), None, ["a", "b"], [True, True])
    assert asked == ["a", "b"]


def test_generate_strips_the_stop_token_in_the_text_only(tokenizer):
    class Task:
        def reward(self, problem, text):
            return Reward(float(len(text)))

    model = toy_model(vocab=tokenizer.n_tokens)
    problems = [Problem([{"role": "user", "content": "12 + 34"}], "46")] * 2
    result = rollout.generate(
        Engine(model),
        tokenizer,
        Task(),
        problems,
        [1, 2],
        samples_per_prompt=8,
        max_new_tokens=80,
        temperature=1.0,
    )
    finished = []
    for r in result:
        finished += [(c, text) for c, text in zip(r.completions, r.texts) if c.finished]
    assert finished, "no row stopped: the test would show nothing"
    for c, text in finished:
        assert c.ids[-1] in tokenizer.stop_ids
        assert text == tokenizer.decode(c.ids[:-1])
    assert result[0].texts != result[1].texts  # another key, other samples
    assert result[0].prompt_ids == tokenizer.render_prompt(problems[0].prompt)


def test_keys_depend_on_seed_step_and_problem_only():
    keys = {rollout.prompt_key(s, t, i) for s in range(3) for t in range(10) for i in range(100)}
    assert len(keys) == 3000
    assert all(0 <= k < 2**63 for k in keys)


def test_metrics_by_hand():
    m = rollout_metrics(ROLLOUTS)
    assert m["reward"] == 0.25
    assert m["reward/correct"] == 0.25
    assert m["frac_reward_zero_std"] == 0.5
    assert m["completions/mean_length"] == 13 / 4
    assert m["completions/clipped_ratio"] == 0.25
    assert m["tokens_with_signal"] == pytest.approx(5 / 13)
    assert m["reward_std"] == pytest.approx((0.5**0.5 + 0) / 2)
    assert not [name for name in m if name.startswith("reward_of/")]  # of a mixture only


def test_metrics_give_the_mean_reward_of_each_task_of_a_mixture():
    one = [([5, 0], True)] * 2
    mixture = [
        made([7], one, [1.0, 0.0], "sum3"),
        made([7], one, [-1.0, -1.0], "own.py:A"),
        made([7], one, [1.0, 1.0], "sum3"),
    ]
    m = rollout_metrics(mixture)
    by_task = {name: value for name, value in m.items() if name.startswith("reward_of/")}
    assert by_task == {"reward_of/sum3": 0.75, "reward_of/own.py:A": -1.0}
    assert m["reward"] == pytest.approx(1 / 6)


def test_reward_weights_choose_what_the_parts_count():
    class Task:
        def reward(self, problem, text):
            return Reward(1.0, {"format": 1.0, "correct": float(text == "good")})

    rewards, *_ = rollout.score(
        Task(),
        None,
        ["good", "bad", "good"],
        [True, True, False],
        part_weights={"correct": 1.0, "format": 0.2},
    )
    # Silence has the format in this task, and is worth no more than 0.
    assert [r.total for r in rewards] == pytest.approx([1.2, 0.2, 0.0])
    message = "names style: the parts of this task's reward are format, correct"
    with pytest.raises(ValueError, match=message):
        rollout.score(Task(), None, ["good"], [True], part_weights={"style": 1.0})


def test_accuracy_given_format_by_hand():
    def group(parts):
        r = made([7], [([5, 0], True)] * len(parts), [0.0] * len(parts))
        r.rewards = [Reward(p["correct"], p) for p in parts]
        return r

    right = {"format": 1.0, "correct": 1.0}
    wrong = {"format": 1.0, "correct": 0.0}
    right_without_format = {"format": 0.0, "correct": 1.0}
    wrong_without_format = {"format": 0.0, "correct": 0.0}

    m = rollout_metrics([group([right, wrong, right_without_format, wrong])])
    assert m["accuracy_given_format"] == pytest.approx(1 / 3)

    # No completion has the format; no part has that name.
    without = rollout_metrics([group([wrong_without_format] * 2)])
    assert "accuracy_given_format" not in without
    assert "accuracy_given_format" not in rollout_metrics(ROLLOUTS)


def test_micro_batches_are_filled_to_the_last_token():
    weights = grpo.token_weights(rollout.length_table(ROLLOUTS, 2), "sequence")
    every = sum(batch.ids.numel() for batch in pack(ROLLOUTS, weights, weights, 1000, "cpu"))
    assert len(pack(ROLLOUTS, weights, weights, every, "cpu")) == 1
    assert len(pack(ROLLOUTS, weights, weights, every - 1, "cpu")) == 2


def test_a_probe_without_a_solved_sample_names_what_is_behind_it():
    def said(finished, failures):
        tried = made([7], [([1, 2], done) for done in finished], [0.0] * 4)
        tried.failures = failures
        return "\n".join(learning_lines([tried], 1.0, 10))

    none, failed = [None] * 4, Failure(RAISED, "no verifier")
    hard = said([True] * 4, none)
    assert "too hard for this model" in hard
    assert "--max_new_tokens" not in hard

    cut_off = said([False] * 3 + [True], none)
    assert "raise --max_new_tokens first" in cut_off
    assert "too hard" not in cut_off

    broken = said([False] * 4, [failed] * 3 + [None])
    assert "Mend its reward() first" in broken
    assert "too hard" not in broken
    assert "--max_new_tokens" not in broken
    assert "too hard" in said([True] * 4, [failed] * 2 + [None] * 2)
