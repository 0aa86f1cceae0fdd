"""Rollouts inside a page: gzipped JSON in base64, a chunk a step, so that a reader loads one step.

Not every step has room: MOST_BYTES are shared by as many steps as fit, evenly apart, the first and
the last among them. A step that alone is too large is cut to its first prompts. The page says both.
"""

import base64
import gzip
import json
import math
import os
import re

from nanorl.report import gather, rollouts
from nanorl.runtime.log import to_json
from nanorl.tasks import is_correct
from nanorl.tasks.problem import Reward
from nanorl.tokenizer import Tokenizer

MOST_BYTES = 12_000_000  # of all steps' chunks in one page
DURING_BYTES = 1_500_000  # of a page that is written while the run goes on
MOST_ANSWERS = 100  # held-out problems whose answers are in the page,
ANSWER_BYTES = 2_000_000  # as far as they fit
LONGEST_TEXT = 20_000  # characters of one completion

# Log-probs and entropies are written as whole hundredths of a nat.
HUNDREDTHS = 100


# ---- which steps ---------------------------------------------------------------------------------


def chosen_steps(paths, most_bytes):
    """{step: path} of files -> (the steps that have room, the share of a step that has).

    A chunk takes about as much as its file: base64 adds a third, and rounding saves more.
    """
    steps = sorted(paths)
    sizes = [os.path.getsize(paths[step]) for step in steps]
    average = max(1.0, sum(sizes) / len(sizes))
    room = int(most_bytes / average)
    if room >= len(steps):
        return steps, 1.0
    room = max(room, min(2, len(steps)))
    # Every k-th, counted from the last, and the first.
    every = math.ceil((len(steps) - 1) / max(room - 1, 1))
    chosen = sorted({steps[0], *steps[::-every]})
    share = most_bytes / sum(os.path.getsize(paths[step]) for step in chosen)
    return chosen, min(1.0, share)


def files(folder):
    """{step: path} of a stage's rollouts, the probe's as of step 0; {} where there are none."""
    try:
        found = rollouts.files(folder)
    except ValueError:
        return {}
    probe = os.path.join(folder, "probe.jsonl.gz")
    if os.path.exists(probe):
        found[0] = probe
    return found


def answer_files(folder):
    """{step: path} of the answers to the held-out problems; {} where there are none."""
    folder, found = os.path.join(folder, "evals"), {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.fullmatch(r"step_(\d+)\.jsonl\.gz", name)
        if match:
            found[int(match[1])] = os.path.join(folder, name)
    return found


# ---- chunks --------------------------------------------------------------------------------------


def packed(value):
    """A value as JSON, gzipped, in base64. Half of a surrogate pair stays an escape."""
    text = to_json(value, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode()


class Embedded:
    """What is embedded of one stage's rollouts and evaluations.

    steps, of_steps: those in the page, and how many there are. cut: prompts of a step that had no
    room, in the largest. chunks: {name: text}. by_token: whether tokens can be told apart.
    answers: the steps of evaluations with answers.
    """

    def __init__(self, stage, most_bytes):
        self.chunks, self.cut, self.ids = {}, 0, set()
        self.by_token = False
        paths = files(stage["folder"])
        self.steps, share = chosen_steps(paths, most_bytes) if paths else ([], 1.0)
        self.of_steps = len(paths)
        for step in self.steps:
            self.add_step(step, paths[step], share)
        self.answers = []
        self.add_answers(answer_files(stage["folder"]))
        self.pieces = token_texts(stage, self.ids)
        self.by_token = self.by_token and bool(self.pieces)

    def add_step(self, step, path, share):
        groups = list(read_groups(path).values())
        kept = groups[: max(1, math.ceil(len(groups) * share))]
        self.cut = max(self.cut, len(groups) - len(kept))
        self.chunks[f"step-{step}"] = packed([self.group(group) for group in kept])

    def group(self, group):
        """A prompt's records -> what the page shows of them."""
        first = group[0]
        found = {"prompt": cut_short(first["prompt"]), "answer": str(first.get("answer", ""))}
        for name in ("task", "index"):
            if name in first:
                found[name] = first[name]
        found["samples"] = [self.sample(record) for record in group]
        return found

    def sample(self, record):
        found = {"text": cut_short(record["completion"]), "right": right(record)}
        for name in ("reward", "parts", "advantage", "tokens", "finish", "error"):
            if name in record:
                found[name] = record[name]
        if "ids" in record and len(record["completion"]) <= LONGEST_TEXT:
            self.ids.update(record["ids"])
            self.by_token = True
            found["ids"] = record["ids"]
            found["logprobs"] = hundredths(record.get("logprobs"))
            found["entropies"] = hundredths(record.get("entropies"))
        return found

    def add_answers(self, paths):
        """The same held-out problems, as each evaluation found them answered."""
        steps, share = chosen_steps(paths, ANSWER_BYTES) if paths else ([], 1.0)
        for step in steps:
            asked = [one for one in read_records(paths[step]) if one.get("split", "val") == "val"]
            kept = asked[: min(MOST_ANSWERS, math.ceil(len(asked) * share))]
            if kept:
                self.answers.append(step)
                self.chunks[f"answers-{step}"] = packed([answer(record) for record in kept])


def read_records(path):
    """The records in a file of rollouts. One that is cut short ends where it is cut."""
    found = []
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as f:
            for line in f:
                found.append(json.loads(line))
    except (OSError, EOFError, ValueError):
        pass
    return found


def read_groups(path):
    """A file of rollouts -> {number of the prompt: records of its completions}."""
    groups = {}
    for record in read_records(path):
        groups.setdefault(record.get("group", 0), []).append(record)
    return groups


def answer(record):
    """A held-out problem's record -> what the page shows of it."""
    found = {"prompt": cut_short(record["prompt"]), "text": cut_short(record["completion"])}
    found["right"] = right(record)
    for name in ("index", "answer", "reward", "tokens", "finish", "error"):
        if name in record:
            found[name] = record[name]
    return found


def right(record):
    """Whether a completion solves its problem. Older files do not say it."""
    if "correct" in record:
        return bool(record["correct"])
    return is_correct(Reward(record["reward"], record.get("parts", {})))


def cut_short(text):
    """A text, or its beginning and how much more there is."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} […{len(text) - LONGEST_TEXT:,} more characters in the file]"


def hundredths(numbers):
    """Nats -> whole hundredths, which compress well."""
    found = []
    for number in numbers or []:
        found.append(None if number is None else round(number * HUNDREDTHS))
    return found


def token_texts(stage, ids):
    """{id: its text} by the tokenizer of the newest checkpoint, or of the model that the run
    started from; {} where neither is there any more."""
    start = stage["card"].get("start", {}).get("path")
    for path in (gather.newest_checkpoint(stage["folder"]), start):
        if not ids or path is None:
            continue
        try:
            tokenizer = Tokenizer.from_pretrained(path)
        except (OSError, ValueError):
            continue
        return {str(token): tokenizer.decode([token]) for token in sorted(ids)}
    return {}
