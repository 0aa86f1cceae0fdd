"""Generated arithmetic: `Calculate: 457 + 655 = ` -> `#1112`, at once or worked out before it."""

import random
from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.problem import (
    REWARDS,
    STYLES,
    Problem,
    coin,
    judged,
    one_of,
    shows_working,
    split_rows,
)

MARKER = "#"
SIGNS = "+-*"
WRITTEN = {"+": "+", "-": "-", "*": "×"}  # as a problem shows them


def _pairs(a, b, signs):
    """All (sign, a, b)."""
    grid = np.meshgrid([SIGNS.index(s) for s in signs], np.arange(*a), np.arange(*b), indexing="ij")
    return np.stack([g.ravel() for g in grid], axis=1)


def _chains(n=1_000_000):
    """The first `n` of endlessly many (a, sign, b, sign, c, sign, d, sign, e) with numbers 1..99 and + or -."""
    rng = np.random.default_rng(20260101)
    columns = [rng.integers(1, 100, n) if i % 2 == 0 else rng.integers(0, 2, n) for i in range(9)]
    return np.unique(np.stack(columns, axis=1), axis=0)


# name -> (every problem as a row of integers, what it is)
PRESETS = {
    "sum3": (
        lambda: _pairs((100, 1000), (100, 1000), "+"),
        "sums of two three-digit numbers, 810,000",
    ),
    "0-20": (
        lambda: _pairs((0, 21), (0, 21), "+-*"),
        "a + b, a - b, a × b with numbers 0 to 20, 1,323",
    ),
    "2-digit": (
        lambda: _pairs((10, 100), (10, 100), "+-"),
        "a + b, a - b with two-digit numbers, 16,200",
    ),
    "chain4": (_chains, "four additions or subtractions in a row, numbers 1 to 99, a million"),
    "3x2": (lambda: _pairs((100, 1000), (10, 100), "*"), "three-digit × two-digit, 81,000"),
}


@lru_cache
def _table(preset, split):
    """The split's problems, (N, columns) int64. a + b and b + a (and products) share a split."""
    table = PRESETS[preset][0]()
    content = table.copy()
    if table.shape[1] == 3:
        commutes = table[:, 0] != SIGNS.index("-")
        content[commutes, 1:] = np.sort(table[commutes, 1:], axis=1)
    return split_rows(table, content, split)


# ---- working it out, the way it is written on paper, least significant column first -------------------------


def add_by_columns(a, b):
    """457, 655 -> ['7+5=12', '5+5+1=11', '4+6+1=11']"""
    steps, carry = [], 0
    for da, db in zip(*_columns(a, b)):
        total = da + db + carry
        steps.append(f"{da}+{db}{'+1' if carry else ''}={total}")
        carry = total // 10
    return steps


def subtract_by_columns(a, b):
    """For a >= b; a column that falls short borrows ten: 52, 17 -> ['12-7=5', '4-1=3']"""
    steps, borrow = [], 0
    for da, db in zip(*_columns(a, b)):
        da -= borrow
        borrow = int(da < db)
        steps.append(f"{da + 10 * borrow}-{db}={da + 10 * borrow - db}")
    return steps


def _columns(a, b):
    width = max(len(str(a)), len(str(b)))
    return [int(d) for d in reversed(str(a).zfill(width))], [
        int(d) for d in reversed(str(b).zfill(width))
    ]


def work_out(sign, a, b):
    """One operation on non-negative numbers, in steps."""
    if sign == "+":
        return add_by_columns(a, b)
    if sign == "-":
        return subtract_by_columns(a, b) if a >= b else [f"{a}<{b}"] + subtract_by_columns(b, a)
    places = [int(d) * 10**i for i, d in enumerate(reversed(str(b)))]
    products = [f"{a}*{p}={a * p}" for p in places]
    return (
        products + ["+".join(str(a * p) for p in places) + f"={a * b}"]
        if len(places) > 1
        else products
    )


def calculate(sign, a, b):
    return a + b if sign == "+" else a - b if sign == "-" else a * b


