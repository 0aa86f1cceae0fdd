"""Multiple choice: MMLU (Hendrycks et al. 2021) and ARC (Clark et al. 2018).

The answer is a label, A to E or 1 to 4. It is judged in two ways: by which label the model finds
likeliest as its first token (rollout.label_logprobs), and by what the model says.
"""

from nanorl.tasks.answers import chosen_label
from nanorl.tasks.files import load_rows, need_text
from nanorl.tasks.problem import REWARDS, Problem, check_split, judged, one_of

# name: the data set on the hub, its configuration, and its file for our `train`. MMLU has no file
# to train on. Its `dev` has five questions a subject, to be shown in prompts (eval.py --shots).
# Questions of other sets (RACE, ARC and more) come with it as auxiliary_train.
SOURCES = {
    "mmlu": ("cais/mmlu", "all", "dev"),
    "mmlu:auxiliary": ("cais/mmlu", "all", "auxiliary_train"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train"),
}


LABELS = "ABCDEFGHIJ"  # MMLU's choices have no labels of their own


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
        folder = name.split(":")[0]
        self.rows = load_rows(folder, file, hub_id, config, check=read_choices)

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


class Cloze:
    """The same questions as plain text that goes on with a choice, for a base model.

        Question: Which barks?
        Answer: dog

    No choices are listed, and none has a label: a small model can say which answer is likely long
    before it can say which label is (Gu et al. 2024). meta["choices"] are what may follow
    `Answer:`. The whole text of the right one earns 1.
    """

    def __init__(self, name, split="train"):
        self.task = MultipleChoice(name, split)

    def __len__(self):
        return len(self.task)

    def problem(self, index):
        row = self.task.rows[index]
        texts, labels, answer = read_choices(row)
        prompt = [{"role": "user", "content": f"Question: {row['question'].strip()}\nAnswer:"}]
        choices = [f" {text.strip()}" for text in texts]
        about = {"labels": labels, "choices": choices, "subject": row.get("subject", "")}
        return Problem(prompt, answer, about)

    def solution(self, problem):
        return problem.meta["choices"][problem.meta["labels"].index(problem.answer)]

    def reward(self, problem, completion):
        return judged(completion.strip() == self.solution(problem).strip(), "binary")


def read_choices(row):
    """A row of a file -> (the choices' texts, their labels, the right label).

    ARC names its labels. MMLU gives the number of the right choice, from 0; its label or its text
    will do too. Raises ValueError for a row that is no problem.
    """
    need_text(row, "question")
    choices, names_labels = row.get("choices"), False
    if isinstance(choices, dict):
        names_labels = True
        texts, labels = choices.get("text"), choices.get("label")
    else:
        texts, labels = choices, list(LABELS)
    if not is_texts(texts) or not is_texts(labels):
        raise ValueError("'choices' must be two or more texts (ARC: with as many labels)")
    if names_labels and len(labels) != len(texts):
        raise ValueError(f"'choices' has {len(texts)} texts and {len(labels)} labels")
    if len(texts) > len(labels):
        raise ValueError(f"'choices' has {len(texts)} texts: at most {len(LABELS)} have a label")

    labels = labels[: len(texts)]
    answer = row.get("answerKey" if names_labels else "answer")
    if answer in labels:
        return texts, labels, answer
    if not names_labels and type(answer) is int and 0 <= answer < len(labels):
        return texts, labels, labels[answer]
    if texts.count(answer) == 1:
        return texts, labels, labels[texts.index(answer)]
    number = "" if names_labels else f"a number from 0 to {len(labels) - 1}, "
    raise ValueError(
        f"the answer is {answer!r}: it must be {number}one of {', '.join(labels)}, "
        "or one choice's text"
    )


def is_texts(values):
    """Whether it is a list of two or more texts."""
    return isinstance(values, list) and len(values) > 1 and all(isinstance(v, str) for v in values)
