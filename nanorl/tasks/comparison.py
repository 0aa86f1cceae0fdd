"""Comparison: `Is 4821 greater than 4830? yes or no` -> `#no`, at once or digit by digit."""

from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import word_after
from nanorl.tasks.problem import REWARDS, STYLES, Problem, judged, one_of, shows_working, split_rows

MARKER = "#"
PROBLEMS = 400_000


@lru_cache
def _table(split):
    """A split's pairs (a, b), each number of one to four digits -> (problems, 2).

    A third of the pairs begin alike, so that the first digit does not settle them.
    """
    rng = np.random.default_rng(20260103)
    digits = rng.integers(1, 5, (2, PROBLEMS))
    a, b = rng.integers(0, 10**digits)  # (PROBLEMS,) each

    # Half of the b take over a's digits, except those below a random unit of 10, 100 or 1000. The
    # unit leaves a its first digit, where a has more than one.
    alike = rng.random(PROBLEMS) < 0.5
    unit = 10 ** rng.integers(1, np.maximum(digits[0], 2))
    like_a = a // unit * unit + rng.integers(0, unit)
    b[alike] = like_a[alike]

    table = np.unique(np.column_stack([a, b]), axis=0)
    return split_rows(table, np.sort(table, axis=1), split)


def compare(a, b):
    """4821, 4830 -> '4=4 8=8 2<3'; of different length, the lengths: 12, 7 -> '2>1 digits'"""
    a, b = str(a), str(b)
    if len(a) != len(b):
        return with_sign(len(a), len(b)) + " digits"

    # Digit by digit, up to the first that differs.
    compared = []
    for digit_a, digit_b in zip(a, b):
        compared.append(with_sign(int(digit_a), int(digit_b)))
        if digit_a != digit_b:
            break
    return " ".join(compared)


def with_sign(x, y):
    """2, 3 -> '2<3'"""
    if x < y:
        return f"{x}<{y}"
    if x > y:
        return f"{x}>{y}"
    return f"{x}={y}"


class Comparison:
    """demonstrations: direct, worked or mixed. rewards: binary or signed.

    Guessing is right half of the time, so signed rewards make a guess worth nothing.
    """

    # What templates.py needs.
    marker = MARKER
    answer_words = "yes|no"

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        self.rows = _table(split)
        self.demonstrations = demonstrations
        self.rewards = rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        a, b = self.rows[index].tolist()
        prompt = [{"role": "user", "content": f"Is {a} greater than {b}? yes or no"}]
        return Problem(prompt, "yes" if a > b else "no", {"numbers": [a, b]})

    def solution(self, problem):
        worked = ""
        if shows_working(self.demonstrations, problem):
            worked = compare(*problem.meta["numbers"])
        return worked + MARKER + problem.answer

    def document(self, index):
        """Four pairs compared, with the result as a sign."""
        lines = []
        for k in range(4):
            a, b = self.problem((4 * index + k) % len(self)).meta["numbers"]
            lines.append(f"{a} and {b}: {compare(a, b)}")
        return "\n".join(lines)

    def reward(self, problem, completion):
        """Right when exactly `yes` or `no` follows the last '#', and it is the right one."""
        word = word_after(completion, MARKER)
        correct = word == problem.answer
        has_marker = MARKER in completion
        answered = word in ("yes", "no")
        return judged(correct, self.rewards, format=has_marker, answered=answered)
