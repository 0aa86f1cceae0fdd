"""What a task gives and takes, and what several tasks share: splits, styles, forms of rewards."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Problem:
    """What a task asks. A text as its prompt is one message of the user.

    The answer is written to disk: NumPy's and torch's values become plain ones. Raises ValueError
    for an answer that JSON lacks, and for a prompt of another form.
    """

    prompt: list  # chat messages: [{"role": "user", "content": "Calculate: 15 + 8 = "}]
    answer: str  # the right answer
    meta: dict = field(default_factory=dict)  # what else the task's solution() and reward() need
    task: str = ""  # in a mixture, the name of the task it comes from
    index: int = None  # its number in its split, once it was taken for a step

    def __post_init__(self):
        if isinstance(self.prompt, str):
            self.prompt = [{"role": "user", "content": self.prompt}]
        if not isinstance(self.prompt, (list, tuple)) or not all(map(is_message, self.prompt)):
            raise ValueError(
                f"a problem's prompt is {self.prompt!r:.100}: it must be a text, or a list of "
                'messages {"role": "user", "content": a text}'
            )
        self.prompt = list(self.prompt)
        if hasattr(self.answer, "tolist"):
            self.answer = self.answer.tolist()
        try:
            json.dumps(self.answer, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"a problem's answer is {self.answer!r:.100}: it must be a text or numbers, as "
                "it is written to disk; what else reward() needs goes into meta"
            ) from None


@dataclass
class Reward:
    """What a completion earns."""

    total: float
    parts: dict = field(default_factory=dict)  # each is logged: {"correct": 1.0, "answered": 1.0}


def is_message(message):
    """Whether it is a turn of a chat: who says what, both as text."""
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def plain_reward(given):
    """What reward() gave -> the same with Python's own numbers, which JSON has.

    Raises TypeError or ValueError for what is no Reward of finite numbers.
    """
    if not isinstance(given, Reward):
        raise TypeError(f"reward() gave {given!r:.100}: it must give Reward(total, parts)")
    parts = {str(name): finite(name, value) for name, value in given.parts.items()}
    return Reward(finite("total", given.total), parts)


def finite(name, value):
    """A number of a Reward as a float. Raises TypeError or ValueError for one that is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Reward's {name} is {value!r:.100}, which is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"Reward's {name} is {number}, which is not finite")
    return number


def one_of(name, value, choices):
    """Raise ValueError for a setting that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")


# ---- splits --------------------------------------------------------------------------------------
# A problem's content decides its split. So a problem that was trained on is never validated on.

SPLITS = ("train", "val", "test")


def check_split(split):
    """Raise ValueError for a split that is none of the three."""
    one_of("split", split, SPLITS)


def content_hash(text):
    """str -> an integer of 63 bits, the same in every process and on every machine.

    Python's own hash() of a text is not.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hash_columns(columns):
    """Integers (problems, columns) -> uint64 (problems,), a stable hash of each row.

    It is splitmix64, over one column after the other.
    """
    h = np.zeros(len(columns), np.uint64)  # (problems,)
    for column in columns.T:
        h = (h + column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def in_split(hashes, split):
    """Hashes -> bool, which of them are in the split: val has 20%, test 10%, train the rest."""
    check_split(split)
    tenth = hashes % np.uint64(10)
    if split == "val":
        return tenth < 2
    if split == "test":
        return tenth == 2
    return tenth > 2


def split_rows(table, content, split):
    """Problems as rows of integers -> those of the split, in a fixed random order.

    table: (problems, columns). content: (problems, any columns); rows of equal content share a
    split, such as a + b and b + a.
    """
    table = table[in_split(hash_columns(content), split)]
    return table[np.random.default_rng(0).permutation(len(table))]


# ---- thought and answer in tags ------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_and_answer(text):
    """'<think>...</think><answer>18</answer>' -> (True, '18').

    The first is whether the text has that form: each tag once, and nothing around them. The second
    is what stands between the last <answer> and its </answer>, or None.
    """
    form = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"
    each_once = all(text.count(tag) == 1 for tag in TAGS)
    well_formed = each_once and bool(re.fullmatch(form, text, re.DOTALL))

    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    if not (opened and closed):
        answer = None
    return well_formed, answer


# ---- demonstrations and rewards ------------------------------------------------------------------

# A demonstration gives the answer at once (direct), or works it out before (worked). With mixed,
# half of the problems have the one and half the other.
STYLES = ("direct", "worked", "mixed")
# What is right earns 1. What is wrong earns 0 (binary) or -1 (signed).
REWARDS = ("binary", "signed")


def coin(question, problem):
    """A coin flip that the problem fixes: True for half of all problems, always the same ones.

    question: what the coin decides. Another question has another coin.
    """
    return content_hash(question + problem.prompt[-1]["content"]) % 2 == 1


def shows_working(style, problem):
    """Whether the problem's demonstration works the answer out, by one of STYLES."""
    if style == "mixed":
        return coin("style", problem)
    return style == "worked"


def judged(correct, rewards="binary", **parts):
    """Whether a completion is right, and one of REWARDS -> Reward.

    parts: what leads to a right answer, such as format and answered; `correct` is put after them.
    """
    total = float(correct) if rewards == "binary" else 2.0 * correct - 1.0
    logged = {name: float(value) for name, value in parts.items()}
    logged["correct"] = float(correct)
    return Reward(total, logged)


def is_correct(reward):
    """Whether a Reward says that the problem is solved.

    Its `correct` part says it; where a task names none, a total of at least 1 does.
    """
    return bool(reward.parts.get("correct", reward.total >= 1))
