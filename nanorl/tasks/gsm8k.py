"""GSM8K: grade-school word problems whose answer follows '#### ' (Cobbe et al. 2021)."""

import re

from nanorl.tasks.answers import is_close, number_after
from nanorl.tasks.files import data_file, load_rows, need_text
from nanorl.tasks.problem import REWARDS, Problem, check_split, content_hash, judged, one_of

MARKER = "####"
VAL_ROWS = 473  # taken out of the 7,473 training rows, for tuning; `test` is only for final numbers


def check_row(row):
    """Raise ValueError for a row of a file that is no problem."""
    need_text(row, "question")
    if number_after(need_text(row, "answer"), MARKER) is None:
        raise ValueError(f"'answer' has no number after {MARKER}: end it with one, '{MARKER} 18'")


class GSM8K:
    """rewards: binary or signed.

    The split `val` is a fixed 473 rows of the published train file, `train` the other 7,000, `test`
    the published test file. The right number after the last '####' earns 1, anything else 0
    (signed: -1).
    """

    marker = MARKER  # what templates.py needs

    def __init__(self, split="train", rewards="binary"):
        check_split(split)
        one_of("rewards", rewards, REWARDS)
        self.rewards = rewards
        file = "test" if split == "test" else "train"
        self.rows = load_rows("gsm8k", file, "openai/gsm8k", "main", check_row)
        if split != "test":
            # `val` is the rows with the smallest hashes, in whatever order the file has them.
            by_hash = sorted(self.rows, key=lambda row: content_hash(row["question"]))
            val = {row["question"] for row in by_hash[:VAL_ROWS]}
            if {row["question"] for row in self.rows} == val:
                raise ValueError(
                    f"{data_file('gsm8k', file)} has {len(self.rows)} rows: {VAL_ROWS} of them are "
                    "held out for val, so it needs more (or name it test and take --split=test)"
                )
            wanted = split == "val"
            self.rows = [row for row in self.rows if (row["question"] in val) == wanted]

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        prompt = [{"role": "user", "content": row["question"]}]
        answer = number_after(row["answer"], MARKER)
        return Problem(prompt, str(answer), {"solution": row["answer"]})

    def solution(self, problem):
        """The data set's own solution, without its calculator notes (<<48/2=24>>)."""
        return re.sub(r"<<[^>]*>>", "", problem.meta["solution"])

    def document(self, index):
        problem = self.problem(index)
        return problem.prompt[0]["content"] + "\n" + self.solution(problem)

    def reward(self, problem, completion):
        value = number_after(completion, MARKER)
        correct = is_close(value, problem.answer)
        has_marker = MARKER in completion
        return judged(correct, self.rewards, format=has_marker, answered=value is not None)
