"""GSM8K: grade-school word problems whose answer follows '#### ' (Cobbe et al. 2021)."""

import re

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.files import load_rows
from nanorl.tasks.problem import REWARDS, Problem, check_split, content_hash, judged, one_of

MARKER = "####"
VAL_ROWS = 473  # taken out of the 7,473 training rows, for tuning; `test` is only for final numbers


class GSM8K:
    """Splits: `val` is a fixed 473 rows of the published train file, `train` the other 7,000, `test` the
    published test file. Reward 1 for the right number after the last '####', else 0 (rewards=signed: -1)."""

    marker = MARKER  # what templates.py needs

    def __init__(self, split="train", rewards="binary"):
        check_split(split)
        one_of("rewards", rewards, REWARDS)
        self.rewards = rewards
        rows = load_rows("gsm8k", "test" if split == "test" else "train", "openai/gsm8k", "main")
        if split != "test":
            by_hash = sorted(rows, key=lambda row: content_hash(row["question"]))
            val = {row["question"] for row in by_hash[:VAL_ROWS]}
            rows = [row for row in rows if (row["question"] in val) == (split == "val")]
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        answer = number_after(row["answer"], MARKER)
        return Problem(
            [{"role": "user", "content": row["question"]}], str(answer), {"solution": row["answer"]}
        )

    def solution(self, problem):
        """The data set's own solution, without its calculator notes (<<48/2=24>>)."""
        return re.sub(r"<<[^>]*>>", "", problem.meta["solution"])

    def document(self, index):
        problem = self.problem(index)
        return problem.prompt[0]["content"] + "\n" + self.solution(problem)

    def reward(self, problem, completion):
        value = number_after(completion, MARKER)
        return judged(
            is_close(value, problem.answer),
            self.rewards,
            format=MARKER in completion,
            answered=value is not None,
        )
