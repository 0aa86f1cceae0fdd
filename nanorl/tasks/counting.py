"""Counting: `How many b are in: a b c b d ?` -> `#2`, at once or counted along the way."""

from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.problem import REWARDS, STYLES, Problem, judged, one_of, shows_working, split_rows

MARKER = "#"
LETTERS = "abcdef"
LONGEST = 16  # letters in a list
PROBLEMS = 200_000


def count_along(things, wanted):
    """What is counted carries its number: ['a', 'b', 'c', 'b'], 'b' -> 'a b1 c b2'"""
    written = []
    count = 0
    for thing in things:
        if thing == wanted:
            count += 1
            written.append(f"{thing}{count}")
        else:
            written.append(thing)
    return " ".join(written)


@lru_cache
def _table(split):
    """A split's problems -> (problems, 2 + LONGEST).

    A row is the wanted letter, the length of the list, and its 4 to 16 letters, padded with -1.
    All such lists are too many, so these are random ones.
    """
    rng = np.random.default_rng(20260102)
    wanted = rng.integers(0, len(LETTERS), PROBLEMS)
    lengths = rng.integers(4, LONGEST + 1, PROBLEMS)
    letters = rng.integers(0, len(LETTERS), (PROBLEMS, LONGEST))
    letters[np.arange(LONGEST) >= lengths[:, None]] = -1
    table = np.unique(np.column_stack([wanted, lengths, letters]), axis=0)
    return split_rows(table, table, split)


class Counting:
    """demonstrations: direct, worked or mixed. rewards: binary or signed."""

    marker = MARKER  # what templates.py needs

    def __init__(self, split="train", demonstrations="mixed", rewards="binary"):
        one_of("demonstrations", demonstrations, STYLES)
        one_of("rewards", rewards, REWARDS)
        self.rows = _table(split)
        self.demonstrations = demonstrations
        self.rewards = rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        wanted, length, *padded = self.rows[index].tolist()
        wanted = LETTERS[wanted]
        letters = [LETTERS[i] for i in padded[:length]]
        question = f"How many {wanted} are in: {' '.join(letters)} ?"
        prompt = [{"role": "user", "content": question}]
        answer = str(letters.count(wanted))
        return Problem(prompt, answer, {"letters": letters, "wanted": wanted})

    def _worked(self, problem):
        return count_along(problem.meta["letters"], problem.meta["wanted"])

    def solution(self, problem):
        worked = ""
        if shows_working(self.demonstrations, problem):
            worked = self._worked(problem)
        return worked + MARKER + problem.answer

    def document(self, index):
        """Two lists counted along the way."""
        lines = []
        for k in range(2):
            problem = self.problem((2 * index + k) % len(self))
            wanted = problem.meta["wanted"]
            lines.append(f"{wanted}: {self._worked(problem)} = {problem.answer}")
        return "\n".join(lines)

    def reward(self, problem, completion):
        value = number_after(completion, MARKER)
        correct = is_close(value, problem.answer)
        has_marker = MARKER in completion
        return judged(correct, self.rewards, format=has_marker, answered=value is not None)
