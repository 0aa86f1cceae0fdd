"""The table at the end of the check: each figure with its target and a verdict."""

from typing import NamedTuple

from gpu_checks.common import D12, D20, FEW_ROWS, MANY_ROWS


class Line(NamedTuple):
    """A figure of the table: a field of a part's result."""

    what: str
    part: str
    field: str
    where: dict = {}  # fields that the result must have with these values
    form: str = ",.3g"
    least: float | None = None  # the target: at least, or
    most: float | None = None  # at most


# Of a whole step: what it is called, its field, its form.
STEP_FIELDS = (
    ("of it the rollout", "rollout_s", ",.3g"),
    ("of it the learner", "learner_s", ",.3g"),
    ("GPU utilisation", "utilisation", ".0%"),
    ("watts", "watts", ".0f"),
    ("GB allocated", "allocated_gb", ",.3g"),
)


def rollout_lines(depth, rows, least, of_floor):
    """A rollout's lines of the table."""
    where = dict(depth=depth, rows=rows)
    what = f"d{depth}, {rows:,} rows:"
    return [
        Line(f"{what} tokens/s", "decode", "tok_s", where, ",.0f", least=least),
        Line(f"{what} share of the floor", "decode", "of_floor", where, ".1%", least=of_floor),
        Line(f"{what} ms a decode step", "decode", "ms_step", where),
    ]


def step_lines(depth, most, mfu):
    """Lines of the table of a decode step's kernels, the learner, a whole step."""
    where = dict(depth=depth)
    as_it_is = dict(depth=depth, variant="as it is")
    found = [
        Line(f"d{depth} decode step: kernels", "profile", "kernels", as_it_is, ",.0f"),
        Line(f"d{depth} learner: MFU", "learner", "mfu", where, ".1%", least=mfu),
        Line(f"d{depth} step: seconds", "step", "seconds", where, most=most),
    ]
    for what, field, form in STEP_FIELDS:
        found.append(Line(f"d{depth} step: {what}", "step", field, where, form))
    return found


MACHINE_LINES = [
    Line("matrix products, TFLOP/s", "where", "tflops"),
    Line("copying, TB/s", "where", "copy_tb_s"),
    Line("fp32: equal completions, of 64", "exact", "equal", dict(call=2), ".0f", least=64),
    Line("fp32: log-probs, largest gap", "exact", "gap", dict(call=2), ".1e", most=1e-4),
    Line("fp32: gradient, relative difference", "exact", "gradient", form=".1e", most=1e-4),
]
SPEED_LINES = [
    *rollout_lines(D20, FEW_ROWS, 100_000, 0.3),
    *rollout_lines(D20, MANY_ROWS, 200_000, None),
    *rollout_lines(D12, FEW_ROWS, None, None),
    *rollout_lines(D12, MANY_ROWS, None, None),
    *step_lines(D20, 1.3, 0.4),
    *step_lines(D12, None, 0.4),
]
# d12 is the depth's name on a GPU.
TRAINING_LINES = [
    Line("d12 GSM8K's shape: seconds a step", "run", "step_s"),
    Line("d12 GSM8K's shape: minutes for 467 steps", "run", "minutes_of_467", most=12),
    Line("d12 GSM8K's shape: peak GB", "run", "peak_gb"),
    Line("d12 GSM8K's shape: peak over forecast", "run", "of_forecast", form=".2f", most=1),
    Line("d12 GSM8K's shape: GPU utilisation", "run", "utilisation", form=".0%"),
    Line("d12 GSM8K's shape: watts", "run", "watts", form=".0f"),
    Line("quickstart: greedy accuracy after SFT", "quickstart", "sft", form=".1%"),
    Line("quickstart: greedy accuracy after RL", "quickstart", "rl", form=".1%", least=0.94),
    Line("kill -9, resumed: largest difference", "resume", "difference", form=".1e", most=1e-3),
    Line("the same of two whole runs", "resume", "of_two_whole_runs", form=".1e"),
]
LINES = MACHINE_LINES + SPEED_LINES + TRAINING_LINES


def lines(report):
    """The report of gpu_check.py -> lines of text."""
    shown = figures(report, LINES)
    shown += ["", "attention:", *aligned(attention_rows(report))]
    shown += ["", "fast paths:", *aligned(path_rows(report))]
    return shown + troubles(report)


def figures(report, wanted):
    """The heading, and the figures that are wanted (Lines) -> lines of text."""
    shown = [f"{report['card']}, torch {report['torch']}, {report['commit']}, {report['date']}"]
    if report["tiny"]:
        shown.append("--tiny: the sizes are toys, and no figure means anything")
    rows = [("", "measured", "target", "verdict")]
    for line in wanted:
        rows.append(row_of(report, line))
    return shown + aligned(rows)


def troubles(report):
    """A line for each part that did not end well."""
    shown = []
    for part, found in report["parts"].items():
        if found["status"] != "ok":
            shown.append(f"{part} {found['status']}")
    return shown


def row_of(report, line):
    """A Line's row of the table."""
    value = find(report, line)
    target = ""
    if line.least is not None:
        target = f"at least {line.least:{line.form}}"
    if line.most is not None:
        target = f"at most {line.most:{line.form}}"
    shown = "" if value is None else f"{value:{line.form}}"
    return line.what, shown, target, verdict(value, line)


def verdict(value, line):
    """ok, below or not measured; nothing where there is no target."""
    if value is None:
        return "not measured"
    if line.least is None and line.most is None:
        return ""
    high_enough = line.least is None or value >= line.least
    low_enough = line.most is None or value <= line.most
    return "ok" if high_enough and low_enough else "below"


def find(report, line):
    """The value of a Line in the report, or None."""
    for result in report["parts"].get(line.part, {}).get("results", []):
        fits = all(result.get(name) == value for name, value in line.where.items())
        if fits and line.field in result:
            return result[line.field]
    return None


def results_of(report, part, field):
    """The results of a part that have a field."""
    found = report["parts"].get(part, {}).get("results", [])
    return [result for result in found if field in result]


def attention_rows(report):
    rows = [("shape", "backend", "ms at first", "ms then")]
    for result in results_of(report, "where", "attention"):
        if "error" in result:
            rows.append((result["attention"], "error", result["error"][:60], ""))
            continue
        milliseconds = [f"{1000 * result[name]:.2f}" for name in ("first_s", "seconds")]
        rows.append((result["attention"], result["backend"] or "", *milliseconds))
    return rows


def path_rows(report):
    """Each variant's tokens/s, and the kernels of a decode step."""
    rows = [("", "variant", "tokens/s", "kernels a decode step")]
    for result in results_of(report, "paths", "variant"):
        depth, variant = result["depth"], result["variant"]
        what = f"d{depth} {result['of']}"
        kernels = None
        if result["of"] == "decode":
            what += f", {result['rows']:,} rows"
            wanted = dict(depth=depth, variant=variant)
            kernels = find(report, Line("", "profile", "kernels", wanted))
        shown = "" if kernels is None else f"{kernels:,}"
        rows.append((what, variant, f"{result['tok_s']:,.0f}", shown))
    return rows


def aligned(rows):
    """Rows of texts -> lines whose columns stand under each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    shown = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        shown.append("  ".join(cells).rstrip())
    return shown
