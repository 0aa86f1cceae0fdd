"""What a task gives and takes, which split a problem belongs to, and what several tasks share."""

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Problem:
    prompt: list  # chat messages: [{"role": "user", "content": "Calculate: 15 + 8 = "}]
    answer: str  # the right answer
    meta: dict = field(default_factory=dict)  # what else the task's solution() and reward() need
    task: str = ""  # in a mixture, the name of the task it comes from


@dataclass
class Reward:
    total: float
    parts: dict = field(
        default_factory=dict
    )  # named parts, each logged: {"correct": 1.0, "answered": 1.0}


def content_hash(text):
    """str -> 63-bit integer, the same in every process and on every machine (Python's hash() is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def hash_columns(columns):
    """int array (N, n) -> uint64 (N,): a stable hash of each row (splitmix64 over the columns)."""
    h = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        h = (h + column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


SPLITS = ("train", "val", "test")


def one_of(name, value, choices):
    """Raises ValueError for a setting that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")


def check_split(split):
    one_of("split", split, SPLITS)


def in_split(hashes, split):
    """Hashes -> which are in the split: val has 20%, test 10%, train the rest. A problem's content decides, so a
    problem trained on can never be validated on."""
    check_split(split)
    tenth = hashes % np.uint64(10)
    return tenth < 2 if split == "val" else tenth == 2 if split == "test" else tenth > 2


def split_rows(table, content, split):
    """Problems as rows of integers (N, n) -> those of the split, in a fixed random order. Rows of equal `content`
    (N, m) share a split, such as a + b and b + a."""
    table = table[in_split(hash_columns(content), split)]
    return table[np.random.default_rng(0).permutation(len(table))]


_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_and_answer(text):
    """'<think>...</think><answer>18</answer>' -> (whether that is the text's form, each tag once and nothing around them; what stands between the last
    <answer> and its </answer>, or None)."""
    well_formed = all(text.count(tag) == 1 for tag in _TAGS) and bool(
        re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.DOTALL)
    )
    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return well_formed, answer if opened and closed else None


# ---- demonstrations and rewards ------------------------------------------------------------------------------

STYLES = (
    "direct",
    "worked",
    "mixed",
)  # of demonstrations: the answer at once, worked out before it, half of the problems each
REWARDS = ("binary", "signed")  # right is 1; wrong is 0, or -1


def coin(question, problem):
    """True or False, half of the time each, fixed by the problem: which of two writers had it."""
    return content_hash(question + problem.prompt[-1]["content"]) % 2 == 1


def shows_working(style, problem):
    return style == "worked" or style == "mixed" and coin("style", problem)


def judged(correct, rewards="binary", **parts):
    """Whether it is right -> Reward, with `correct` after the parts that lead to it (format, answered)."""
    total = float(correct) if rewards == "binary" else 2.0 * correct - 1.0
    return Reward(
        total, {**{name: float(value) for name, value in parts.items()}, "correct": float(correct)}
    )


def is_correct(reward):
    """Whether a Reward says that the problem was solved: its `correct` part, or a full reward where a task names none."""
    return bool(reward.parts.get("correct", reward.total >= 1))
