"""Generated arithmetic: `Calculate: 457 + 655 = ` -> `#1112`, at once or worked out before it."""

import random
from functools import lru_cache, partial

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


# ---- problems as rows of integers ----------------------------------------------------------------


def _pairs(a, b, signs):
    """All (sign, a, b) -> (rows, 3). a, b: the range of each number, as (first, last + 1)."""
    sign_numbers = [SIGNS.index(sign) for sign in signs]
    grid = np.meshgrid(sign_numbers, np.arange(*a), np.arange(*b), indexing="ij")
    return np.stack([column.ravel() for column in grid], axis=1)


def _chains(n=1_000_000):
    """Random (a, sign, b, sign, c, sign, d, sign, e) -> (rows, 9).

    The numbers are 1 to 99, the signs + and -. All such chains are too many to list, so these are
    `n` random ones. One that is drawn again is left out.
    """
    rng = np.random.default_rng(20260101)
    columns = []
    for i in range(9):
        is_number = i % 2 == 0
        columns.append(rng.integers(1, 100, n) if is_number else rng.integers(0, 2, n))
    return np.unique(np.stack(columns, axis=1), axis=0)


# name -> (what makes every problem as a row of integers, what they are).
PRESETS = {
    "sum3": (
        partial(_pairs, (100, 1000), (100, 1000), "+"),
        "sums of two three-digit numbers, 810,000",
    ),
    "0-20": (
        partial(_pairs, (0, 21), (0, 21), "+-*"),
        "a + b, a - b, a × b with numbers 0 to 20, 1,323",
    ),
    "2-digit": (
        partial(_pairs, (10, 100), (10, 100), "+-"),
        "a + b, a - b with two-digit numbers, 16,200",
    ),
    "chain4": (_chains, "four additions or subtractions in a row, numbers 1 to 99, a million"),
    "3x2": (
        partial(_pairs, (100, 1000), (10, 100), "*"),
        "three-digit × two-digit, 81,000",
    ),
}


@lru_cache
def _table(preset, split):
    """A split's problems -> int64 (problems, 3), for a chain (problems, 9).

    a + b and b + a share a split, and so do a × b and b × a.
    """
    make_rows, _ = PRESETS[preset]
    table = make_rows()
    content = table.copy()
    if table.shape[1] == 3:
        commutes = table[:, 0] != SIGNS.index("-")
        content[commutes, 1:] = np.sort(table[commutes, 1:], axis=1)
    return split_rows(table, content, split)


# ---- working it out as on paper, the last column first -------------------------------------------


def add_by_columns(a, b):
    """457, 655 -> ['7+5=12', '5+5+1=11', '4+6+1=11']"""
    steps = []
    carry = 0
    for digit_a, digit_b in _columns(a, b):
        total = digit_a + digit_b + carry
        carried = "+1" if carry else ""
        steps.append(f"{digit_a}+{digit_b}{carried}={total}")
        carry = total // 10
    return steps


def subtract_by_columns(a, b):
    """52, 17 -> ['12-7=5', '4-1=3']. a >= b; a column that falls short borrows ten."""
    steps = []
    borrow = 0
    for digit_a, digit_b in _columns(a, b):
        upper = digit_a - borrow
        borrow = 1 if upper < digit_b else 0
        upper += 10 * borrow
        steps.append(f"{upper}-{digit_b}={upper - digit_b}")
    return steps


def _columns(a, b):
    """52, 7 -> (2, 7), (5, 0): the digits that stand in one column, the last column first."""
    width = max(len(str(a)), len(str(b)))
    digits_a = reversed(str(a).zfill(width))
    digits_b = reversed(str(b).zfill(width))
    return [(int(x), int(y)) for x, y in zip(digits_a, digits_b)]


def multiply_by_places(a, b):
    """123, 45 -> ['123*5=615', '123*40=4920', '615+4920=5535']"""
    steps = []
    products = []
    for power, digit in enumerate(reversed(str(b))):
        factor = int(digit) * 10**power
        products.append(a * factor)
        steps.append(f"{a}*{factor}={a * factor}")
    if len(products) > 1:
        terms = "+".join(str(product) for product in products)
        steps.append(f"{terms}={a * b}")
    return steps


def work_out(sign, a, b):
    """One operation on non-negative numbers -> its steps."""
    if sign == "+":
        return add_by_columns(a, b)
    if sign == "*":
        return multiply_by_places(a, b)
    if a < b:
        return [f"{a}<{b}", *subtract_by_columns(b, a)]
    return subtract_by_columns(a, b)


