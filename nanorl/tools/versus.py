"""RL or more SFT? What runs/rl_vs_sft.sh has made, as a report.

    python -m nanorl.tools.versus out/versus/sum3 [seeds, such as 0,1,2]

Reads <folder>/seed<k>/{rl,sft_more} of each seed: from one start A went on by RL and B by more SFT,
for as many FLOPs (refused if they differ by more than 1%). Reads what eval.py found of both and of
the start. Writes report.md, report.json and, where matplotlib is installed, accuracy.png.

This file reads and compares; how it is worded is versus_report.py's.
"""

import math
import os
import re
import sys
from statistics import NormalDist

import torch

from nanorl.evaluate.benchmarks import BENCHMARKS
from nanorl.evaluate.seeds import holm, over_seeds, verdict_over_seeds
from nanorl.evaluate.statistics import Z_POWER
from nanorl.runtime import checkpoint
from nanorl.runtime.log import to_json
from nanorl.tools import learnt, versus_report
from nanorl.tools.summary import read_json, read_lines

ARMS = {"A": "rl", "B": "sft_more"}
PAIRS = ("A - start", "B - start", "A - B")
FLOPS_APART = 0.01  # of FLOPs that count as equal


# ---- what the runs have left ---------------------------------------------------------------------


def seed_names(folder, only):
    """The folders of the seeds, by number. only: these seeds; empty: all that are there."""
    if only:
        return [f"seed{seed}" for seed in only]
    names = [name for name in os.listdir(folder) if re.fullmatch(r"seed\d+", name)]
    if not names:
        raise ValueError(f"no seed0, seed1, ... in {folder}: `bash runs/rl_vs_sft.sh` makes them")
    return sorted(names, key=lambda name: int(name.removeprefix("seed")))


def read_seed(folder):
    """One seed's folder -> {start, A, B}, a dict each.

    All have path, summary and results {(task, how): outcomes}; A and B also rows (metrics), state
    (trainer.pt) and card (run.json).
    """
    found = {arm: read_arm(folder, stage) for arm, stage in ARMS.items()}
    start_a, start_b = (found[arm]["state"]["start"] for arm in ARMS)
    if start_a["hash"] != start_b["hash"]:
        raise ValueError(
            f"{folder}: A started from {start_a['path']} and B from {start_b['path']}, "
            "which are not the same weights"
        )
    found["start"] = dict(path=start_a["path"])
    for arm in found.values():
        arm["summary"], arm["results"] = read_evaluations(arm["path"])
    return found


def read_arm(folder, stage):
    directory = os.path.join(folder, stage)
    path = checkpoint.latest(directory)
    if path is None:
        raise ValueError(f"no checkpoint in {directory}: `bash runs/rl_vs_sft.sh` makes it")
    return dict(
        path=path,
        rows=read_lines(os.path.join(directory, "metrics.jsonl")),
        state=checkpoint.load_state(path, mmap=True),
        card=read_json(os.path.join(directory, "run.json")),
    )


def read_evaluations(path):
    """A model's summary.json, and its outcomes {(task, how): outcomes}."""
    summary_file = checkpoint.written_eval_file(path, "summary.json")
    if not os.path.exists(summary_file):
        raise ValueError(f"{path} has not been evaluated: `bash runs/rl_vs_sft.sh` does it")
    summary, results = read_json(summary_file), {}
    for name in summary:
        for outcome in read_lines(checkpoint.written_eval_file(path, name + ".jsonl")):
            results.setdefault((name, outcome["how"]), []).append(outcome)
    return summary, results


def check_flops(seeds):
    """Raise ValueError unless both arms of every seed took as many FLOPs, in one precision."""
    for seed, arms in seeds.items():
        a, b = (arms[arm]["state"]["flops"]["train"] for arm in ARMS)
        if abs(b / a - 1) > FLOPS_APART:
            raise ValueError(
                f"seed {seed}: RL took {a:.4g} FLOPs and SFT {b:.4g}, {b / a - 1:+.1%}: "
                "no comparison at equal FLOPs. Has one of the two not ended?"
            )
        of_rl, of_sft = (arms[arm]["card"]["dtype"] for arm in ARMS)
        if of_rl != of_sft:
            raise ValueError(
                f"seed {seed}: RL ran in {of_rl} and SFT in {of_sft}: FLOPs of two kinds"
            )


# ---- comparisons ---------------------------------------------------------------------------------


def results_of(seeds, arm, key):
    """{seed: outcomes} of an arm, of one task answered in one way."""
    return {seed: arms[arm]["results"][key] for seed, arms in seeds.items()}


def comparisons(seeds, key):
    """Of one task, answered in one way -> {pair: over_seeds}."""
    a, b, start = (results_of(seeds, arm, key) for arm in ("A", "B", "start"))
    return {
        "A - B": over_seeds(a, b),
        "A - start": over_seeds(a, start),
        "B - start": over_seeds(b, start),
    }


def answered_everywhere(seeds):
    """The (task, how) that all models of all seeds were evaluated on, in a fixed order."""
    models = [arm for arms in seeds.values() for arm in arms.values()]
    first = next(iter(seeds.values()))["A"]["results"]
    return [key for key in first if all(key in model["results"] for model in models)]


def compare_benchmarks(seeds, keys):
    """-> comparisons {key: {pair: over_seeds}}, p-values {(key, pair): p}, visible {key: share}.

    The p-values are adjusted for all tests. visible: the largest of the smallest differences that
    would be found in 4 of 5 cases after that adjustment.
    """
    found = {key: comparisons(seeds, key) for key in keys}
    tests = [(key, pair) for key in keys for pair in PAIRS]
    adjusted = dict(zip(tests, holm([found[key][pair]["p"] for key, pair in tests])))

    # The least p must be below 0.05 / tests.
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, len(tests))) + Z_POWER
    visible = {key: max(visible_at(z, d) for d in found[key].values()) for key in keys}
    return found, adjusted, visible


