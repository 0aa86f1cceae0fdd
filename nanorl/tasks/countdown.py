"""Countdown: make a target from three or four numbers with + - * /.

The game is from Gandhi et al. 2024, Stream of Search, and Pan et al. 2025, TinyZero. A solution is
written as <think>...</think><answer>...</answer>. An answer is checked by a grammar and computed in
fractions: text is never evaluated.
"""

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


# ---- the checker ---------------------------------------------------------------------------------


def evaluate(text):
    """'(3 + 9) * 2' -> (Fraction(24), [3, 9, 2]): the value and the numbers used.

    None for a division by zero, and for what is not a sum by this grammar:

        sum     := product (('+' | '-') product)*
        product := item (('*' | '/') item)*
        item    := number | '(' sum ')'
    """
    if len(text) > LONGEST:
        return None
    text = text.translate(_SIGNS)
    not_tokens = re.sub(_TOKEN, "", text).strip()
    if not_tokens:
        return None

    used = []
    try:
        value, rest = _sum(re.findall(_TOKEN, text), used)
    except (IndexError, ValueError, ZeroDivisionError):
        # It ended too soon, something else stood where a number must be, or x / 0.
        return None
    return None if rest else (value, used)


# Each of these reads what it is named after from the front of a list of tokens. They return its
# value and the tokens after it, and append the numbers to `used`. They raise IndexError where the
# tokens end too soon, and ValueError where a token does not fit.


def _sum(tokens, used):
    value, tokens = _product(tokens, used)
    while tokens and tokens[0] in "+-":
        sign = tokens[0]
        other, tokens = _product(tokens[1:], used)
        value = value + other if sign == "+" else value - other
    return value, tokens


def _product(tokens, used):
    value, tokens = _item(tokens, used)
    while tokens and tokens[0] in "*/":
        sign = tokens[0]
        other, tokens = _item(tokens[1:], used)
        value = value * other if sign == "*" else value / other
    return value, tokens


def _item(tokens, used):
    if tokens[0] == "(":
        value, tokens = _sum(tokens[1:], used)
        if tokens[0] != ")":
            raise ValueError("a bracket is not closed")
        return value, tokens[1:]
    number = int(tokens[0])
    used.append(number)
    return Fraction(number), tokens[1:]


def _split_result(answer):
    """'3*7+12=33' -> ('3*7+12', '33'); without an equals sign '3*7+12' -> ('3*7+12', None)."""
    expression, equals, result = answer.rpartition("=")
    return (expression, result) if equals else (answer, None)


def solves(answer, numbers, target):
    """Whether an answer uses each number exactly once and makes the target.

    It may state its result: '3*7+12' or '3*7+12=33'.
    """
    expression, stated = _split_result(answer)
    evaluated = evaluate(expression)
    if evaluated is None:
        return False
    if stated is not None and stated.strip() != str(target):
        return False
    value, used = evaluated
    return value == target and Counter(used) == Counter(numbers)


# ---- the problems --------------------------------------------------------------------------------

# A sign -> an expression that stands before it needs brackets where its own outermost sign is one
# of these: (2+3)*4.
_BRACKETS_BEFORE = {"+": "", "-": "", "*": "+-", "/": "+-"}
# The same for an expression that stands after it: 4-(2+3), 4*(6/3), 8/(2*2).
_BRACKETS_AFTER = {"+": "", "-": "+-", "*": "+-/", "/": "+-*/"}


def _attempt(rng, numbers):
    """Join two random numbers at a time until one is left -> (expression, steps, value).

    For example ('3*(9-2)', '9-2=7 3*7=21', 21). None when a step is not a positive whole number,
    which the game does not allow.
    """
    # (value, expression, the expression's outermost sign or "")
    parts = [(n, str(n), "") for n in numbers]
    steps = []
    while len(parts) > 1:
        x, a, sign_a = parts.pop(rng.randrange(len(parts)))
        y, b, sign_b = parts.pop(rng.randrange(len(parts)))
        sign = rng.choice("++--**/")
        value = _join(x, sign, y)
        if value is None:
            return None
        steps.append(f"{x}{sign}{y}={value}")

        if sign_a and sign_a in _BRACKETS_BEFORE[sign]:
            a = f"({a})"
        if sign_b and sign_b in _BRACKETS_AFTER[sign]:
            b = f"({b})"
        parts.append((value, a + sign + b, sign))

    value, expression, _ = parts[0]
    return expression, " ".join(steps), value


