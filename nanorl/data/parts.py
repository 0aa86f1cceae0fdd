"""A mixture for SFT, 'hf:owner/name=8, gsm8k=2, chats.jsonl=1': parts, each with its weight.

A weight is a share of the conversations that a run learns from: of every 11 here 8 are of the data
set, 2 of the task and 1 of the file. The parts take turns, evenly. Each is gone through in passes
of its own, every pass in another order, so a small part comes round more often than a large one.
"""

import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nanorl.data.conversations import MOST_READ, fits, read_conversations
from nanorl.data.demonstrations import Demonstrations
from nanorl.data.stream import PREFIX
from nanorl.tasks import TASKS, get_task, parse_settings
from nanorl.tasks.files import split_at_commas
from nanorl.tasks.mixture import make_pattern
from nanorl.tasks.settings import settings_by_task

MOST_HELD_OUT = 200  # conversations of a part that validate, at most
WEIGHT = r"=\s*(\d+)\s*"


class Part(NamedTuple):
    """Where conversations come from; each of them is (ids, mask)."""

    weight: int
    train: list
    held_out: list
    val_task: object  # a task's val split, to be answered; None: no task
    note: str  # what the user should know of it, or ""


# ---- what the user writes ------------------------------------------------------------------------


def is_weighted(data):
    """Whether --data is a mixture: an item of it ends with a weight, as in 'a.jsonl=2'."""
    return any(re.search(WEIGHT + "$", item) for item in split_at_commas(data))


def parse_parts(data):
    """'gsm8k=2, a.jsonl, b.jsonl=1' -> {'gsm8k': 2, 'a.jsonl, b.jsonl': 1}.

    Raises ValueError for an item without a weight, a weight of 0 and a part that comes twice.
    """
    # What stands between, at the odd numbers, are the weights.
    *pieces, rest = re.split(WEIGHT + "(?:,|$)", data)
    if rest.strip():
        item = rest.strip()
        raise ValueError(f"--data: {item!r} has no weight: write {item}=1")
    weights = {}
    for source, weight in zip(pieces[::2], pieces[1::2]):
        name = source.strip()
        first = name.split(",")[0].strip()
        if first != name and (is_task(first) or first.startswith(PREFIX)):
            raise ValueError(f"--data: {first!r} has no weight: write {first}=1")
        if not name or int(weight) < 1:
            raise ValueError(
                f"--data: '{name}={weight}' must be a part and a weight of 1 or more, as in gsm8k=2"
            )
        if name in weights:
            raise ValueError(f"--data: {name!r} comes twice: name it once, with the sum of weights")
        weights[name] = int(weight)
    return weights


def is_task(source):
    """Whether a part is a task's name: one of TASKS, path.py:Class, or a word that is no file's."""
    return source in TASKS or ".py:" in source or re.fullmatch(r"[\w-]+", source) is not None


# ---- the parts -----------------------------------------------------------------------------------


def read_parts(data, task_args, tokenizer, seq_len, most):
    """-> {name: Part}, in the order of the user.

    task_args: settings of the tasks among them. most: conversations of each part; 0: all, but of a
    task or a data set no more than MOST_READ.

    Raises ValueError for what is not there or does not fit.
    """
    weights = parse_parts(data)
    tasks = [name for name in weights if is_task(name)]
    if task_args and not tasks:
        raise ValueError(f"--task_args={task_args}: no part of --data is a task: leave it out")
    settings = settings_by_task(data, tasks, parse_settings(task_args))

    parts = {}
    for name, weight in weights.items():
        if name in tasks:
            parts[name] = task_part(name, weight, settings[name], tokenizer, seq_len, most)
        else:
            train, held_out, note = read_conversations(name, tokenizer, seq_len, most)
            train = train[: most or len(train)]
            parts[name] = Part(weight, train, held_out[:MOST_HELD_OUT], None, note)
    return parts


def task_part(name, weight, settings, tokenizer, seq_len, most):
    """A task's demonstrations: of its train split to learn from, of its val split to validate."""
    train_task = get_task(name, "train", **settings)
    val_task = get_task(name, "val", **settings)
    demonstrations = Demonstrations(train_task, tokenizer, name)
    train, note = those_that_fit(demonstrations, most or MOST_READ, seq_len)
    in_val, _ = those_that_fit(Demonstrations(val_task, tokenizer, name), MOST_HELD_OUT, seq_len)
    if not train or not in_val:
        split = "val" if train else "train"
        raise ValueError(
            f"--data: no demonstration of {name}, split {split}, fits --seq_len={seq_len}: raise it"
        )
    notes = [note] if note else []
    if not most and len(demonstrations) > MOST_READ:
        notes.append(
            f"its first {MOST_READ:,} of {len(demonstrations):,} problems are taken; "
            "--examples=<number> takes so many of each part"
        )
    return Part(weight, train, in_val, val_task, "\n        ".join(notes))


def those_that_fit(demonstrations, most, seq_len):
    """The first `most`, less those that are too long -> (list of (ids, mask), note)."""
    examples = []
    n = min(most, len(demonstrations))
    for i in range(n):
        ids, mask = demonstrations[i]
        if fits(ids, seq_len):
            examples.append((np.array(ids, np.int32), np.array(mask, bool)))
    if len(examples) == n:
        return examples, ""
    note = f"{n - len(examples):,} of {n:,} demonstrations are longer than --seq_len={seq_len} "
    return examples, note + "tokens and are left out"


class Mixture:
    """mixture[number] -> (ids, mask) of turn `number`; the turns have no end.

    It is a pure function of the seed, the parts and the number. The length is the turns in which
    the part of the greatest weight is gone through once; of several such parts, the longest.
    """

    def __init__(self, parts, seed):
        self.parts, self.seed = parts, seed
        divisor = math.gcd(*(part.weight for part in parts.values()))
        self.weights = {name: part.weight // divisor for name, part in parts.items()}
        self.pattern = make_pattern(self.weights)
        self.numbers = {name: number for number, name in enumerate(parts)}
        # Of the pass that a part is in, and of the next, which a chunk may reach into.
        self.order = lru_cache(maxsize=2 * len(parts))(self._order)

    def __len__(self):
        most = max(self.weights.values())
        main = [name for name, weight in self.weights.items() if weight == most]
        longest = max(len(self.parts[name].train) for name in main)
        return math.ceil(longest / most) * len(self.pattern)

    def __getitem__(self, number):
        cycle, turn = divmod(number, len(self.pattern))
        name, k = self.pattern[turn]
        train = self.parts[name].train
        before = cycle * self.weights[name] + k  # turns that this part has had
        epoch, i = divmod(before, len(train))
        return train[self.order(name, epoch)[i]]

    def _order(self, name, epoch):
        """The order in which a part's pass `epoch` goes through its conversations."""
        rng = np.random.default_rng([self.seed, self.numbers[name], epoch])
        return rng.permutation(len(self.parts[name].train))

    def every(self):
        """Each conversation to learn from once."""
        return [example for part in self.parts.values() for example in part.train]

    def held_out(self):
        return [example for part in self.parts.values() for example in part.held_out]

    def mean_length(self):
        """Tokens of a turn's conversation, on average over a pass of every part."""
        total = 0.0
        for name, part in self.parts.items():
            mean = sum(len(ids) for ids, _ in part.train) / len(part.train)
            total += self.weights[name] * mean
        return total / len(self.pattern)

    def epochs(self, turns):
        """{name: how often so many turns go through the part}."""
        found = {}
        for name, part in self.parts.items():
            share = self.weights[name] / len(self.pattern)
            found[name] = turns * share / len(part.train)
        return found
