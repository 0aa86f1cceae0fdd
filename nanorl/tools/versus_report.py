"""How versus.py's report is worded: Markdown, section by section, and the plot.

seeds: {seed: {start, A, B}}, as versus.read_seed gives them. key: (task, how). A comparison:
{pair: over_seeds' result}.
"""

import platform
import time

import numpy as np

from nanorl.evaluate.seeds import signed_points
from nanorl.evaluate.words import percent
from nanorl.report.cost import PARTS
from nanorl.runtime.log import duration
from nanorl.tools import learnt

NAMES = {"start": "start", "A": "A: RL", "B": "B: more SFT"}
COLOURS = {"A": "#d1495b", "B": "#30638e"}
MARKERS = ("o", "s", "^", "D", "v")


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append(f"| {' | '.join(map(str, row))} |")
    return [*lines, ""]


def p_value(p):
    return "< 1e-9" if p < 1e-9 else f"{p:.2g}"


# ---- the first lines -----------------------------------------------------------------------------


def head(task, verdict, regression, d):
    """d: of A against B, greedy. regression: empty where no benchmark was evaluated."""
    on_benchmarks = "The benchmarks were not evaluated."
    if regression:
        on_benchmarks = f"On the six benchmarks: {regression}."
    seeds = f"{d['seeds']} seeds" if d["seeds"] > 1 else "1 seed"
    smallest = f"{100 * d['smallest']:.1f} points ({seeds}, {d['n']} problems)"
    return [
        f"# RL or more SFT? {task}",
        "",
        f"**{verdict[0].upper() + verdict[1:]}.**",
        "",
        on_benchmarks,
        "",
        "The smallest difference between A and B that this experiment would show in 4 of 5 cases "
        f"is {smallest}.",
        "",
    ]


def about(card):
    """card: run.json of the first RL run."""
    what = (
        "A: RL with a checkable reward. B: SFT on the same task's demonstrations goes on. Both "
        "from the same SFT model, on the same training problems, for as many FLOPs."
    )
    dtype = card["dtype"].removeprefix("torch.")
    kind = card["device"].split(":")[0]
    model = f"{card['params']:,} parameters, {dtype}"
    devices = f"{card['world_size']} x {kind}"
    commit = (card["commit"] or "unknown")[:7]
    made = f"torch {card['torch']}, commit {commit}, {time.strftime('%Y-%m-%d')}"
    return [f"{what} {model} on {devices}, {made}, {platform.machine()}.", ""]


def failures(seeds, key):
    """On how many answers the reward failed, of each arm over the seeds; "" where on none."""
    name, how = key
    words = []
    for arm, of_arm in NAMES.items():
        failed = n = 0
        for arms in seeds.values():
            summary = arms[arm]["summary"][name][how]
            failed += summary.get("failed", 0)
            n += summary["n"] * summary["samples"]
        if failed:
            words.append(f"{failed:,} of {n:,} answers of {of_arm}")
    if not words:
        return ""
    return f"the task's reward failed on {', '.join(words)}, which count as not solved"


# ---- the task ------------------------------------------------------------------------------------


def task_section(seeds, key, comparison):
    """A row a seed, and the means."""
    name, how = key
    a_b = comparison["A - B"]
    rows = []
    for seed, arms in seeds.items():
        summaries = [arms[arm]["summary"][name][how] for arm in NAMES]
        each = a_b["each"][seed]
        low, high = signed_points(each["low"]), signed_points(each["high"])
        by = signed_points(each["difference"])
        difference = f"{by} [{low}, {high}], p {p_value(each['p'])}"
        lengths = " / ".join(f"{summary['length']:.1f}" for summary in summaries)
        rows.append((seed, *map(accuracy, summaries), difference, lengths))

    over_seeds = " over seeds" if a_b["seeds"] > 1 else ""
    start = percent(comparison["A - start"]["against"])
    of_a, of_b = percent(a_b["of"]), percent(a_b["against"])
    mean = f"**{mean_difference(a_b)}**{over_seeds}"
    rows.append(("**mean**", start, f"**{of_a}**", f"**{of_b}**", mean, ""))

    columns = ["seed", *NAMES.values(), "A - B, points", "tokens (start / A / B)"]
    against_start = [mean_difference(comparison[f"{arm} - start"]) for arm in ("A", "B")]
    over = ", over seeds" if a_b["seeds"] > 1 else ""
    return [
        f"{how.capitalize()}, {a_b['n']} held-out problems; 95% intervals; "
        "p of each seed over problems, paired.",
        "",
        *table(columns, rows),
        f"Against the common start{over}: A {against_start[0]}; B {against_start[1]}.",
        "",
    ]


