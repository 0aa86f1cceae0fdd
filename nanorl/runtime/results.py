"""What eval.py writes, <model>/eval/...: whole or not at all."""

import json
import os

from nanorl.runtime import checkpoint


def write(path, name, text):
    """text -> the file `name` in the model's eval folder."""
    file = checkpoint.eval_file(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(file + ".tmp", file)


def write_json(path, name, value):
    write(path, name, json.dumps(value, indent=2))


def write_lines(path, name, records):
    """Records -> a line of JSON each."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write(path, name, "".join(lines))


def add_to_summary(path, name, result):
    """Put a task's result into summary.json, beside those of other tasks."""
    summary = {}
    file = checkpoint.eval_file(path, "summary.json")
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            summary = json.load(f)
    summary[name] = result
    write_json(path, "summary.json", summary)