class Arithmetic:
    """preset: one of PRESETS. demonstrations: what solution() writes: `direct` the answer at once, `worked` its
    steps before it, `mixed` half of the problems each. instruction: a sentence put before the problem.
    precision: an answer counts when it is within half a unit of this decimal place (default: exact). rewards: `binary`
    1 or 0, `signed` 1 or -1, `graded` (see reward)."""

    marker = MARKER  # what templates.py needs

    def __init__(
        self,
        split="train",
        preset="sum3",
        demonstrations="mixed",
        instruction="",
        precision=None,
        rewards="binary",
    ):
        one_of("preset", preset, PRESETS)
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, (*REWARDS, "graded"))
        if precision is not None and not str(precision).isdecimal():
            raise ValueError(
                f"precision is {precision!r}: it must be a number of decimal places, such as 2"
            )
        self.rows, self.demonstrations, self.instruction, self.rewards = (
            _table(preset, split),
            demonstrations,
            instruction,
            rewards,
        )
        self.by_size = preset == "3x2"  # large answers: graded by how many per cent they are off
        self.tolerance = 0 if precision is None else f"5e-{int(precision) + 1}"

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = [int(x) for x in self.rows[index]]
        if len(row) == 3:
            numbers, signs = row[1:], [SIGNS[row[0]]]
        else:
            numbers, signs = row[0::2], [SIGNS[s] for s in row[1::2]]
        answer = numbers[0]
        for sign, n in zip(signs, numbers[1:]):
            answer = calculate(sign, answer, n)
        text = " ".join(
            [str(numbers[0])] + [f"{WRITTEN[s]} {n}" for s, n in zip(signs, numbers[1:])]
        )
        before = self.instruction + " " if self.instruction else ""
        prompt = [{"role": "user", "content": f"{before}Calculate: {text} = "}]
        return Problem(prompt, str(answer), {"numbers": numbers, "signs": signs})

    def _worked(self, problem):
        numbers, signs = problem.meta["numbers"], problem.meta["signs"]
        if len(signs) == 1:
            if signs == ["+"] and coin("order", problem):  # either number may be written first
                numbers = numbers[::-1]
            return " ".join(work_out(signs[0], *numbers))
        steps, value = [], numbers[0]
        for sign, n in zip(signs, numbers[1:]):
            result = calculate(sign, value, n)
            steps.append(f"{value}{sign}{n}={result}")
            value = result
        return " ".join(steps)

    def solution(self, problem):
        return (
            (self._worked(problem) if shows_working(self.demonstrations, problem) else "")
            + MARKER
            + problem.answer
        )

    def document(self, index):
        """A short text for pretraining that shows how numbers behave: a stretch of counting, or a few problems with
        or without their steps. Never one of another split."""
        rng = random.Random(index)
        if rng.random() < 0.2:
            start, step = rng.randrange(1000), rng.choice([1, 1, 2, 5, 10])
            return "Count: " + " ".join(str(start + i * step) for i in range(12))
        lines = []
        for k in range(4):
            problem = self.problem((4 * index + k) % len(self))
            question = problem.prompt[-1]["content"].split("Calculate: ")[-1].rstrip(" =")
            lines.append(
                f"{question} = {problem.answer}"
                if rng.random() < 0.2
                else f"{question}: {self._worked(problem)}"
            )
        return "\n".join(lines)

    def reward(self, problem, completion):
        """The number after the last '#'. binary, signed: right is 1. graded: 1 right; -1 no number at all; -0.5 the
        result of another operation; 0.5 off by one, 0.25 off by two to five (3x2: by up to 1%, 10%); else 0."""
        value = number_after(completion, MARKER)
        correct = is_close(value, problem.answer, self.tolerance)
        graded = self.rewards == "graded"
        reward = judged(
            correct,
            "binary" if graded else self.rewards,
            format=MARKER in completion,
            answered=value is not None,
        )
        if graded and not correct:
            reward.total = self._grade(problem, value)
        return reward

    def _grade(self, problem, value):
        """What a wrong number, or None, is worth."""
        if value is None:
            return -1.0
        numbers, signs = problem.meta["numbers"], problem.meta["signs"]
        if len(signs) == 1 and value in [
            calculate(sign, *numbers) for sign in SIGNS if sign != signs[0]
        ]:
            return -0.5
        off, (near, far) = abs(value - int(problem.answer)), (1, 5)
        if self.by_size:
            near, far = abs(int(problem.answer)) / 100, abs(int(problem.answer)) / 10
        return 0.5 if off <= near else 0.25 if off <= far else 0.0
