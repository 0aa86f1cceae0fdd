"""The R1 and the plain form: the same problems and judge, with the answer found elsewhere."""

import pytest

from nanorl.tasks import get_task
from nanorl.tasks.problem import think_and_answer


def r1(thought, answer):
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, found",
    [
        (r1("2 + 2", "4"), (True, "4")),
        (" " + r1("a\nb", " 4 ").replace("><", ">\n<") + "\n", (True, " 4 ")),
        (r1("", ""), (True, "")),
        ("so: " + r1("a", "4"), (False, "4")),
        (r1("a", "4") + "!", (False, "4")),
        ("<answer>4</answer>", (False, "4")),
        (r1("<think>a", "4"), (False, "4")),
        (r1("a", "4") + "<answer>5</answer>", (False, "5")),
        ("<think>a</think><answer>4", (False, None)),
        ("<answer>4</answer><think>a</think>", (False, "4")),
        ("4", (False, None)),
        ("", (False, None)),
    ],
)
def test_think_and_answer(text, found):
    assert think_and_answer(text) == found


SUM = get_task("0-20", "val", template="r1")
ANSWER = SUM.problem(0).answer


@pytest.mark.parametrize(
    "text, total, parts",
    [
        (r1("so", ANSWER), 1.0, (1, 1, 1)),
        (r1("so", f" {ANSWER}. "), 1.0, (1, 1, 1)),
        (r1("so", "999"), 0.1, (1, 1, 0)),
        (r1("so", "many"), 0.1, (1, 0, 0)),
        (r1("so", ""), 0.1, (1, 0, 0)),
        (r1("so", f"5 or {ANSWER}"), 0.1, (1, 0, 0)),
        (r1("so", f"{ANSWER} or 5"), 0.1, (1, 0, 0)),
        (r1("so", f"junk #{ANSWER}"), 0.1, (1, 0, 0)),
        (r1("so", f"#{ANSWER}"), 0.1, (1, 0, 0)),
        (r1("so", f"x = {ANSWER}"), 0.1, (1, 0, 0)),
        (r1("so", f"${ANSWER} dollars" if ANSWER[0] != "-" else ANSWER), 1.0, (1, 1, 1)),
        (f"<answer>{ANSWER}</answer>", 0.9, (0, 1, 1)),
        (ANSWER, 0.0, (0, 0, 0)),
        ("#" + ANSWER, 0.0, (0, 0, 0)),
        ("", 0.0, (0, 0, 0)),
    ],
)
def test_r1_rewards_form_and_answer_apart(text, total, parts):
    reward = SUM.reward(SUM.problem(0), text)
    assert reward.total == pytest.approx(total)
    assert tuple(reward.parts[name] for name in ("format", "answered", "correct")) == parts


@pytest.mark.parametrize(
    "task, answer, right, wrong",
    [
        (
            "0-20",
            "-9",
            ["-9", "2 - 11 = -9", "The answer is -9.", "it is −9", "2-11=-9", "$-9$"],
            ["9", "-9 or 8", "2-9", "", "nine"],
        ),
        (
            "0-20",
            "5",
            ["The values are 3,4,5", "it is 5.", "4, 5", "15 - 5", "10/2"],
            ["3,4,5,6", "it is - 5", "the answer is 3/5", "10/3", "5/4"],
        ),
        ("0-20", "3", ["3"], ["3,4,5", "10/3"]),
        (
            "sum3",
            "1433",
            ["1433", "672 + 761 = 1,433.", "$1433", "It is 1433 dollars"],
            ["14330", "1433.5", "1,43"],
        ),
        (
            "comparison",
            "yes",
            ["Yes, 12 is greater", "no ... yes", "YES!"],
            ["No", "yesterday", "not"],
        ),
        ("binary", "101", ["5 is 101", "0101", "101 in binary."], ["1012", "5", "11"]),
    ],
)
def test_plain_reads_the_last_answer(task, answer, right, wrong):
    source = get_task(task, "val", template="plain")
    problem = source.problem(0)
    problem.answer = answer
    for text in right:
        assert source.reward(problem, text).total == 1, text
    for text in wrong:
        assert source.reward(problem, text).total == 0, text


@pytest.mark.parametrize(
    "task", ["0-20", "sum3", "chain4", "counting", "comparison", "binary", "spelling", "gsm8k"]
)
@pytest.mark.parametrize("template", ["r1", "plain"])
def test_demonstrations_earn_the_full_reward_and_say_nothing_of_the_problem_changes(
    task, template, request, monkeypatch
):
    if task == "gsm8k":
        monkeypatch.setenv("NANORL_DATA", request.getfixturevalue("real_data"))
    source = get_task(task, "train", template=template)
    plain = get_task(task, "train")
    assert len(source) == len(plain)
    roles = ["system", "user"] if template == "r1" else ["user"]
    for i in range(40):
        problem = source.problem(i)
        own = plain.problem(i)
        reward = source.reward(problem, source.solution(problem))
        assert reward.total == pytest.approx(1.0) and all(reward.parts.values())
        assert problem.prompt[-1] == own.prompt[-1]
        assert problem.answer == own.answer
        assert problem.meta == own.meta
        assert [m["role"] for m in problem.prompt] == roles


@pytest.mark.parametrize("text", ["no #yes", "yes or no", "no, yes", "", "yesterday"])
def test_r1_wants_one_word(text):
    source = get_task("comparison", "val", template="r1")
    problem = source.problem(0)
    problem.answer = "yes"
    assert source.reward(problem, r1("so", text)).total == pytest.approx(0.1)
    assert source.reward(problem, r1("so", " Yes. ")).total == pytest.approx(1.0)


OWN = """
from nanorl.tasks import Problem, Reward

class Own:
    marker, timeout = "#", 2.5
    def __init__(self, split="train"): pass
    def __len__(self): return 5
    def problem(self, index): return Problem([{"role": "user", "content": "x"}], "1")
    def reward(self, problem, completion): return Reward(float(completion == "#1"), {})
"""


def test_a_users_own_task_keeps_its_deadline_and_lacks_what_it_lacks(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    source = get_task(f"{tmp_path / 'own.py'}:Own", template="plain")
    assert source.timeout == 2.5 and not hasattr(source, "solution")
    assert source.reward(source.problem(0), "I say 1").total == 1


def test_signed_rewards_stay_signed_and_a_mixture_may_name_one_task():
    signed = get_task("0-20", "val", template="plain", rewards="signed")
    assert signed.reward(signed.problem(0), "no idea").total == -1
    settings = {"0-20.template": "r1", "0-20.format_weight": "0.3"}
    mixed = get_task("0-20=1,comparison=1", "val", **settings)
    assert {len(mixed.problem(i).prompt) for i in range(2)} == {1, 2}
    number = next(p for p in map(mixed.problem, range(2)) if len(p.prompt) == 2)
    assert mixed.reward(number, r1("", "999")).total == pytest.approx(0.3)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(template="r2"), "template is 'r2': it must be one of r1, plain"),
        (dict(template="r1", format_weight="2"), "format_weight is '2'"),
        (dict(template="plain", format_weight="0.5"), "only template=r1"),
        (dict(format_weight="0.1"), "format_weight"),
    ],
)
def test_mistakes_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        get_task("0-20", "val", **settings)
    with pytest.raises(ValueError, match="task countdown has no `marker`"):
        get_task("countdown", "val", template="r1")
