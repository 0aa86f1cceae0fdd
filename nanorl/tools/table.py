"""Folders of RL runs as one Markdown table: `python -m nanorl.tools.table out/journal/baseline`.

A folder holds runs named <what>-<seed>/rl. A row is what was varied. Its numbers are means over the
seeds, with each seed's number in brackets:

  solved, all steps   share of the training samples that were right over the whole run
  last 5              the same of the last five steps
  greedy before/after share of the held-out problems that the greedy answer solves

Runs without a step are left out. Under the table it is said which runs had no signal in most of
their steps, and how many held-out answers the reward failed on. Then comes each row's difference
from the first, paired by seed: mean and 95% interval (Student's t over the seeds).
"""

import json
import math
import os
import re
import statistics
import sys

from nanorl.evaluate.seeds import student_t
from nanorl.tools import learnt

COUNTS = ("length", "seconds")  # shown as whole numbers; the other columns are shares
COMPARED = ("greedy after", "solved, all steps")  # columns whose difference has a line


def read_rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def read(directories):
    """-> {what: {seed: rows}} of the runs in the folders."""
    runs = {}
    for directory in directories:
        for name in sorted(os.listdir(directory)):
            match = re.fullmatch(r"(.+)-(\d+)", name)
            path = os.path.join(directory, name, "rl", "metrics.jsonl")
            if not match or not os.path.exists(path):
                continue
            rows = read_rows(path)
            what, seed = match[1], int(match[2])
            if seed in runs.get(what, {}):
                sys.exit(f"{name} is in two of the folders: a table has one row of each name")
            if any("reward" in row for row in rows):
                runs.setdefault(what, {})[seed] = rows
    return runs


def mean(values):
    return sum(values) / len(values)


def numbers(rows):
    """One run's rows -> what the table shows of it."""
    steps = [row for row in rows if "reward" in row]
    held_out = [row for row in rows if "val/accuracy" in row]
    # A task whose reward is not 0 or 1 logs the share of right answers beside it.
    solved = [row.get("reward/correct", row["reward"]) for row in steps]
    dead = [row["frac_reward_zero_std"] for row in steps]
    found = {}
    found["greedy before"] = held_out[0]["val/accuracy"]
    found["greedy after"] = held_out[-1]["val/accuracy"]
    found["solved, all steps"] = mean(solved)
    found["last 5"] = mean(solved[-5:])
    found["dead groups, last 5"] = mean(dead[-5:])
    found["length"] = held_out[-1]["val/length"]
    found["seconds"] = sum(row["time/step"] for row in steps)
    return found


def cell(column, values):
    if column in COUNTS:
        return f"{mean(values):.0f}"
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{mean(values):.1%} ({each})"


def line(cells):
    return "| " + " | ".join(cells) + " |"


def table(runs):
    """{what: {seed: rows}} -> lines of Markdown."""
    lines = []
    for what, seeds in runs.items():
        found = [numbers(rows) for _, rows in sorted(seeds.items())]
        columns = list(found[0])
        if not lines:
            lines.append(line(["", "steps", *columns]))
            lines.append("|" + "---|" * (len(columns) + 2))
        steps = max(row["step"] for rows in seeds.values() for row in rows)
        cells = [cell(column, [run[column] for run in found]) for column in columns]
        lines.append(line([what, str(steps), *cells]))
    return lines


def difference(column, ours, first):
    """{seed: numbers} of a row and of the first, the same seeds -> the difference in words."""
    points = [100 * (ours[seed][column] - first[seed][column]) for seed in ours]
    if not points:
        return f"{column}: no seed in common"
    if len(points) == 1:
        return f"{column} {points[0]:+.1f} (one seed: no interval)"
    error = statistics.stdev(points) / math.sqrt(len(points))
    half = student_t(0.05, len(points) - 1) * error
    average = mean(points)
    return f"{column} {average:+.1f} [{average - half:+.1f}, {average + half:+.1f}]"


def differences(runs):
    """{what: {seed: rows}} -> lines: each row's difference from the first."""
    (name, first), *others = runs.items()
    lines = []
    for what, seeds in others:
        both = sorted(seeds.keys() & first.keys())
        ours = {seed: numbers(seeds[seed]) for seed in both}
        theirs = {seed: numbers(first[seed]) for seed in both}
        said = "; ".join(difference(column, ours, theirs) for column in COMPARED)
        lines.append(f"{what} - {name}, points: {said}; {len(both)} seeds")
    return lines


def cautions(runs):
    """{what: {seed: rows}} -> lines: which rows of the table say little, and why."""
    lines = []
    for what, seeds in runs.items():
        caution = learnt.caution(seeds)
        if caution:
            lines.append(f"{what}: {caution}")
        failed = sum(row.get("val/failed", 0) for rows in seeds.values() for row in rows)
        if failed:
            lines.append(f"{what}: the reward failed on {failed} held-out answers")
    return lines


def main(directories):
    if not directories or not all(os.path.isdir(directory) for directory in directories):
        sys.exit("usage: python -m nanorl.tools.table <folders of runs>, such as out/journal/kl")
    runs = read(directories)
    if not runs:
        sys.exit(f"no runs in {', '.join(directories)}")
    print(*table(runs), "", *cautions(runs), *differences(runs), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
