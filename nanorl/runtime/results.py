"""What eval.py writes into <model>/eval/: each file is there whole or not at all."""

import json
import math
import os

from nanorl.runtime import checkpoint, lock
from nanorl.runtime.log import to_json


def write(path, name, text):
    """Write text to the file `name` in the eval folder of the model at `path`."""
    file = checkpoint.eval_file(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    temporary = f"{file}.{os.getpid()}.tmp"  # two processes may evaluate one model
    # A task's text may hold half of a surrogate pair, which JSON writes as \ud83d.
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text)
    os.replace(temporary, file)


def write_json(path, name, value):
    """Write a value as JSON. See `write` for path and name."""
    write(path, name, to_json(value, indent=2))


def write_lines(path, name, records):
    """Write records as JSON, each on a line. See `write` for path and name."""
    lines = [to_json(record, ensure_ascii=False) + "\n" for record in records]
    write(path, name, "".join(lines))


def read(path, name):
    """What the JSON file `name` in a model's eval folder holds; {} where there is none."""
    file = checkpoint.written_eval_file(path, name)
    if not os.path.exists(file):
        return {}
    with open(file, encoding="utf-8") as f:
        return json.load(f)


def add_to_summary(path, name, result):
    """Put the result of task `name` into summary.json, beside those of other tasks."""
    file = checkpoint.eval_file(path, "summary.json")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    # Another process may be about to add its own.
    locked, _ = lock.take(file + ".lock", patience=math.inf)
    with locked:
        write_json(path, "summary.json", {**read(path, "summary.json"), name: result})


def label_beside(stored, name, found):
    """What an evaluation is filed under: `name`, or, if it is smaller than the stored one, a longer
    label with its sizes, such as sum3.greedy20x1. So a smaller one replaces no larger one.

    stored, found: {way: summary}, of the evaluation filed under `name` and of the new one. The new
    one is smaller if it has fewer problems, or samples of each, in any way that is stored.
    """
    sizes, smaller = _sizes(found), False
    for way, (n, samples) in _sizes(stored).items():
        own_n, own_samples = sizes.get(way, (0, 0))
        smaller = smaller or own_n < n or own_samples < samples
    if not smaller:
        return name
    return f"{name}." + "-".join(f"{way}{n}x{samples}" for way, (n, samples) in sizes.items())


def _sizes(found):
    """{way: (problems, samples of each)}. A file's other entries have no n."""
    ways = {key: value for key, value in found.items() if isinstance(value, dict) and "n" in value}
    return {way: (summary["n"], summary.get("samples", 1)) for way, summary in ways.items()}


def check_folder(path):
    """Raise ValueError where results of the model at `path` cannot be written -> their folder.

    Before the work, not after it.
    """
    folder = checkpoint.eval_folder(path)
    parent = folder
    while not os.path.exists(parent):
        parent = os.path.dirname(parent) or "."
    if not os.access(parent, os.W_OK):
        raise ValueError(
            f"no results can be written for {path}: {parent} is read-only; choose another folder "
            "with NANORL_OUT=<folder>"
        )
    return folder
