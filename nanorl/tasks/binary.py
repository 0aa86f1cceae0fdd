"""Binary: `Write 37 in binary: ` -> `#100101`, at once or by halving."""

import re
from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import word_after
from nanorl.tasks.problem import REWARDS, STYLES, Problem, judged, one_of, shows_working, split_rows

MARKER = "#"
LARGEST = 4095  # twelve binary digits


@lru_cache
def _table(split):
    table = np.arange(LARGEST + 1)[:, None]
    return split_rows(table, table, split)


def halve(n):
    """n and its halves, each with its remainder; read backwards they are the digits: 5 -> '5:1 2:0 1:1'"""
    steps = []
    while n or not steps:
        steps.append(f"{n}:{n % 2}")
        n //= 2
    return " ".join(steps)


class Binary:
    """The numbers 0 to 4,095. demonstrations: direct, worked or mixed. rewards: binary or signed."""

    marker, answer_words = MARKER, "[01]+"  # what templates.py needs

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        self.rows, self.demonstrations, self.rewards = _table(split), demonstrations, rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        n = int(self.rows[index, 0])
        return Problem(
            [{"role": "user", "content": f"Write {n} in binary: "}], f"{n:b}", {"number": n}
        )

    def solution(self, problem):
        worked = (
            halve(problem.meta["number"]) if shows_working(self.demonstrations, problem) else ""
        )
        return worked + MARKER + problem.answer

    def document(self, index):
        n = int(self.rows[index % len(self), 0])
        return f"{n}: {halve(n)} = {n:b}"

    def reward(self, problem, completion):
        """Right when the right binary digits, and nothing else, follow the last '#'; leading zeros do not matter."""
        word = word_after(completion, MARKER)
        digits = word is not None and bool(re.fullmatch("[01]+", word))
        correct = digits and (word.lstrip("0") or "0") == problem.answer
        return judged(correct, self.rewards, format=MARKER in completion, answered=digits)
