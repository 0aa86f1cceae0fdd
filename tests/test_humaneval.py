"""HumanEval: where the code is found in a completion, and that the tests tell right from wrong."""

import json

import pytest

from nanorl.tasks.humaneval import HumanEval, find_code
from nanorl.tasks.pool import RewardPool

ROWS = [
    {
        "task_id": "HumanEval/0",
        "entry_point": "total",
        "prompt": (
            "from typing import List\n"
            "\n"
            "\n"
            "def total(xs: List[int]) -> int:\n"
            '    """ Sum.\n'
            "    >>> total([1, 2])\n"
            "    3\n"
            '    """\n'
        ),
        "canonical_solution": "    return sum(xs)\n",
        "test": (
            "\n"
            "\n"
            "METADATA = {}\n"
            "\n"
            "\n"
            "def check(candidate):\n"
            "    assert candidate([1, 2]) == 3\n"
            "    assert candidate([]) == 0\n"
        ),
    },
    {
        "task_id": "HumanEval/1",
        "entry_point": "decode",
        "prompt": (
            "def encode(s: str):\n"
            "    return s[::-1]\n"
            "\n"
            "\n"
            "def decode(s: str):\n"
            '    """ Undo encode. """\n'
        ),
        "canonical_solution": "    return encode(s)\n",
        "test": (
            "def check(candidate):\n"
            "    assert candidate(encode('abc')) == 'abc'\n"
            "    assert decode('ba') == 'ab'\n"
        ),
    },
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    return HumanEval(allow_code=True)


WHOLE = "from typing import List\ndef total(xs: List[int]):\n    return sum(xs)\n"


@pytest.mark.parametrize(
    "completion, parts",
    [
        (f"Here it is:\n```python\n{WHOLE}```\nIt adds.", (1, 1, 1)),
        # Cut off after the code.
        (f"```python\n{WHOLE}", (1, 1, 1)),
        (f"```\n{WHOLE}```\n```python\nprint(total([1]))\n```", (1, 1, 1)),
        (f"Use:\n```python\ntotal([1])\n```\nCode:\n```python\n{WHOLE}```", (1, 1, 1)),
        # Without the prompt's import.
        ("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", (1, 1, 1)),
        (WHOLE, (0, 1, 1)),
        ("    return sum(xs)\n", (0, 1, 1)),
        ("    return sum(\n        xs\n)\n\n\ndef other():\n    never closed (\n", (0, 1, 1)),
        ("    return sum(xs)\nprint(total('x'))\n", (0, 1, 1)),
        ("```python\n    return sum(xs)\n```", (1, 1, 1)),
        ("    return 3\n", (0, 1, 0)),
        # The body alone, at column 0.
        ("```python\nreturn sum(xs)\n```", (1, 1, 1)),
        # Of two functions the last counts.
        (
            f"The question:\n```python\n{ROWS[0]['prompt']}```\nMy answer:\n```python\n{WHOLE}```",
            (1, 1, 1),
        ),
        (
            f"```python\ndef total(xs):\n    return 0\n```\nWait, better:\n```python\n{WHOLE}```",
            (1, 1, 1),
        ),
        # In a list.
        ("1. Code:\n   ```python\n   def total(xs):\n       return sum(xs)\n   ```", (1, 1, 1)),
        # The import, a helper or a constant in a block of its own, before or after.
        (
            "```python\nimport math\n```\nThen:\n"
            "```python\ndef total(xs):\n    return math.fsum(xs)\n```",
            (1, 1, 1),
        ),
        (
            "```python\ndef total(xs):\n    return add(xs) + ZERO\n```\nwhere\n"
            "```python\nZERO = 0\ndef add(xs):\n    return sum(xs)\n\nprint(total([1])[0])\n```",
            (1, 1, 1),
        ),
        (
            "```python\nimport math\n```\n```python\n    return math.fsum(xs)\n```",
            (1, 1, 1),
        ),
        # An outline's own helper does not come before the last one.
        (
            f"```python\ndef sum(xs):\n    return 0\n```\n```python\n"
            f"def sum(xs):\n    return len(xs) and 3\n{WHOLE}```",
            (1, 1, 1),
        ),
        # A fence that opens on a line of words, or closes on a line of code.
        (f"Here it is: ```python\n{WHOLE}```\nIt adds.", (1, 1, 1)),
        ("```python\ndef total(xs):\n    return sum(xs)```\nIt adds.", (1, 1, 1)),
        # The prompt's fence goes on, and is closed.
        ("    return sum(xs)\n```\n\nIt adds them:\n\n```\ntotal([1])\n```", (0, 1, 1)),
        ("    return sum(xs)\n```\n", (0, 1, 1)),
        ("return sum(xs)\n```", (0, 1, 1)),
        (f"{WHOLE}```\nIt adds them.", (0, 1, 1)),
        # A body that is indented by another width, or whose first line has lost its indentation.
        ("   return sum(xs)", (0, 1, 1)),
        ("```python\n  if xs:\n    return sum(xs)\n  return 0\n```", (1, 1, 1)),
        (" n = sum(xs)\n return n\n", (0, 1, 1)),
        ("n = sum(xs)\n    return n\n", (0, 1, 1)),
        ("if xs:\n        return sum(xs)\n    return 0\n\nprint(total('x'))", (0, 1, 1)),
        # A body at column 0 whose returns are nested, and words after it.
        ("```python\nif xs:\n    return sum(xs)\nelse:\n    return 0\n```", (1, 1, 1)),
        ("for _ in range(1):\n    return sum(xs)\nIt adds them up.", (0, 1, 1)),
        (f"```python\nfrom __future__ import annotations\n{WHOLE}```", (1, 1, 1)),
        # No fence, and words around it.
        (f"Here is the function:\n\n{WHOLE}\nIt adds them up, doesn't it?", (0, 1, 1)),
        (
            "import math\ndef total(xs):\n    return math.fsum(xs)\nExplanation: fsum is exact",
            (0, 1, 1),
        ),
        ("```python\ndef total(xs):\n    return sum(xs) +\n```", (1, 1, 0)),
        ("```python\ndef sum_up(xs):\n    return sum(xs)\n```", (1, 0, 0)),
        ("I do not know.", (0, 0, 0)),
        ("", (0, 0, 0)),
        ("   \n", (0, 0, 0)),
        # Half of a surrogate pair.
        ("```python\n\ud800def total(xs):\n    return sum(xs)\n```", (1, 0, 0)),
    ],
)
def test_the_code_is_found_and_judged(task, completion, parts):
    reward = task.reward(task.problem(0), completion)
    found = (reward.parts["format"], reward.parts["answered"], reward.parts["correct"])
    assert found == parts
    assert reward.total == parts[2]


def test_tests_may_use_the_prompts_helpers(task):
    problem = task.problem(1)
    assert task.reward(problem, "    return s[::-1]").total == 1
    assert task.reward(problem, "    return s").total == 0
    assert task.reward(problem, "```python\ndef decode(s):\n    return encode(s)\n```").total == 1


def test_problem_and_solution(task):
    problem = task.problem(0)
    assert len(task) == 2 and problem.answer == "total" and problem.prompt[0]["role"] == "user"
    assert f"```python\n{ROWS[0]['prompt'].strip()}\n```" in problem.prompt[0]["content"]
    assert "sum(xs)" not in problem.prompt[0]["content"]
    assert "check" not in problem.prompt[0]["content"]
    for problem in (task.problem(0), task.problem(1)):
        reward = task.reward(problem, task.solution(problem))
        assert reward.parts == {"format": 1, "answered": 1, "correct": 1}


def test_a_definition_of_another_name_is_not_the_function():
    assert find_code("def totals(x):\n    return 1\n", "total") == ("", False)
    found = find_code("x\n```\ndef total(x): return 1\n```", "total")
    assert found == ("def total(x): return 1\n", True)


def test_code_runs_only_when_allowed(task, monkeypatch):
    for yes in (True, "true", "yes", "1", "True"):
        assert len(HumanEval(allow_code=yes)) == 2
    for no in (
        {},
        {"allow_code": False},
        {"allow_code": "false"},
        {"allow_code": "no"},
        {"allow_code": "0"},
    ):
        with pytest.raises(ValueError, match="guard and not a jail"):
            HumanEval(**no)
    with pytest.raises(ValueError, match="allow_code is 'perhaps'"):
        HumanEval(allow_code="perhaps")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="--split=test"):
            HumanEval(split, allow_code=True)


