"""From problems to micro-batches: what is trained on is what was sampled."""

import pytest
from conftest import toy_model

from nanorl import grpo, rollout
from nanorl.batch import pack
from nanorl.engine import Engine
from nanorl.report.metrics import rollout_metrics
from nanorl.sampling import Completion
from nanorl.tasks import Problem, Reward, get_task
from nanorl.tasks.countdown import Countdown


def made(prompt, completions, rewards, task=""):
    return rollout.Rollout(
        Problem([], "", task=task),
        prompt,
        [Completion(ids, [-0.1 * i for i in ids], done) for ids, done in completions],
        [str(ids) for ids, _ in completions],
        [Reward(r, {"correct": r}) for r in rewards],
        [None] * len(rewards),
    )


# Token 0 is sampled, ends a row, and is also the padding: only the record of what was sampled can tell them apart.
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
        row, positions = batch.ids[0].tolist(), batch.positions[0].tolist()
        for at, t, adv, w, lp in zip(
            *(
                x.split(batch.lengths.tolist())
                for x in (
                    batch.predicted_at,
                    batch.targets,
                    batch.advantages,
                    batch.token_weights,
                    batch.sampler_logprobs,
                )
            )
        ):
            first = int(at[0])
            prompt = row[first - positions[first] : first + 1]
            assert [row[i] for i in at[1:]] == t.tolist()[:-1]  # each input predicts the next
            assert [positions[i] for i in at] == list(
                range(len(prompt) - 1, len(prompt) - 1 + len(t))
            )
            seen.append((prompt + t.tolist(), t.tolist(), float(adv[0]), float(w[0]), lp.tolist()))
            assert (adv == adv[0]).all()
    expected = [
        (r.prompt_ids + c.ids, c.ids, float(x), 1 / len(c.ids), c.logprobs)
        for r, g in zip(ROLLOUTS, a)
        for c, x in zip(r.completions, g)
    ]
    assert sorted(seen) == sorted(expected)


class Bad:
    def reward(self, problem, text):
        if "x" in text:
            raise RuntimeError("no")
        return Reward(1.0)


def test_a_reward_that_raises_scores_what_silence_does_and_is_counted():
    rewards, failures = rollout.score(Bad(), None, ["a", "x", "b"], [True] * 3)
    errors = sum(f is not None for f in failures)
    assert [r.total for r in rewards] == [
        1.0,
        0.0,
        1.0,
    ] and errors == 1  # silence would have earned 1: never above 0

    class Signed(Bad):
        def reward(self, problem, text):
            return super().reward(problem, text) if text else Reward(-1.0)

    rewards, failures = rollout.score(Signed(), None, ["a", "x", "b"], [True] * 3)
    errors = sum(f is not None for f in failures)
    assert [r.total for r in rewards] == [
        1.0,
        -1.0,
        1.0,
    ] and errors == 1  # to break the verifier must not pay


@pytest.mark.parametrize("value", [1.0, None, Reward(float("nan"))])
def test_a_reward_of_another_kind_is_the_users_mistake(value):
    class Task:
        def reward(self, problem, text):
            return value

    with pytest.raises(ValueError, match="must give Reward"):
        rollout.score(Task(), None, ["a"], [True])


def test_a_completion_that_was_cut_off_earns_nothing():
    class Task:
        def reward(self, problem, text):
            return Reward(float(text), {"correct": float(text)})

    rewards, *_ = rollout.score(Task(), None, ["1", "1", "-1"], [True, False, False])
    assert [r.total for r in rewards] == [
        1.0,
        -1.0,
        -1.0,
    ]  # float("") raises: then the least of the others is what silence would earn
    assert [r.parts["correct"] for r in rewards] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("rewards, nothing", [("binary", 0), ("signed", -1), ("graded", -1)])
def test_what_was_cut_off_earns_what_silence_does_however_right_it_is(rewards, nothing):
    """Where a wrong answer costs something, rambling past the limit must not be the way around it."""
    task = get_task("0-20", rewards=rewards)
    problem = Problem([], "12", {"numbers": [7, 5], "signs": ["+"]})
    texts = ["#12", "#11", "#35", ""]
    scored, failures = rollout.score(task, problem, ["#12"] + texts, [True] + [False] * 4)
    errors = sum(f is not None for f in failures)
    assert [r.total for r in scored] == [1] + [nothing] * 4 and errors == 0
    assert all(r.parts == {"format": 0, "answered": 0, "correct": 0} for r in scored[1:])