def calculate(sign, a, b):
    """'-', 7, 5 -> 2"""
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    return a * b


# ---- the task ------------------------------------------------------------------------------------


class Arithmetic:
    """preset: one of PRESETS.

    demonstrations: what solution() writes. `direct` gives the answer at once, `worked` its steps
    before it, `mixed` has half of the problems each. instruction: a sentence put before the
    problem. precision: an answer counts when it is within half a unit of this decimal place; by
    default it must be exact. rewards: `binary` gives 1 or 0, `signed` 1 or -1, and `graded` gives
    something for an answer that is nearly right (see reward).
    """

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
        self.rows = _table(preset, split)
        self.demonstrations = demonstrations
        self.instruction = instruction
        self.rewards = rewards
        self.by_size = preset == "3x2"  # large answers: graded by how many per cent they are off
        self.tolerance = 0 if precision is None else f"5e-{int(precision) + 1}"

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = [int(x) for x in self.rows[index]]
        if len(row) == 3:
            numbers = row[1:]
            signs = [SIGNS[row[0]]]
        else:
            # A chain: numbers and signs take turns.
            numbers = row[0::2]
            signs = [SIGNS[sign] for sign in row[1::2]]

        answer = numbers[0]
        text = str(numbers[0])
        for sign, number in zip(signs, numbers[1:]):
            answer = calculate(sign, answer, number)
            text += f" {WRITTEN[sign]} {number}"

        before = self.instruction + " " if self.instruction else ""
        prompt = [{"role": "user", "content": f"{before}Calculate: {text} = "}]
        return Problem(prompt, str(answer), {"numbers": numbers, "signs": signs})

    def _worked(self, problem):
        """The steps to a problem's answer: '7+5=12 5+5+1=11', for a chain '12+3=15 15-4=11'."""
        numbers = problem.meta["numbers"]
        signs = problem.meta["signs"]
        if len(signs) == 1:
            if signs == ["+"] and coin("order", problem):
                # Either number of a sum may be written first.
                numbers = numbers[::-1]
            return " ".join(work_out(signs[0], *numbers))

        steps = []
        value = numbers[0]
        for sign, number in zip(signs, numbers[1:]):
            result = calculate(sign, value, number)
            steps.append(f"{value}{sign}{number}={result}")
            value = result
        return " ".join(steps)

    def solution(self, problem):
        worked = ""
        if shows_working(self.demonstrations, problem):
            worked = self._worked(problem)
        return worked + MARKER + problem.answer

    def document(self, index):
        """A short text for pretraining that shows how numbers behave.

        It is a stretch of counting, or four problems with or without their steps. The problems are
        never of another split.
        """
        rng = random.Random(index)
        if rng.random() < 0.2:
            start = rng.randrange(1000)
            step = rng.choice([1, 1, 2, 5, 10])
            return "Count: " + " ".join(str(start + i * step) for i in range(12))

        lines = []
        for k in range(4):
            problem = self.problem((4 * index + k) % len(self))
            question = problem.prompt[-1]["content"].split("Calculate: ")[-1].rstrip(" =")
            if rng.random() < 0.2:
                lines.append(f"{question} = {problem.answer}")
            else:
                lines.append(f"{question}: {self._worked(problem)}")
        return "\n".join(lines)

    def reward(self, problem, completion):
        """The number after the last '#' is the answer. A right one earns 1.

        With binary and signed rewards a wrong one earns what judged() says. With graded ones it
        earns -1 without any number; -0.5 for the result of another operation; 0.5 when it is off
        by one, and 0.25 by two to five (3x2: by up to 1%, and up to 10%); else 0.
        """
        value = number_after(completion, MARKER)
        correct = is_close(value, problem.answer, self.tolerance)
        is_graded = self.rewards == "graded"
        form = "binary" if is_graded else self.rewards
        has_marker = MARKER in completion
        reward = judged(correct, form, format=has_marker, answered=value is not None)
        if is_graded and not correct:
            reward.total = self._grade(problem, value)
        return reward

    def _grade(self, problem, value):
        """What a wrong number, or None, is worth."""
        if value is None:
            return -1.0

        signs = problem.meta["signs"]
        if len(signs) == 1:
            numbers = problem.meta["numbers"]
            for other in SIGNS.replace(signs[0], ""):
                if value == calculate(other, *numbers):
                    return -0.5

        near, far = 1, 5
        if self.by_size:
            size = abs(int(problem.answer))
            near, far = size / 100, size / 10
        off = abs(value - int(problem.answer))
        if off <= near:
            return 0.5
        if off <= far:
            return 0.25
        return 0.0