def _join(x, sign, y):
    """3, '*', 7 -> 21. None where that is not a positive whole number."""
    if sign == "+":
        return x + y
    if sign == "-":
        return x - y if x > y else None
    if sign == "*":
        return x * y
    return x // y if x % y == 0 else None


def _belong(contents, split):
    """[(sorted numbers, target)] -> bool, which are in the split.

    Numbers and target decide it, in whatever order the numbers are shown.
    """
    hashes = [content_hash(str(content)) for content in contents]
    return in_split(np.array(hashes, np.uint64), split)


@lru_cache
def _problems(split, count, largest):
    """A split's (numbers, target, expression, steps), in a fixed random order.

    The target is at most 100. Expression and steps are one way to make it. count: how many numbers,
    '3', '4' or '3-4'.
    """
    rng = random.Random(f"countdown {count} {largest}")
    problems = {}  # (sorted numbers, target) -> the first problem with them
    for _ in range(DRAWS):
        size = rng.choice([3, 4]) if count == "3-4" else int(count)
        numbers = [rng.randint(1, largest) for _ in range(size)]
        attempt = _attempt(rng, numbers)
        if attempt is None:
            continue
        expression, steps, target = attempt
        if target <= 100:
            content = (tuple(sorted(numbers)), target)
            problems.setdefault(content, (numbers, target, expression, steps))

    in_this_split = _belong(problems, split)
    rows = [row for row, belongs in zip(problems.values(), in_this_split) if belongs]
    # Those with many solutions were found first.
    rng.shuffle(rows)
    return rows


class Countdown:
    """numbers: 3, 4 or 3-4 of them, from 1 to `largest`.

    demonstrations: `direct` thinks nothing, `worked` tries a few ways, step by step, until one
    hits, `mixed` has half of the problems each. format_weight: the share of the reward that the
    format alone earns.
    """

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
        self.split = split
        self.rows = _problems(split, str(numbers), int(largest))
        self.demonstrations = demonstrations
        self.format_weight = float(format_weight)

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        numbers, target, expression, steps = self.rows[index]
        shown = ", ".join(map(str, numbers))
        text = (
            f"Use {shown}, each once, and + - * / to make {target}. "
            "Think in <think> </think>, then write the expression in <answer> </answer>."
        )
        prompt = [{"role": "user", "content": text}]
        meta = {"numbers": numbers, "expression": expression, "steps": steps}
        return Problem(prompt, str(target), meta)

    def _search(self, problem):
        """Up to four tries that miss, then the one that hits.

        For example '3+7=10 12+10=22, 3*7=21 21+12=33'. No try hits the target of a problem of
        another split that has the same numbers: training must not show how that one is solved.
        """
        rng = random.Random(problem.prompt[-1]["content"])
        numbers = problem.meta["numbers"]
        attempts = [_attempt(rng, numbers) for _ in range(rng.randrange(12))]
        missed = []
        for attempt in attempts:
            if attempt is None:
                continue
            _, steps, value = attempt
            content = (tuple(sorted(numbers)), value)
            if value != int(problem.answer) and _belong([content], self.split)[0]:
                missed.append(steps)
        return ", ".join([*missed[:4], problem.meta["steps"]])

    def solution(self, problem):
        thought = ""
        if shows_working(self.demonstrations, problem):
            thought = self._search(problem)
        return f"<think>{thought}</think><answer>{problem.meta['expression']}</answer>"

    def document(self, index):
        """Two searches with their targets."""
        lines = []
        for k in range(2):
            problem = self.problem((2 * index + k) % len(self))
            numbers = ", ".join(map(str, problem.meta["numbers"]))
            lines.append(f"{numbers} make {problem.answer}: {self._search(problem)}")
        return "\n".join(lines)

    def reward(self, problem, completion):
        """The format and the answer, weighted.

        format: think, then answer, each tag once. correct: the last answer solves the problem.
        """
        well_formed, answer = think_and_answer(completion)
        answer = answer or ""
        expression, _ = _split_result(answer)
        parts = {
            "format": float(well_formed),
            "answered": float(evaluate(expression) is not None),
            "correct": float(solves(answer, problem.meta["numbers"], int(problem.answer))),
        }
        correct_weight = 1 - self.format_weight
        total = self.format_weight * parts["format"] + correct_weight * parts["correct"]
        return Reward(total, parts)
