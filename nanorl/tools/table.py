"""Folders of RL runs, <what>-<seed>/rl each, as one Markdown table: `python -m nanorl.tools.table out/journal/baseline out/journal/kl`.

A row is what was varied; numbers are means over its seeds, with each seed's in brackets. `solved, all steps` is the share of the training samples that
were right over the whole run, which tells how fast it learnt; `last 5` that of its last five steps; greedy is on held-out problems. Runs that have not
made a step yet are left out. Under the table, each row's difference from the first, paired by seed: mean and 95% interval (Student's t over seeds), which says
what so few seeds can show."""

import json
import os
import re
import sys

from nanorl.tools.versus import student_t


def read(directories):
    """-> {what: {seed: rows}} of the runs in the folders."""
    runs = {}
    for directory in directories:
        for name in sorted(os.listdir(directory)):
            path, match = (
                os.path.join(directory, name, "rl", "metrics.jsonl"),
                re.fullmatch(r"(.+)-(\d+)", name),
            )
            if match and os.path.exists(path):
                with open(path, encoding="utf-8") as f:
                    rows = [json.loads(line) for line in f]
                if int(match[2]) in runs.get(match[1], {}):
                    sys.exit(f"{name} is in two of the folders: a table has one row of each name")
                if any("reward" in row for row in rows):
                    runs.setdefault(match[1], {})[int(match[2])] = rows
    return runs


def numbers(rows):
    """One run's rows -> what the table shows of it."""
    steps = [row for row in rows if "reward" in row]
    held_out = [row for row in rows if "val/accuracy" in row]
    solved = [row.get("reward/correct", row["reward"]) for row in steps]
    return {
        "greedy before": held_out[0]["val/accuracy"],
        "greedy after": held_out[-1]["val/accuracy"],
        "solved, all steps": sum(solved) / len(solved),
        "last 5": sum(solved[-5:]) / len(solved[-5:]),
        "dead groups, last 5": sum(row["frac_reward_zero_std"] for row in steps[-5:])
        / len(steps[-5:]),
        "length": held_out[-1]["val/length"],
        "seconds": sum(row["time/step"] for row in steps),
    }


def table(runs):
    """{what: {seed: rows}} -> lines of Markdown."""
    percent = lambda values: (
        f"{sum(values) / len(values):.1%} ({', '.join(f'{100 * v:.1f}' for v in values)})"
    )
    plain = lambda values: f"{sum(values) / len(values):.0f}"
    lines = []
    for what, seeds in runs.items():
        found = [numbers(rows) for _, rows in sorted(seeds.items())]
        if not lines:
            lines = [
                "| | steps | " + " | ".join(found[0]) + " |",
                "|" + "---|" * (len(found[0]) + 2),
            ]
        cells = [
            (plain if name in ("length", "seconds") else percent)([f[name] for f in found])
            for name in found[0]
        ]
        lines.append(
            f"| {what} | {max(row['step'] for rows in seeds.values() for row in rows)} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def differences(runs):
    """{what: {seed: rows}} -> lines: each row's difference from the first over the seeds that both have."""
    (first, base), *others = runs.items()
    lines = []
    for what, seeds in others:
        both = sorted(seeds.keys() & base.keys())
        cells = []
        for name in ("greedy after", "solved, all steps"):
            d = [100 * (numbers(seeds[seed])[name] - numbers(base[seed])[name]) for seed in both]
            mean = sum(d) / len(d) if d else 0.0
            if len(d) < 2:
                cells.append(
                    f"{name} {mean:+.1f} (one seed: no interval)"
                    if d
                    else f"{name}: no seed in common"
                )
                continue
            half = (
                student_t(0.05, len(d) - 1)
                * (sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d)) ** 0.5
            )
            cells.append(f"{name} {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]")
        lines.append(f"{what} - {first}, points: {'; '.join(cells)}; {len(both)} seeds")
    return lines


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all(map(os.path.isdir, sys.argv[1:])):
        sys.exit("usage: python -m nanorl.tools.table <folders of runs>, such as out/journal/kl")
    runs = read(sys.argv[1:])
    if not runs:
        sys.exit(f"no runs in {', '.join(sys.argv[1:])}")
    print(*table(runs), "", *differences(runs), sep="\n")