def accuracy(summary):
    words = f"{summary['accuracy']:.1%} [{summary['low']:.1%}, {summary['high']:.1%}]"
    if "failed" in summary:
        words += f" (the reward failed on {summary['failed']} samples)"
    return words


def mean_difference(d):
    """Over seeds, with its interval and p where there are several."""
    mean = signed_points(d["difference"])
    if d["seeds"] == 1:
        return mean
    low, high = signed_points(d["seeds_low"]), signed_points(d["seeds_high"])
    return f"{mean} [{low}, {high}], p {p_value(d['p_seeds'])}"


# ---- what RL learnt from ----------------------------------------------------------------------


def signal_section(rows_of):
    """rows_of: {seed: rows of the RL run's metrics.jsonl}."""
    rows = []
    for seed, of_seed in rows_of.items():
        found = learnt.signal(of_seed)
        steps = [row for row in of_seed if "tokens_with_signal" in row]
        with_signal = sum(row["tokens_with_signal"] for row in steps) / len(steps)
        counts = found["steps"], found["none"], found["almost"]
        rows.append((seed, *counts, percent(found["right"]), percent(with_signal)))
    columns = ["seed", "steps", "without signal", "with almost none", "right in those"]
    return [
        "## What RL learnt from",
        "",
        *table([*columns, "tokens with signal"], rows),
        "Without signal: the rewards of every group are equal, or no update changed the weights. "
        f"Almost none: those of {learnt.ALMOST:.0%} of the groups or more are equal. "
        "Right: of the samples of these steps. Tokens with signal: those in other groups, "
        "the mean over all steps.",
        "",
    ]


# ---- what it took --------------------------------------------------------------------------------


def cost_section(seeds):
    rows = []
    for seed, arms in seeds.items():
        a, b = (arms[arm]["state"]["flops"] for arm in ("A", "B"))
        steps = [arms[arm]["state"]["step"] for arm in ("A", "B")]
        times = [time_of(arms[arm]["rows"]) for arm in ("A", "B")]
        more = b["train"] / a["train"] - 1
        more_causal = b["causal"] / a["causal"] - 1
        flops = f"{a['train']:.4g}", f"{b['train']:.4g}", f"{more:+.2%}", f"{more_causal:+.1%}"
        rows.append((seed, *flops, *steps, " / ".join(times)))
    flops_columns = ["seed", "FLOPs of A", "FLOPs of B", "B to A", "B to A, causal"]
    return [
        "## What both arms took",
        "",
        *table([*flops_columns, "steps of A", "steps of B", "time (A / B)"], rows),
        "FLOPs as they ran, without evaluation and without the optimizer's own. Causal: of "
        "attention only what a token may see, and no padding. Time is the steps', with their "
        "evaluations.",
        "",
        *parts_table(seeds),
    ]


def parts_table(seeds):
    """The FLOPs of RL by what they were for."""
    rows = []
    for seed, arms in seeds.items():
        flops = flops_by_part(arms["A"]["rows"])
        whole = sum(flops.values())
        cells = [seed]
        for part in flops.values():
            cells.append(f"{part:.4g} ({part / whole:.0%})")
        rows.append(cells)
    columns = [f"{part} of A" for part in flops]
    return [
        *table(["seed", *columns], rows),
        "Prefill and decode are the sampler's, forward and backward the learner's. All of B's are "
        "forward and backward.",
        "",
    ]


def flops_by_part(rows):
    """metrics rows of an RL run -> {part: FLOPs} over all steps, of every part."""
    flops = {}
    for part in PARTS:
        flops[part] = sum(row.get(f"flops/{part}", 0) for row in rows)
    return flops


