"""Rollouts as a person reads them: `python eval.py --show=out/d4/rl --step=12 --prompt=3`."""

import gzip
import json
import os
import re


def files(directory):
    """{step: path} of the rollouts of a run, or of its rl stage."""
    for folder in (os.path.join(directory, "rollouts"), os.path.join(directory, "rl", "rollouts")):
        if os.path.isdir(folder):
            found = {
                int(m[1]): os.path.join(folder, m[0])
                for m in (
                    re.fullmatch(r"step_(\d+)\.jsonl\.gz", name) for name in os.listdir(folder)
                )
                if m
            }
            if found:
                return found
    raise ValueError(
        f"--show={directory}: no rollouts there; name an RL run's folder, such as out/d4/rl"
    )


def lines(directory, step=0, prompt=-1):
    """The rollouts of a step (0: the last) as lines of text: each prompt as the model saw it, or only number `prompt`, and its completions, the best
    first, equal ones together. Raises ValueError for what is not there."""
    there = files(directory)
    step = step or max(there)
    if step not in there:
        raise ValueError(
            f"--step={step}: {directory} has rollouts of steps {min(there)} to {max(there)}"
        )
    groups = {}
    with gzip.open(there[step], "rt", encoding="utf-8") as f:
        for record in map(json.loads, f):
            groups.setdefault(record["group"], []).append(record)
    if prompt >= len(groups):
        raise ValueError(f"--prompt={prompt}: step {step} has prompts 0 to {len(groups) - 1}")
    result = [
        f"{there[step]}: step {step}, {len(groups)} prompts, {sum(map(len, groups.values()))} completions"
    ]
    for number in groups if prompt < 0 else [prompt]:
        group = groups[number]
        result += [
            "",
            f"prompt {number}, answer {group[0]['answer']}, mean reward {sum(r['reward'] for r in group) / len(group):.3f}",
            *indented(group[0]["prompt"], "  > "),
        ]
        same = {}
        for record in sorted(group, key=lambda r: -r["reward"]):
            same.setdefault((record["completion"], record["reward"], record["finish"]), []).append(
                record
            )
        for some in same.values():
            r = some[0]
            parts = ", ".join(f"{name} {value:g}" for name, value in r["parts"].items())
            result.append(
                f"  {len(some)} x reward {r['reward']:g} ({parts}), advantage {r['advantage']:+.3f}, {r['tokens']} tokens"
                + (", cut off" if r["finish"] == "length" else "")
                + (f"; the reward failed: {r['error']}" if "error" in r else "")
            )
            result += indented(r["completion"], "      ")
    return result


def indented(text, by):
    """Its lines; what is not printable is shown as an escape, so that a model's output cannot steer the terminal."""
    safe = lambda line: "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in line
    )
    return [by + safe(line) for line in text.split("\n")]
