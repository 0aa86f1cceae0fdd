"""A run in a terminal: headline, reasons, warnings, each curve as a small block of characters."""

import math

from nanorl.report import charts, gather, verdict
from nanorl.report.rollouts import printable

WIDTH, HEIGHT = 64, 7  # of a curve, in characters
SIGNS = "o*+x"  # of a chart's lines; points before curves where they meet


def report(run):
    """gather.run -> lines of plain text."""
    about = run["about"]
    found = verdict.verdict(about)
    lines = [f"{run['name']}: {found['words']}", found["sentence"]]
    lines += [f"  {name:9}  {words}" for name, words in gather.facts(run)]
    if about["settings"].get("note"):
        lines.append(f"  hypothesis {about['settings']['note']}")
    for name, words in verdict.reasons(about) if about["kind"] == "rl" else []:
        lines.append(f"  {name}: {words}")

    rows = gather.with_derived(about)
    for chart in charts.shown(about["kind"], [rows]):
        lines += ["", *block(chart, rows)]
    warnings = [event for event in about["events"] if event.get("kind") == "warning"]
    if warnings:
        lines += ["", "Warnings"]
        lines += [f"  step {event['step']}: {event.get('text', '')}" for event in warnings]
    return [clean(line) for line in lines]


def comparison(runs):
    """Several runs -> lines: the constants that differ."""
    lines = ["What is different"]
    names = ", ".join(run["name"] for run in runs)
    for name, values in gather.differences(runs):
        lines.append(f"  {name}: " + " | ".join(str(value) for value in values))
    if len(lines) == 1:
        lines.append("  no constant")
    lines.insert(1, f"  ({names})")
    about = [run["about"] for run in runs]
    lines += verdict.against(about, [run["name"] for run in runs])
    return [clean(line) for line in lines]


def clean(line):
    """A line in which nothing can steer the terminal."""
    return "".join(map(printable, line))


# ---- a curve -------------------------------------------------------------------------------------


def block(chart, rows):
    """A chart of some rows as lines."""
    curves = [bucketed(rows, line.column) for line in chart.lines]
    values = [value for curve in curves for value in curve if value is not None]
    low, high = bounds(chart, values)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for value, _ in chart.levels:
        if value <= high:
            grid[row_of(value, low, high)] = ["."] * WIDTH
    # The first line is drawn last, over the others.
    for sign, curve in reversed(list(zip(SIGNS, curves))):
        for x, value in enumerate(curve):
            if value is not None:
                grid[row_of(value, low, high)][x] = sign

    legend = []
    for sign, line in zip(SIGNS, chart.lines):
        final = number(gather.last(rows, line.column), chart.unit)
        name = f"{line.label} " if len(chart.lines) > 1 else ""
        legend.append(f"{sign} {name}{final}")
    unit = f", {chart.unit}" if chart.unit not in ("", "share") else ""
    lines = [f"{chart.title}{unit}:  {'   '.join(legend)}"]
    for row, characters in enumerate(grid):
        label = ""
        if row in (0, HEIGHT - 1):
            label = number(high if row == 0 else low, chart.unit)
        lines.append(f"{label:>9} |{''.join(characters).rstrip()}")
    last_step = str(rows[-1]["step"])
    lines.append(" " * 10 + "+" + "-" * WIDTH)
    lines.append(" " * 11 + "0" + f"step {last_step}".rjust(WIDTH - 1))
    return lines


def bucketed(rows, name):
    """A column of the rows -> WIDTH values: means of what falls on each; None: nothing does."""
    buckets = [[] for _ in range(WIDTH)]
    final = max(1, rows[-1]["step"])
    for row, value in zip(rows, gather.column(rows, name)):
        if value is not None:
            buckets[round((WIDTH - 1) * row["step"] / final)].append(value)
    return [sum(bucket) / len(bucket) if bucket else None for bucket in buckets]


def bounds(chart, values):
    """The least and the most of a chart's axis."""
    if chart.unit == "share":
        return 0.0, 1.0 if max(values) > 0.5 else max(0.05, max(values))
    low = min(0.0, *values, 0.0)
    high = max(values)
    return low, high if high > low else low + 1


def row_of(value, low, high):
    """The line, counted from the top, that a value is on."""
    share = (value - low) / (high - low)
    return HEIGHT - 1 - min(HEIGHT - 1, max(0, math.floor(share * (HEIGHT - 1) + 0.5)))


def number(value, unit):
    if value is None:
        return "-"
    return f"{value:.1%}" if unit == "share" else f"{value:.3g}"
