"""Comparison: `Is 4821 greater than 4830? yes or no` -> `#no`, at once or digit by digit."""

from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import word_after
from nanorl.tasks.problem import REWARDS, STYLES, Problem, judged, one_of, shows_working, split_rows

MARKER = "#"
PROBLEMS = 400_000


@lru_cache
def _table(split):
    """(a, b) of one to four digits; a third of the pairs begin alike, so that the first digit does not settle them."""
    rng = np.random.default_rng(20260103)
    digits = rng.integers(1, 5, (2, PROBLEMS))
    a, b = rng.integers(0, 10**digits)
    alike = rng.random(PROBLEMS) < 0.5
    place = 10 ** rng.integers(
        1, np.maximum(digits[0], 2)
    )  # digits below it differ, and never all of a's
    b[alike] = (a // place * place + rng.integers(0, place))[alike]
    table = np.unique(np.column_stack([a, b]), axis=0)
    return split_rows(table, np.sort(table, axis=1), split)


def compare(a, b):
    """4821, 4830 -> '4=4 8=8 2<3'; of different length, the lengths: 12, 7 -> '2>1 digits'"""
    sign = lambda x, y: f"{x}{'<' if x < y else '>' if x > y else '='}{y}"
    a, b = str(a), str(b)
    if len(a) != len(b):
        return sign(len(a), len(b)) + " digits"
    differ = next((i for i in range(len(a)) if a[i] != b[i]), len(a) - 1)
    return " ".join(sign(int(x), int(y)) for x, y in zip(a[: differ + 1], b))


class Comparison:
    """demonstrations: direct, worked or mixed. rewards: binary or signed (guessing is right half of the time, so
    signed rewards make a guess worth nothing)."""

    marker, answer_words = MARKER, "yes|no"  # what templates.py needs

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        self.rows, self.demonstrations, self.rewards = _table(split), demonstrations, rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        a, b = self.rows[index].tolist()
        prompt = [{"role": "user", "content": f"Is {a} greater than {b}? yes or no"}]
        return Problem(prompt, "yes" if a > b else "no", {"numbers": [a, b]})

    def solution(self, problem):
        worked = (
            compare(*problem.meta["numbers"]) if shows_working(self.demonstrations, problem) else ""
        )
        return worked + MARKER + problem.answer

    def document(self, index):
        """Four pairs compared, with the result as a sign."""
        problems = [self.problem((4 * index + k) % len(self)) for k in range(4)]
        return "\n".join(
            "{} and {}: {}".format(*p.meta["numbers"], compare(*p.meta["numbers"]))
            for p in problems
        )

    def reward(self, problem, completion):
        """Right when exactly `yes` or `no` follows the last '#', and it is the right one."""
        word = word_after(completion, MARKER)
        return judged(
            word == problem.answer,
            self.rewards,
            format=MARKER in completion,
            answered=word in ("yes", "no"),
        )
