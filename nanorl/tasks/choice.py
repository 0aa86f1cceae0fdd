"""Multiple choice: MMLU (Hendrycks et al. 2021) and ARC (Clark et al. 2018).

The answer is a label, A to E or 1 to 4. It is judged in two ways: by which label the model finds
likeliest as its first token (rollout.label_logprobs), and by what the model says.
"""

from nanorl.tasks.answers import chosen_label
from nanorl.tasks.files import load_rows
from nanorl.tasks.problem import REWARDS, Problem, check_split, judged, one_of

# name: the data set on the hub, its configuration, and its file for our `train`. MMLU has no file
# to train on. Its `dev` has five questions a subject, to be shown in prompts (eval.py --shots).
SOURCES = {
    "mmlu": ("cais/mmlu", "all", "dev"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train"),
}


class MultipleChoice:
    """name: one of SOURCES. rewards: binary or signed.

    The splits `val` and `test` are the published validation and test files. The right label earns
    1, anything else 0 (signed: -1).
    """

    def __init__(self, name, split="train", rewards="binary"):
        check_split(split)
        one_of("rewards", rewards, REWARDS)
        self.rewards = rewards
        hub_id, config, train = SOURCES[name]
        file = {"train": train, "val": "validation", "test": "test"}[split]
        self.rows = load_rows(name, file, hub_id, config)

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        texts, labels, answer = read_choices(row)
        lines = [row["question"]]
        lines += [f"{label}. {text}" for label, text in zip(labels, texts)]
        lines.append(f"Answer with {', '.join(labels[:-1])} or {labels[-1]}.")
        prompt = [{"role": "user", "content": "\n".join(lines)}]
        return Problem(prompt, answer, {"labels": labels, "subject": row.get("subject", "")})

    def solution(self, problem):
        return problem.answer

    def document(self, index):
        problem = self.problem(index)
        return problem.prompt[0]["content"] + "\n" + problem.answer

    def reward(self, problem, completion):
        label = chosen_label(completion, problem.meta["labels"])
        return judged(label == problem.answer, self.rewards, answered=label is not None)


def read_choices(row):
    """A row of a file -> (the choices' texts, their labels, the right label)."""
    choices = row["choices"]
    if isinstance(choices, dict):
        # ARC names its labels.
        return choices["text"], list(choices["label"]), row["answerKey"]
    # MMLU gives the number of the right choice.
    labels = list("ABCDEFGHIJ"[: len(choices)])
    return choices, labels, labels[row["answer"]]
