"""Counting: `How many b are in: a b c b d ?` -> `#2`, at once or counted along the way."""

from functools import lru_cache

import numpy as np

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.problem import REWARDS, STYLES, Problem, judged, one_of, shows_working, split_rows

MARKER = "#"
LETTERS = "abcdef"
LONGEST, PROBLEMS = 16, 200_000


def count_along(things, wanted):
    """What is counted carries its number: ['a', 'b', 'c', 'b'], 'b' -> 'a b1 c b2'"""
    said, n = [], 0
    for thing in things:
        n += thing == wanted
        said.append(f"{thing}{n}" if thing == wanted else thing)
    return " ".join(said)


@lru_cache
def _table(split):
    """(wanted letter, length, letters padded with -1): 4 to 16 letters, drawn from endlessly many such lists."""
    rng = np.random.default_rng(20260102)
    wanted, lengths = (
        rng.integers(0, len(LETTERS), PROBLEMS),
        rng.integers(4, LONGEST + 1, PROBLEMS),
    )
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
        self.rows, self.demonstrations, self.rewards = _table(split), demonstrations, rewards

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        wanted, length, *letters = self.rows[index].tolist()
        letters = [LETTERS[i] for i in letters[:length]]
        prompt = [
            {"role": "user", "content": f"How many {LETTERS[wanted]} are in: {' '.join(letters)} ?"}
        ]
        return Problem(
            prompt,
            str(letters.count(LETTERS[wanted])),
            {"letters": letters, "wanted": LETTERS[wanted]},
        )

    def _worked(self, problem):
        return count_along(problem.meta["letters"], problem.meta["wanted"])

    def solution(self, problem):
        return (
            (self._worked(problem) if shows_working(self.demonstrations, problem) else "")
            + MARKER
            + problem.answer
        )

    def document(self, index):
        """Two lists counted along the way."""
        problems = [self.problem((2 * index + k) % len(self)) for k in range(2)]
        return "\n".join(f"{p.meta['wanted']}: {self._worked(p)} = {p.answer}" for p in problems)

    def reward(self, problem, completion):
        value = number_after(completion, MARKER)
        return judged(
            is_close(value, problem.answer),
            self.rewards,
            format=MARKER in completion,
            answered=value is not None,
        )
