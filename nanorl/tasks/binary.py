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
    """A split's numbers -> (problems, 1)."""
    table = np.arange(LARGEST + 1)[:, None]
    return split_rows(table, table, split)


def halve(n):
    """n and its halves, each with its remainder: 5 -> '5:1 2:0 1:1'

    The remainders, read backwards, are the binary digits.
    """
    steps = []
    while n or not steps:
        steps.append(f"{n}:{n % 2}")
        n //= 2
    return " ".join(steps)


class Binary:
    """The numbers 0 to 4,095.

    demonstrations: direct, worked or mixed. rewards: binary or signed.
    """

    # What templates.py needs.
    marker = MARKER
    answer_words = "[01]+"

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        self.rows = _table(split)
        self.demonstrations = demonstrations
        self.rewards = rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        n = int(self.rows[index, 0])
        prompt = [{"role": "user", "content": f"Write {n} in binary: "}]
        return Problem(prompt, f"{n:b}", {"number": n})

    def solution(self, problem):
        worked = ""
        if shows_working(self.demonstrations, problem):
            worked = halve(problem.meta["number"])
        return worked + MARKER + problem.answer

    def document(self, index):
        n = int(self.rows[index % len(self), 0])
        return f"{n}: {halve(n)} = {n:b}"

    def reward(self, problem, completion):
        """Right when the right binary digits, and nothing else, follow the last '#'.

        Leading zeros do not matter.
        """
        word = word_after(completion, MARKER)
        is_binary = word is not None and re.fullmatch(self.answer_words, word) is not None
        correct = is_binary and (word.lstrip("0") or "0") == problem.answer
        has_marker = MARKER in completion
        return judged(correct, self.rewards, format=has_marker, answered=is_binary)