def visible_at(z, d):
    """statistics.smallest_effect with another z."""
    by_spread = z * math.sqrt(d["mean_square"] / d["n"])
    by_samples = z * z / d["n"] / d["samples"]
    return min(1.0, max(by_spread, by_samples))


def curves(seeds):
    """Held-out accuracy during training -> {arm: [(FLOPs since the start, accuracy)] a seed}."""
    found = {arm: [] for arm in ARMS}
    for arms in seeds.values():
        for arm, of_seeds in found.items():
            validated = [row for row in arms[arm]["rows"] if "val/accuracy" in row]
            of_seeds.append([(row["flops_total"], row["val/accuracy"]) for row in validated])
    return found


# ---- the report ----------------------------------------------------------------------------------


def report(folder, only=()):
    """-> (lines of the report, what it says as numbers, the seeds, the task).

    only: these seeds; empty: all that are there.
    """
    names = seed_names(folder, only)
    seeds = {
        int(name.removeprefix("seed")): read_seed(os.path.join(folder, name)) for name in names
    }
    check_flops(seeds)
    first = next(iter(seeds.values()))
    settings = first["A"]["state"]["settings"]
    name = settings["task"]
    task = name + (f" ({settings['task_args']})" if settings["task_args"] else "")

    # The task itself in every way that it was answered; of the benchmarks one way each.
    everywhere = answered_everywhere(seeds)
    own = [key for key in everywhere if key[0] == name]
    if (name, "greedy") not in own:
        raise ValueError(
            f"not all models in {folder} were evaluated on {name}, greedily: "
            "`bash runs/rl_vs_sft.sh` does it"
        )
    others = [key for key in everywhere if is_benchmark(key, everywhere) and key[0] != name]

    found = {key: comparisons(seeds, key) for key in own}
    d = found[name, "greedy"]["A - B"]
    verdict = verdict_with_cautions(seeds, (name, "greedy"), d)
    bench, adjusted, visible = compare_benchmarks(seeds, others)
    regression = versus_report.regression(bench, adjusted)

    lines = versus_report.head(task, verdict, regression if others else "", d)
    lines += versus_report.about(first["A"]["card"])
    lines += ["## The task", ""]
    for key, comparison in found.items():
        lines += versus_report.task_section(seeds, key, comparison)
    lines += ["![accuracy against FLOPs](accuracy.png)", ""]
    lines += versus_report.signal_section(rows_of_rl(seeds))
    lines += versus_report.cost_section(seeds)
    if others:
        lines += versus_report.benchmark_section(seeds, bench, adjusted, visible)
    lines += versus_report.reading_section(seeds, (name, "greedy"))

    numbers = dict(task=task, verdict=verdict, regression=regression)
    numbers["comparison"] = {f"{key[0]} {key[1]}": c for key, c in found.items()}
    numbers["benchmarks"] = {}
    for key, c in bench.items():
        holm_p = {pair: adjusted[key, pair] for pair in c}
        numbers["benchmarks"][f"{key[0]} {key[1]}"] = {**c, "holm": holm_p}
    numbers["curves"] = curves(seeds)
    numbers["signal"] = {seed: learnt.signal(rows) for seed, rows in rows_of_rl(seeds).items()}
    numbers["flops"] = flops_of(seeds)
    numbers["torch"] = torch.__version__
    return lines, numbers, seeds, task


def rows_of_rl(seeds):
    """-> {seed: rows of the RL run's metrics.jsonl}."""
    return {seed: arms["A"]["rows"] for seed, arms in seeds.items()}


def verdict_with_cautions(seeds, key, d):
    """Which of A and B is better; before that what makes it mean less. d: over_seeds of both."""
    words = [learnt.caution(rows_of_rl(seeds)), versus_report.failures(seeds, key)]
    words.append(verdict_over_seeds(d, "A (RL)", "B (more SFT)"))
    return "; ".join(filter(None, words))


def flops_of(seeds):
    """-> {seed: {A, B, parts of A}}."""
    found = {}
    for seed, arms in seeds.items():
        found[seed] = {arm: arms[arm]["state"]["flops"] for arm in ARMS}
        found[seed]["parts of A"] = versus_report.flops_by_part(arms["A"]["rows"])
    return found


def is_benchmark(key, everywhere):
    """Whether it is a benchmark, answered in its own way: by likelihood where it can be."""
    name, how = key
    own_way = "likelihood" if (name, "likelihood") in everywhere else "greedy"
    return name in BENCHMARKS and how == own_way


def main(folder, only=""):
    lines, numbers, seeds, task = report(folder, [int(seed) for seed in only.split(",") if seed])
    if not versus_report.plot(curves(seeds), task, os.path.join(folder, "accuracy.png")):
        lines[lines.index("![accuracy against FLOPs](accuracy.png)")] = (
            "(No plot: matplotlib is not installed. `pip install matplotlib`, and run this again.)"
        )
    path = os.path.join(folder, "report.md")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as f:
        f.write(to_json(numbers, indent=2))
    print(f"{task}\n  {numbers['verdict']}")
    print(f"  the six benchmarks: {numbers['regression']}\nwrote {path}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    seeds_are_numbers = re.fullmatch(r"[\d,]*", "".join(arguments[1:]))
    if len(arguments) not in (1, 2) or not os.path.isdir(arguments[0]) or not seeds_are_numbers:
        sys.exit(
            "usage: python -m nanorl.tools.versus <folder, such as out/versus/sum3> "
            "[seeds, such as 0,1,2]"
        )
    try:
        main(*arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
