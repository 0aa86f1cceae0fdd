"""What a task gives and takes, and which split a problem belongs to."""
import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Problem:
    prompt: list  # chat messages: [{"role": "user", "content": "Calculate: 15 + 8 = "}]
    answer: str  # the right answer
    meta: dict = field(default_factory=dict)  # what else the task's solution() and reward() need


@dataclass
class Reward:
    total: float
    parts: dict = field(default_factory=dict)  # named parts, each logged: {"correct": 1.0, "answered": 1.0}


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


def check_split(split):
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")


def in_split(hashes, split):
    """Hashes -> which are in the split: val has 20%, test 10%, train the rest. A problem's content decides, so a
    problem trained on can never be validated on."""
    check_split(split)
    tenth = hashes % np.uint64(10)
    return tenth < 2 if split == "val" else tenth == 2 if split == "test" else tenth > 2
