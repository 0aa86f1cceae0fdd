"""Countdown: make a target from three or four numbers with + - * / (Gandhi et al. 2024, Stream of Search; Pan et al.
2025, TinyZero), written as <think>...</think><answer>...</answer>.

An answer is checked by a grammar and computed in fractions: text is never evaluated."""

import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache

import numpy as np

from nanorl.tasks.problem import (
    STYLES,
    Problem,
    Reward,
    content_hash,
    in_split,
    one_of,
    shows_working,
    think_and_answer,
)

DRAWS = 150_000  # most of them are no problem, or one that was drawn before
LONGEST = 100  # characters of an answer; it bounds the depth of brackets too
_TOKEN = r"\s*([0-9]+|[-+*/()])"
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})


# ---- the checker -------------------------------------------------------------------------------------------


def evaluate(text):
    """'(3 + 9) * 2' -> (Fraction(24), [3, 9, 2]): the value and the numbers used. None for what is not

        sum := product (('+' | '-') product)*    product := item (('*' | '/') item)*    item := number | '(' sum ')'

    and for a division by zero."""
    if len(text) > LONGEST:
        return None
    text = text.translate(_SIGNS)
    if re.sub(_TOKEN, "", text).strip():  # something is in it that is no token
        return None
    used = []
    try:
        value, rest = _sum(re.findall(_TOKEN, text), used)
    except (
        IndexError,
        ValueError,
        ZeroDivisionError,
    ):  # it ended too soon, something else stood there, x / 0
        return None
    return None if rest else (value, used)


def _sum(tokens, used):
    value, tokens = _product(tokens, used)
    while tokens and tokens[0] in "+-":
        other, rest = _product(tokens[1:], used)
        value, tokens = (value + other if tokens[0] == "+" else value - other), rest
    return value, tokens


def _product(tokens, used):
    value, tokens = _item(tokens, used)
    while tokens and tokens[0] in "*/":
        other, rest = _item(tokens[1:], used)
        value, tokens = (value * other if tokens[0] == "*" else value / other), rest
    return value, tokens


def _item(tokens, used):
    if tokens[0] == "(":
        value, tokens = _sum(tokens[1:], used)
        if tokens[0] != ")":
            raise ValueError("a bracket is not closed")
        return value, tokens[1:]
    used.append(int(tokens[0]))
    return Fraction(used[-1]), tokens[1:]


def solves(answer, numbers, target):
    """Whether an answer, such as '3*7+12' or '3*7+12=33', uses each number exactly once and makes the target."""
    left, equals, right = answer.rpartition("=")
    result = evaluate(left if equals else answer)
    if result is None or equals and right.strip() != str(target):
        return False
    return result[0] == target and Counter(result[1]) == Counter(numbers)


# ---- the problems ------------------------------------------------------------------------------------------