def test_rewards_come_from_worker_processes(task, tmp_path):
    """A program that hangs is over before the pool would kill its worker."""
    (tmp_path / "quick.py").write_text(
        "from functools import partial\n"
        "from nanorl.tasks import humaneval\n"
        "humaneval.run = partial(humaneval.run, seconds=1.0)\n"
        "HumanEval = humaneval.HumanEval\n"
    )
    recipe = (f"{tmp_path / 'quick.py'}:HumanEval", "test", {"allow_code": "true"})
    pool = RewardPool(recipe, task.timeout, workers=2)
    texts = [
        "    return sum(xs)",
        "    while True: pass",
        "    return 3",
        "    import os\n    os._exit(0)",
    ]
    try:
        rewards = pool.judge([(task.problem(0), text) for text in texts])
        assert [reward.total for reward in rewards] == [1, 0, 0, 0]
        assert len(pool.workers) == 2  # and none was killed
    finally:
        pool.close()


@pytest.mark.slow
def test_published_problems(real_data, monkeypatch):
    """Every canonical solution passes, whole and as the prompt's continuation.

    No solution passes that returns nothing or something else.
    """
    monkeypatch.setenv("NANORL_DATA", real_data)
    task = HumanEval(allow_code=True)
    failed = {"format": 0, "answered": 1, "correct": 0}
    for i in range(len(task)):
        problem = task.problem(i)
        assert task.reward(problem, task.solution(problem)).total == 1, problem.answer
        assert task.reward(problem, problem.meta["canonical_solution"]).total == 1, problem.answer
        for wrong in (
            "    return None",
            "    return 1",
            "    return ''",
            "    return []",
            "    raise SystemExit(0)",
        ):
            assert task.reward(problem, wrong).parts == failed, (problem.answer, wrong)
