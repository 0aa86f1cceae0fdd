"""Rollouts as a person reads them: `python eval.py --show=out/d4/rl --step=12 --prompt=3`."""

import gzip
import json
import os
import re


def files(directory):
    """{step: path} of the rollouts of a run, or of its rl stage.

    Raises ValueError where there are none.
    """
    for folder in (os.path.join(directory, "rollouts"), os.path.join(directory, "rl", "rollouts")):
        found = {}
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            match = re.fullmatch(r"step_(\d+)\.jsonl\.gz", name)
            if match:
                found[int(match[1])] = os.path.join(folder, name)
        if found:
            return found
    raise ValueError(
        f"--show={directory}: no rollouts there; name an RL run's folder, such as out/d4/rl"
    )


def lines(directory, step=0, prompt=-1):
    """The rollouts of a step as lines of text.

    step: 0 is the last. prompt: only this number; -1: all of them.

    Raises ValueError for a step or prompt that there is not.
    """
    paths = files(directory)
    step = step or max(paths)
    if step not in paths:
        raise ValueError(
            f"--step={step}: {directory} has rollouts of steps {min(paths)} to {max(paths)}"
        )
    groups = read_groups(paths[step])
    if prompt >= len(groups):
        raise ValueError(f"--prompt={prompt}: step {step} has prompts 0 to {len(groups) - 1}")

    completions = sum(map(len, groups.values()))
    shown = [f"{paths[step]}: step {step}, {len(groups)} prompts, {completions} completions"]
    for number in groups if prompt < 0 else [prompt]:
        shown.append("")
        shown += group_lines(number, groups[number])
    return shown


def read_groups(path):
    """A file of rollouts -> {number of the prompt: records of its completions}."""
    groups = {}
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            groups.setdefault(record["group"], []).append(record)
    return groups


def group_lines(number, group):
    """A prompt as the model saw it, and its completions: the best first, equal ones together."""
    mean = sum(record["reward"] for record in group) / len(group)
    shown = [f"prompt {number}, answer {group[0]['answer']}, mean reward {mean:.3f}"]
    shown += indented(group[0]["prompt"], "  > ")

    equal = {}
    for record in sorted(group, key=lambda record: -record["reward"]):
        what = record["completion"], record["reward"], record["finish"]
        equal.setdefault(what, []).append(record)
    for records in equal.values():
        shown.append(summary_line(records[0], len(records)))
        shown += indented(records[0]["completion"], "      ")
    return shown


def summary_line(record, count):
    """What a completion earned; `count` of them are equal."""
    parts = ", ".join(f"{name} {value:g}" for name, value in record["parts"].items())
    line = f"  {count} x reward {record['reward']:g} ({parts})"
    line += f", advantage {record['advantage']:+.3f}, {record['tokens']} tokens"
    if record["finish"] == "length":
        line += ", cut off"
    if "error" in record:
        line += f"; the reward failed: {record['error']}"
    return line


def indented(text, by):
    """The lines of a text. What is not printable is shown as an escape, so that a model's output
    cannot steer the terminal."""
    return [by + "".join(map(printable, line)) for line in text.split("\n")]


def printable(character):
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