def _attempt(rng, numbers):
    """Join two of the numbers at a time until one is left -> (expression, steps, value), such as ('3*(9-2)', '9-2=7 3*7=21', 21).
    None when a step is not a positive whole number, which the game does not allow."""
    parts, steps = [(n, str(n), "") for n in numbers], []  # value, text, the text's outermost sign
    while len(parts) > 1:
        (x, a, sign_a), (y, b, sign_b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("++--**/")
        if sign == "/" and x % y or sign == "-" and x <= y:
            return None
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
        steps.append(f"{x}{sign}{y}={value}")
        if sign in "*/" and sign_a and sign_a in "+-":
            a = f"({a})"
        if sign_b and (
            sign == "/" or sign == "*" and sign_b in "+-/" or sign == "-" and sign_b in "+-"
        ):
            b = f"({b})"
        parts.append((value, a + sign + b, sign))
    return parts[0][1], " ".join(steps), parts[0][0]


def _belong(contents, split):
    """[(sorted numbers, target)] -> which are in the split: numbers and target decide it, in whatever order they are shown."""
    return in_split(
        np.array([content_hash(str(content)) for content in contents], np.uint64), split
    )


@lru_cache
def _problems(split, count, largest):
    """(numbers, target, expression, steps) with one way that makes it, in a fixed random order."""
    rng = random.Random(f"countdown {count} {largest}")
    found = {}
    for _ in range(DRAWS):
        numbers = [
            rng.randint(1, largest)
            for _ in range(rng.choice([3, 4]) if count == "3-4" else int(count))
        ]
        attempt = _attempt(rng, numbers)
        if attempt and attempt[2] <= 100:
            found.setdefault(
                (tuple(sorted(numbers)), attempt[2]), (numbers, attempt[2], *attempt[:2])
            )
    rows = [row for row, mine in zip(found.values(), _belong(found, split)) if mine]
    rng.shuffle(rows)  # those with many solutions were found first
    return rows


class Countdown:
    """numbers: 3, 4 or 3-4 of them, from 1 to `largest`. demonstrations: `direct` thinks nothing, `worked` tries a few
    ways, step by step, until one hits, `mixed` half of the problems each. format_weight: the share of the reward that the
    format alone earns."""

    def __init__(
        self, split="train", numbers="3", largest="12", demonstrations="mixed", format_weight="0.1"
    ):
        one_of("numbers", str(numbers), ("3", "4", "3-4"))
        one_of("demonstrations", demonstrations, STYLES)
        if not str(largest).isdecimal() or not 3 <= int(largest) <= 99:
            raise ValueError(f"largest is {largest!r}: it must be a number from 3 to 99")
        if not re.fullmatch(r"0|0?\.\d+", str(format_weight)):
            raise ValueError(
                f"format_weight is {format_weight!r}: it must be a share below 1, such as 0.1"
            )
        self.split, self.rows = split, _problems(split, str(numbers), int(largest))
        self.demonstrations, self.format_weight = demonstrations, float(format_weight)

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        numbers, target, expression, steps = self.rows[index]
        shown = ", ".join(map(str, numbers))
        text = (
            f"Use {shown}, each once, and + - * / to make {target}. "
            "Think in <think> </think>, then write the expression in <answer> </answer>."
        )
        return Problem(
            [{"role": "user", "content": text}],
            str(target),
            {"numbers": numbers, "expression": expression, "steps": steps},
        )

    def _search(self, problem):
        """Up to four tries that miss, then the one that hits: '3+7=10 12+10=22, 3*7=21 21+12=33'. None that hits the target
        of a problem of another split, with the same numbers: training must not show how that one is solved."""
        rng = random.Random(problem.prompt[-1]["content"])
        numbers = problem.meta["numbers"]
        tries = filter(
            None, [_attempt(rng, numbers) for _ in range(rng.randrange(12))]
        )  # many are None
        missed = [
            steps
            for _, steps, value in tries
            if value != int(problem.answer)
            and _belong([(tuple(sorted(numbers)), value)], self.split)[0]
        ]
        return ", ".join(missed[:4] + [problem.meta["steps"]])

    def solution(self, problem):
        thought = self._search(problem) if shows_working(self.demonstrations, problem) else ""
        return f"<think>{thought}</think><answer>{problem.meta['expression']}</answer>"

    def document(self, index):
        """Searches with their targets."""
        problems = [self.problem((2 * index + k) % len(self)) for k in range(2)]
        return "\n".join(
            f"{', '.join(map(str, p.meta['numbers']))} make {p.answer}: {self._search(p)}"
            for p in problems
        )

    def reward(self, problem, completion):
        """format: think, then answer, each tag once. correct: the last answer solves the problem."""
        well_formed, answer = think_and_answer(completion)
        answer = answer or ""
        answered = float(
            evaluate(answer.rpartition("=")[0] if "=" in answer else answer) is not None
        )
        correct = float(solves(answer, problem.meta["numbers"], int(problem.answer)))
        total = self.format_weight * well_formed + (1 - self.format_weight) * correct
        return Reward(
            total, {"format": float(well_formed), "answered": answered, "correct": correct}
        )
