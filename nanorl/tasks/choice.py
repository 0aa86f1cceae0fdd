"""Multiple choice: MMLU (Hendrycks et al. 2021) and ARC (Clark et al. 2018). The answer is a label, A to E or 1 to 4.

Judged in two ways: by which label the model finds likeliest as its first token (rollout.label_logprobs), and by what it says."""

from nanorl.tasks.answers import chosen_label
from nanorl.tasks.files import load_rows
from nanorl.tasks.problem import REWARDS, Problem, check_split, judged, one_of

# The data set on the hub, its configuration, and its file for our `train`. MMLU has none of its own: its `dev`, five questions a subject, is meant to be
# shown in prompts (eval.py --shots).
SOURCES = {
    "mmlu": ("cais/mmlu", "all", "dev"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train"),
}


class MultipleChoice:
    """name: one of SOURCES. Splits: `val` and `test` are the published validation and test files. Reward 1 for the right label, else 0
    (rewards=signed: -1)."""

    def __init__(self, name, split="train", rewards="binary"):
        check_split(split)
        one_of("rewards", rewards, REWARDS)
        hub_id, config, train = SOURCES[name]
        self.rows, self.rewards = (
            load_rows(
                name, {"train": train, "val": "validation", "test": "test"}[split], hub_id, config
            ),
            rewards,
        )

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        if isinstance(row["choices"], dict):  # ARC
            texts, labels, answer = (
                row["choices"]["text"],
                list(row["choices"]["label"]),
                row["answerKey"],
            )
        else:
            texts, labels = row["choices"], list("ABCDEFGHIJ"[: len(row["choices"])])
            answer = labels[row["answer"]]
        lines = [
            row["question"],
            *(f"{label}. {text}" for label, text in zip(labels, texts)),
            f"Answer with {', '.join(labels[:-1])} or {labels[-1]}.",
        ]
        return Problem(
            [{"role": "user", "content": "\n".join(lines)}],
            answer,
            {"labels": labels, "subject": row.get("subject", "")},
        )

    def solution(self, problem):
        return problem.answer

    def document(self, index):
        problem = self.problem(index)
        return problem.prompt[0]["content"] + "\n" + problem.answer

    def reward(self, problem, completion):
        label = chosen_label(completion, problem.meta["labels"])
        return judged(label == problem.answer, self.rewards, answered=label is not None)
