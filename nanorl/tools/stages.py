"""The stages of a run side by side: `python -m nanorl.tools.stages out/laptop`.

Reads what train_*.py and eval.py have left of base, sft and rl, of each its newest checkpoint.
Prints a table, and writes it into the run's folder as report.md.
"""

import os
import sys

from nanorl.evaluate.benchmarks import WAYS
from nanorl.evaluate.words import percent
from nanorl.runtime import checkpoint, results
from nanorl.runtime.log import duration
from nanorl.tools.summary import read_lines

STAGES = ("base", "sft", "rl")


def main(run):
    cells = {}  # {row: {stage: text}}
    found = [stage for stage in STAGES if checkpoint.latest(os.path.join(run, stage))]
    if not found:
        raise SystemExit(f"error: no checkpoint in {run}/base, sft or rl: name a run's folder")
    for stage in found:
        for row, text in rows_of(os.path.join(run, stage)).items():
            cells.setdefault(row, {})[stage] = text
    lines = [
        f"# {run}",
        "",
        *markdown(cells, found),
        "",
        "Of each stage its newest checkpoint; with 95% intervals. An empty cell: not evaluated.",
    ]
    print(*lines, sep="\n")
    with open(os.path.join(run, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    print(f"\nwrote {os.path.join(run, 'report.md')}")


def rows_of(directory):
    """A stage's folder -> {row: text}: its training, and all that was evaluated."""
    path = checkpoint.latest(directory)
    rows = {"steps": str(int(path.rpartition("_")[2]))}
    metrics = os.path.join(directory, "metrics.jsonl")
    if os.path.exists(metrics):
        seconds = sum(row.get("time/step", 0.0) for row in read_lines(metrics))
        rows["training"] = duration(seconds)
    for label, evaluated in results.read(path, "summary.json").items():
        if evaluated.get("bits_per_byte"):
            rows["bits per byte"] = f"{evaluated['bits_per_byte']:.4f}"
        if "score" in evaluated:
            rows[f"score, {label}"] = with_interval(evaluated, "score")
        for way in WAYS:
            if way in evaluated:
                rows[f"{label}, {way}"] = with_interval(evaluated[way], "accuracy")
    return rows


def with_interval(found, name):
    """0.5, 0.4 and 0.6 -> '50.0% [40.0%, 60.0%]'."""
    return f"{percent(found[name])} [{percent(found['low'])}, {percent(found['high'])}]"


def markdown(cells, stages):
    """{row: {stage: text}} -> the lines of a table whose columns are aligned."""
    table = [["", *stages]]
    for row, texts in cells.items():
        table.append([row, *(texts.get(stage, "") for stage in stages)])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = []
    for texts in table:
        padded = [text.ljust(width) for text, width in zip(texts, widths)]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m nanorl.tools.stages <run folder, such as out/laptop>")
    main(sys.argv[1])