def test_a_format_that_was_cut_off_earns_nothing_either(monkeypatch):
    monkeypatch.setattr("nanorl.tasks.countdown._problems", lambda *args: [])
    problem, text = (
        Problem([], "33", {"numbers": [3, 7, 12]}),
        "<think></think><answer>3*7+12</answer>",
    )
    (whole, cut), *_ = rollout.score(Countdown(), problem, [text, text], [True, False])
    assert (whole.total, cut.total) == (1, 0) and set(cut.parts.values()) == {0}


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
    errors = sum(f is not None for f in failures)
    assert [r.total for r in scored] == [
        expected,
        otherwise,
    ] and errors == 0  # the silence that raised was nobody's


def test_a_reward_that_raises_on_what_was_cut_off_is_counted():
    scored, failures = rollout.score(Bad(), None, ["x", "a"], [False, False])
    errors = sum(f is not None for f in failures)
    assert [r.total for r in scored] == [0, 0] and errors == 1


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
    finished = [(c, t) for r in result for c, t in zip(r.completions, r.texts) if c.finished]
    assert finished, "no row stopped: the test would show nothing"
    for c, text in finished:
        assert c.ids[-1] in tokenizer.stop_ids and text == tokenizer.decode(c.ids[:-1])
    assert result[0].texts != result[1].texts  # another key, other samples
    assert result[0].prompt_ids == tokenizer.render_prompt(problems[0].prompt)


def test_keys_depend_on_seed_step_and_problem_only():
    keys = {rollout.prompt_key(s, t, i) for s in range(3) for t in range(10) for i in range(100)}
    assert len(keys) == 3000 and all(0 <= k < 2**63 for k in keys)


def test_metrics_by_hand():
    m = rollout_metrics(ROLLOUTS)
    assert m["reward"] == 0.25 and m["reward/correct"] == 0.25
    assert m["frac_reward_zero_std"] == 0.5
    assert m["completions/mean_length"] == 13 / 4 and m["completions/clipped_ratio"] == 0.25
    assert m["tokens_with_signal"] == pytest.approx(5 / 13)
    assert m["reward_std"] == pytest.approx((0.5**0.5 + 0) / 2)
    assert not [name for name in m if name.startswith("reward_of/")]  # of a mixture only


def test_metrics_give_the_mean_reward_of_each_task_of_a_mixture():
    one = [([5, 0], True)] * 2
    m = rollout_metrics(
        [
            made([7], one, [1.0, 0.0], "sum3"),
            made([7], one, [-1.0, -1.0], "own.py:A"),
            made([7], one, [1.0, 1.0], "sum3"),
        ]
    )
    assert {name: value for name, value in m.items() if name.startswith("reward_of/")} == {
        "reward_of/sum3": 0.75,
        "reward_of/own.py:A": -1.0,
    }
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
    assert [r.total for r in rewards] == pytest.approx(
        [1.2, 0.2, 0.0]
    )  # silence has the format here, and is worth no more than 0
    with pytest.raises(
        ValueError, match="names style: the parts of this task's reward are format, correct"
    ):
        rollout.score(Task(), None, ["good"], [True], part_weights={"style": 1.0})


def test_accuracy_given_format_by_hand():
    def group(parts):
        r = made([7], [([5, 0], True)] * len(parts), [0.0] * len(parts))
        r.rewards = [Reward(p["correct"], p) for p in parts]
        return r

    formed = lambda correct: {"format": 1.0, "correct": correct}
    m = rollout_metrics(
        [group([formed(1.0), formed(0.0), {"format": 0.0, "correct": 1.0}, formed(0.0)])]
    )
    assert m["accuracy_given_format"] == pytest.approx(1 / 3)
    assert "accuracy_given_format" not in rollout_metrics(
        [group([{"format": 0.0, "correct": 0.0}] * 2)]
    )
    assert "accuracy_given_format" not in rollout_metrics(ROLLOUTS)  # no part of that name