def time_of(rows):
    return duration(sum(row.get("time/step", 0.0) for row in rows))


# ---- the benchmarks ------------------------------------------------------------------------------


def benchmark_section(seeds, found, adjusted, visible):
    """found, adjusted, visible: as versus.compare_benchmarks gives them."""
    first = next(iter(seeds.values()))["start"]["results"]
    rows = []
    for key, comparison in found.items():
        chance = float(np.mean([outcome.get("chance", 0.0) for outcome in first[key]]))
        a, b = comparison["A - start"], comparison["B - start"]
        shares = percent(a["against"]), percent(a["of"]), percent(b["of"])
        differences = []
        for pair in ("A - start", "B - start", "A - B"):
            by = signed_points(comparison[pair]["difference"])
            differences.append(f"{by} (p {p_value(adjusted[key, pair])})")
        what = (*key, a["n"], percent(chance) if chance else "-")
        rows.append((*what, *shares, *differences, f"{100 * visible[key]:.1f}"))
    columns = ["benchmark", "how", "n", "chance", *NAMES.values()]
    columns += ["A - start", "B - start", "A - B", "smallest visible"]
    return [
        "## The six benchmarks",
        "",
        "Means over seeds. p: over problems, for these models, adjusted for all tests of the table "
        "(Holm). Smallest visible: in points, the largest of the three differences' that would be "
        "found in 4 of 5 cases after that adjustment.",
        "",
        *table(columns, rows),
    ]


def regression(found, adjusted):
    """What RL and SFT have lost and gained on the benchmarks, in words."""
    lost, gained = [], []
    for key, comparison in found.items():
        for arm in ("A", "B"):
            d = comparison[f"{arm} - start"]
            if adjusted[key, f"{arm} - start"] >= 0.05:
                continue
            over_seeds = f"over seeds p = {d['p_seeds']:.2g}" if d["seeds"] > 1 else "one seed"
            name, how = key
            points = abs(100 * d["difference"])
            by = f"{points:.1f} points on {name} ({how}; {over_seeds})"
            if d["difference"] < 0:
                lost.append(f"{arm} lost {by}")
            else:
                gained.append(f"{arm} gained {by}")
    if lost:
        return "regression in these models: " + "; ".join(lost + gained)
    return "; ".join(["no regression that these n can see", *gained])


# ---- to read -------------------------------------------------------------------------------------


def reading_section(seeds, key):
    """What the three models of the first seed said to the first problems."""
    seed, arms = next(iter(seeds.items()))
    lines = ["## To read", "", f"The same held-out problems, greedy, seed {seed}:", ""]
    for outcomes in zip(*(arms[arm]["results"][key][:3] for arm in NAMES)):
        asked = outcomes[0]
        lines.append(f"* `{asked['prompt'][-1]['content']!r}`, answer {asked['answer']}")
        for name, outcome in zip(NAMES.values(), outcomes):
            lines.append(f"  * {name}: `{outcome['texts'][0]!r}`")
    return lines


def plot(curves, task, path):
    """accuracy.png -> whether there is one. curves: {arm: [(FLOPs, accuracy)] of each seed}."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    lowest = 1.0
    for arm, of_seeds in curves.items():
        for i, curve in enumerate(of_seeds):
            flops, shares = zip(*curve)
            lowest = min(lowest, *shares)
            marker = MARKERS[i % len(MARKERS)]
            label = NAMES[arm] if i == 0 else None
            style = dict(color=COLOURS[arm], marker=marker, markersize=4, linewidth=1.5, alpha=0.85)
            axes.plot(flops, shares, label=label, **style)
    axes.set_xlabel("training FLOPs since the common start (evaluation apart)")
    axes.set_ylabel("greedy accuracy, held out")
    axes.set_ylim(max(0.0, lowest - 0.1) - 0.02, 1.02)
    axes.set_title(f"{task}, a line a seed", fontsize=10)
    axes.yaxis.set_major_formatter(lambda y, _: f"{round(100 * y, 1):g}%")  # 97.5 is not 98
    axes.grid(alpha=0.25)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    return True
