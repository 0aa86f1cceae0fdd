"""What eval.py writes into <model>/eval/: each file is there whole or not at all."""

import json
import os

from nanorl.runtime import checkpoint


def write(path, name, text):
    """Write text to the file `name` in the eval folder of the model at `path`."""
    file = checkpoint.eval_file(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    # A task's text may hold half of a surrogate pair, which JSON writes as \ud83d.
    with open(file + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text)
    os.replace(file + ".tmp", file)


def write_json(path, name, value):
    """Write a value as JSON. See `write` for path and name."""
    write(path, name, json.dumps(value, indent=2))


def write_lines(path, name, records):
    """Write records as JSON, each on a line. See `write` for path and name."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write(path, name, "".join(lines))


def add_to_summary(path, name, result):
    """Put the result of task `name` into summary.json, beside those of other tasks."""
    summary = {}
    file = checkpoint.eval_file(path, "summary.json")
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            summary = json.load(f)
    summary[name] = result
    write_json(path, "summary.json", summary)
