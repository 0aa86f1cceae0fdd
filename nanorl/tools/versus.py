"""RL or more SFT? What runs/rl_vs_sft.sh has made, as a report: `python -m nanorl.tools.versus out/versus/sum3`.

Reads <folder>/seed<k>/{rl,sft_more} of each seed, two ways on from one start: A by RL, B by more SFT, for as many FLOPs (refused if they differ by more than
1%), and what eval.py found of both and of the start. Writes report.md, report.json and, where matplotlib is installed, accuracy.png."""

import json
import math
import os
import platform
import re
import sys
import time
from statistics import NormalDist

import numpy as np
import torch

from nanorl.evaluate.statistics import Z_POWER, compare, paired_bootstrap, smallest_effect
from nanorl.evaluate.words import percent
from nanorl.runtime import checkpoint
from nanorl.runtime.log import duration

BENCHMARKS = ("gsm8k", "mmlu", "arc_easy", "arc_challenge", "humaneval", "spelling")
ARMS = {"A": "rl", "B": "sft_more"}
FLOPS_APART = 0.01


# ---- statistics ------------------------------------------------------------------------------------------------


def student_p(t, df):
    """Two-sided p-value of Student's t with `df` (a whole number) degrees of freedom: 1 - A(t | df) in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(abs(t) / math.sqrt(df))
    term, total = (math.cos(theta), 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 + df % 2, df, 2):  # the next term is k / (k + 1) cos^2 of this one
        total, term = total + term, term * k / (k + 1) * math.cos(theta) ** 2
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if df % 2 else math.sin(theta) * total
    return max(0.0, 1.0 - inside)


def student_t(p, df):
    """The t whose two-sided p-value is p, by bisection: 4.303 for p = 0.05 and 2 degrees of freedom."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, df) > p else (low, middle)
    return low


def over_seeds(of, against):
    """Outcomes of two ways of training, {seed: outcomes} each, on the same problems -> how far `of` is above `against`, and two answers to whether by chance:

    problems: the mean over seeds, p and 95% interval by paired_bootstrap over problems, of each the mean over seeds. It holds for these seeds and other problems.
    seeds: 95% interval and p of Student's t over the seeds' differences. It holds for other seeds too; of one seed there is none. Their standard error is taken
    to be no less than that of the problems, since a few seeds may differ by exactly as much by chance.
    each: of every seed, as compare() gives it. smallest: the smallest difference that the seeds (of one seed, the problems) would show in 4 of 5 cases, two-sided 5%:
    (t + t') s / sqrt(S), t and t' Student's for 5% two-sided and 20% one-sided, s the seeds' deviation; at least what the problems can show."""
    seeds = sorted(of)
    if seeds != sorted(against):
        raise ValueError(
            f"seeds {seeds} against seeds {sorted(against)}: a comparison needs the same"
        )
    each = {seed: compare(against[seed], of[seed]) for seed in seeds}
    share = lambda results: np.mean(
        [[np.mean(o["solved"]) for o in results[seed]] for seed in seeds], axis=0
    )  # (n,)
    a, b, S = share(against), share(of), len(seeds)
    mean, low, high, p = paired_bootstrap(a, b)
    samples = S * len(of[seeds[0]][0]["solved"])
    found = dict(
        n=len(a),
        seeds=S,
        samples=samples,
        mean_square=float(np.mean((b - a) ** 2)),
        of=float(b.mean()),
        against=float(a.mean()),
        difference=mean,
        low=low,
        high=high,
        p=p,
        each=each,
        smallest=smallest_effect(len(a), float(np.mean((b - a) ** 2)), samples),
    )
    if S > 1:
        differences = np.array([each[seed]["difference"] for seed in seeds])
        df, error = (
            S - 1,
            max(
                float(differences.std(ddof=1)) / math.sqrt(S),
                float((b - a).std(ddof=1)) / math.sqrt(len(a)) if len(a) > 1 else 0.0,
            ),
        )
        half = student_t(0.05, df) * error
        found.update(
            seeds_low=mean - half,
            seeds_high=mean + half,
            p_seeds=student_p(mean / error, df)
            if error > 1e-12
            else 1.0
            if mean == 0
            else found["p"],
            smallest=min(
                1.0, max(found["smallest"], (student_t(0.05, df) + student_t(0.4, df)) * error)
            ),
        )
    return found


def verdict_over_seeds(d, name_of, name_against):
    """over_seeds' result -> which is better, in words."""
    relation = f"{name_of} {'>' if d['difference'] > 0 else '<'} {name_against}"
    agree = all(c["p"] < 0.05 and c["difference"] * d["difference"] > 0 for c in d["each"].values())
    points = lambda x: f"{100 * x:+.1f}"
    if d["seeds"] > 1 and d["p_seeds"] < 0.05:
        return f"{relation}: by {points(d['difference'])} points, over seeds 95% [{points(d['seeds_low'])}, {points(d['seeds_high'])}], p = {d['p_seeds']:.2g}"
    if agree and d["seeds"] == 1:
        return f"{relation} with this seed: by {points(d['difference'])} points, p = {d['p']:.2g} over {d['n']} problems; one seed cannot speak for others"
    if agree:
        worst = max(c["p"] for c in d["each"].values())
        return (
            f"{relation} with each of these {d['seeds']} seeds (p at most {worst:.1g} each, over {d['n']} problems), on average by {points(d['difference'])} points; how much it is "
            f"with other seeds, {d['seeds']} cannot say: 95% [{points(d['seeds_low'])}, {points(d['seeds_high'])}], p = {d['p_seeds']:.2g}"
        )
    return (
        f"no difference that {d['seeds']} seed{'s' if d['seeds'] > 1 else ''} of {d['n']} problems can see ({points(d['difference'])} points); one below about "
        f"{100 * d['smallest']:.1f} points would likely not show"
    )


def holm(ps):
    """p-values of several tests -> the same, adjusted so that in 95% of cases none of those below 0.05 is by chance (Holm 1979)."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted


# ---- what the runs have left ------------------------------------------------------------------------------------


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def read_seed(folder):
    """One seed's folder -> {start, A, B}: each with path, rows (metrics), state (trainer.pt), results {(task, how): outcomes}."""
    found = {}
    for arm, stage in ARMS.items():
        path = checkpoint.latest(os.path.join(folder, stage))
        if path is None:
            raise ValueError(
                f"no checkpoint in {os.path.join(folder, stage)}: `bash runs/rl_vs_sft.sh` makes it"
            )
        found[arm] = dict(
            path=path,
            rows=read_lines(os.path.join(folder, stage, "metrics.jsonl")),
            state=checkpoint.load_state(path, mmap=True),
            card=read_json(os.path.join(folder, stage, "run.json")),
        )
    starts = {arm: found[arm]["state"]["start"] for arm in ARMS}
    if starts["A"]["hash"] != starts["B"]["hash"]:
        raise ValueError(
            f"{folder}: A started from {starts['A']['path']} and B from {starts['B']['path']}, which are not the same weights"
        )
    found["start"] = dict(path=starts["A"]["path"])
    for arm in found.values():
        summary_file = checkpoint.eval_file(arm["path"], "summary.json")
        if not os.path.exists(summary_file):
            raise ValueError(
                f"{arm['path']} has not been evaluated: `bash runs/rl_vs_sft.sh` does it"
            )
        arm["summary"], arm["results"] = read_json(summary_file), {}
        for name in arm["summary"]:
            for o in read_lines(checkpoint.eval_file(arm["path"], name + ".jsonl")):
                arm["results"].setdefault((name, o["how"]), []).append(o)
    return found


def check_flops(seeds):
    """Raises ValueError unless both arms of every seed took as many FLOPs, to within FLOPS_APART, in the same precision."""
    for seed, arms in seeds.items():
        a, b = (arms[arm]["state"]["flops"]["train"] for arm in ARMS)
        if abs(b / a - 1) > FLOPS_APART:
            raise ValueError(
                f"seed {seed}: RL took {a:.4g} FLOPs and SFT {b:.4g}, {b / a - 1:+.1%}: no comparison at equal FLOPs. Has one of the two not ended?"
            )
        kinds = [arms[arm]["card"]["dtype"] for arm in ARMS]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"seed {seed}: RL ran in {kinds[0]} and SFT in {kinds[1]}: FLOPs of two kinds"
            )


# ---- the report ------------------------------------------------------------------------------------------------


def table(head, rows):
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def points(x):
    return f"{100 * x:+.1f}"


def p_value(p):
    return "< 1e-9" if p < 1e-9 else f"{p:.2g}"


def comparisons(seeds, key):
    """Of one task, answered in one way: A against B, A against the start, B against the start, over all seeds."""
    of = lambda arm: {seed: arms[arm]["results"][key] for seed, arms in seeds.items()}
    return {
        "A - B": over_seeds(of("A"), of("B")),
        "A - start": over_seeds(of("A"), of("start")),
        "B - start": over_seeds(of("B"), of("start")),
    }


def benchmark_lines(seeds, keys):
    """Six benchmarks before and after -> (lines, verdict in words, the numbers)."""
    found = {key: comparisons(seeds, key) for key in keys}
    tests = [(key, pair) for key in keys for pair in ("A - start", "B - start", "A - B")]
    adjusted = dict(zip(tests, holm([found[key][pair]["p"] for key, pair in tests])))
    z = (
        NormalDist().inv_cdf(1 - 0.025 / max(1, len(tests))) + Z_POWER
    )  # of the least p, which must be below 0.05 / tests

    def visible(d):
        return min(
            1.0, max(z * math.sqrt(d["mean_square"] / d["n"]), z * z / d["n"] / d["samples"])
        )

    rows, said = [], []
    for key in keys:
        c = found[key]
        chance = np.mean(
            [o.get("chance", 0.0) for o in next(iter(seeds.values()))["start"]["results"][key]]
        )
        cell = lambda pair: f"{points(c[pair]['difference'])} (p {p_value(adjusted[key, pair])})"
        rows.append(
            (
                key[0],
                key[1],
                c["A - B"]["n"],
                percent(float(chance)) if chance else "-",
                percent(c["A - start"]["against"]),
                percent(c["A - start"]["of"]),
                percent(c["B - start"]["of"]),
                cell("A - start"),
                cell("B - start"),
                cell("A - B"),
                f"{100 * max(map(visible, c.values())):.1f}",
            )
        )
        for arm in ARMS:
            d = c[f"{arm} - start"]
            if adjusted[key, f"{arm} - start"] < 0.05:
                other = f"over seeds p = {d['p_seeds']:.2g}" if d["seeds"] > 1 else "one seed"
                said.append(
                    f"{arm} {'lost' if d['difference'] < 0 else 'gained'} {abs(100 * d['difference']):.1f} points on {key[0]} ({key[1]}; {other})"
                )
    lines = table(
        [
            "benchmark",
            "how",
            "n",
            "chance",
            "start",
            "A: RL",
            "B: more SFT",
            "A - start",
            "B - start",
            "A - B",
            "smallest visible",
        ],
        rows,
    )
    lost = [text for text in said if " lost " in text]
    verdict = (
        "regression in these models: "
        if lost
        else "no regression that these n can see" + ("; " if said else "")
    ) + "; ".join(lost + [text for text in said if text not in lost])
    return (
        lines,
        verdict,
        {
            f"{key[0]} {key[1]}": {**c, "holm": {pair: adjusted[key, pair] for pair in c}}
            for key, c in found.items()
        },
    )


def curves(seeds):
    """-> {arm: [(FLOPs since the start, accuracy)] of each seed}, the held-out accuracy during training."""
    return {
        arm: [
            [
                (row["flops_total"], row["val/accuracy"])
                for row in arms[arm]["rows"]
                if "val/accuracy" in row
            ]
            for arms in seeds.values()
        ]
        for arm in ARMS
    }


def plot(seeds, task, path):
    """accuracy.png -> whether there is one."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for (arm, some), colour, label in zip(
        curves(seeds).items(), ("#d1495b", "#30638e"), ("A: RL", "B: more SFT")
    ):
        for i, curve in enumerate(some):
            axes.plot(
                *zip(*curve),
                color=colour,
                marker=("o", "s", "^", "D", "v")[i % 5],
                markersize=4,
                linewidth=1.5,
                alpha=0.85,
                label=label if i == 0 else None,
            )
    lowest = min(y for some in curves(seeds).values() for curve in some for _, y in curve)
    axes.set(
        xlabel="training FLOPs since the common start (evaluation apart)",
        ylabel="greedy accuracy, held out",
        ylim=(max(0.0, lowest - 0.1) - 0.02, 1.02),
    )
    axes.set_title(f"{task}, a line a seed", fontsize=10)
    axes.yaxis.set_major_formatter(lambda y, _: f"{round(100 * y, 1):g}%")  # 97.5 is not 98
    axes.grid(alpha=0.25)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    return True


def report(folder, only=()):
    """-> (lines of the report, what it says as numbers, the seeds, the task). only: these seeds; empty: all that are there."""
    names = [f"seed{seed}" for seed in only] or sorted(
        (name for name in os.listdir(folder) if re.fullmatch(r"seed\d+", name)),
        key=lambda name: int(name[4:]),
    )
    if not names:
        raise ValueError(f"no seed0, seed1, ... in {folder}: `bash runs/rl_vs_sft.sh` makes them")
    seeds = {int(name[4:]): read_seed(os.path.join(folder, name)) for name in names}
    check_flops(seeds)
    first = next(iter(seeds.values()))
    settings, card = first["A"]["state"]["settings"], first["A"]["card"]
    task = settings["task"] + (f" ({settings['task_args']})" if settings["task_args"] else "")
    everywhere = set.intersection(
        *(set(arm["results"]) for arms in seeds.values() for arm in arms.values())
    )
    main_keys = [
        key for key in first["A"]["results"] if key in everywhere and key[0] == settings["task"]
    ]
    if (settings["task"], "greedy") not in main_keys:
        raise ValueError(
            f"not all models in {folder} were evaluated on {settings['task']}, greedily: `bash runs/rl_vs_sft.sh` does it"
        )
    others = [
        key
        for key in first["A"]["results"]
        if key in everywhere
        and key[0] in BENCHMARKS
        and key[0] != settings["task"]
        and key[1] == ("likelihood" if (key[0], "likelihood") in everywhere else "greedy")
    ]
    main_found = {key: comparisons(seeds, key) for key in main_keys}
    greedy = main_found[settings["task"], "greedy"]
    verdict = verdict_over_seeds(greedy["A - B"], "A (RL)", "B (more SFT)")
    bench_lines, regression, bench_found = benchmark_lines(seeds, others)
    d = greedy["A - B"]

    lines = [
        f"# RL or more SFT? {task}",
        "",
        f"**{verdict[0].upper() + verdict[1:]}.**",
        "",
        f"On the six benchmarks: {regression}." if others else "The benchmarks were not evaluated.",
        "",
        f"The smallest difference between A and B that this experiment would show in 4 of 5 cases is {100 * d['smallest']:.1f} points ({d['seeds']} seed{'s' * (d['seeds'] > 1)}, {d['n']} problems).",
        "",
        f"A: RL with a checkable reward. B: SFT on the same task's demonstrations goes on. Both from the same SFT model, on the same training problems, for as many FLOPs. "
        f"{card['params']:,} parameters, {card['dtype'].removeprefix('torch.')} on {card['world_size']} x {card['device'].split(':')[0]}, torch {card['torch']}, "
        f"commit {(card['commit'] or 'unknown')[:7]}, {time.strftime('%Y-%m-%d')}, {platform.machine()}.",
        "",
        "## The task",
        "",
    ]
    for key, c in main_found.items():
        rows = []
        for seed, arms in seeds.items():
            one = {arm: arms[arm]["summary"][key[0]][key[1]] for arm in ("start", "A", "B")}
            cell = lambda s: f"{s['accuracy']:.1%} [{s['low']:.1%}, {s['high']:.1%}]"
            each = c["A - B"]["each"][seed]
            rows.append(
                (
                    seed,
                    *map(cell, one.values()),
                    f"{points(each['difference'])} [{points(each['low'])}, {points(each['high'])}], p {p_value(each['p'])}",
                    " / ".join(f"{s['length']:.1f}" for s in one.values()),
                )
            )
        mean = lambda pair: (
            f"{points(c[pair]['difference'])}"
            + (
                f" [{points(c[pair]['seeds_low'])}, {points(c[pair]['seeds_high'])}], p {p_value(c[pair]['p_seeds'])}"
                if d["seeds"] > 1
                else ""
            )
        )
        rows.append(
            (
                "**mean**",
                percent(c["A - start"]["against"]),
                f"**{percent(c['A - B']['of'])}**",
                f"**{percent(c['A - B']['against'])}**",
                f"**{mean('A - B')}**" + " over seeds" * (d["seeds"] > 1),
                "",
            )
        )
        lines += [
            f"{key[1].capitalize()}, {c['A - B']['n']} held-out problems; 95% intervals; p of each seed over problems, paired.",
            "",
        ]
        lines += table(
            ["seed", "start", "A: RL", "B: more SFT", "A - B, points", "tokens (start / A / B)"],
            rows,
        )
        lines += [
            f"Against the common start{', over seeds' * (d['seeds'] > 1)}: A {mean('A - start')}; B {mean('B - start')}.",
            "",
        ]
    lines += ["![accuracy against FLOPs](accuracy.png)", "", "## What both arms took", ""]
    rows = []
    for seed, arms in seeds.items():
        a, b = (arms[arm]["state"]["flops"] for arm in ARMS)
        seconds = [
            duration(sum(row.get("time/step", 0.0) for row in arms[arm]["rows"])) for arm in ARMS
        ]
        rows.append(
            (
                seed,
                f"{a['train']:.4g}",
                f"{b['train']:.4g}",
                f"{b['train'] / a['train'] - 1:+.2%}",
                f"{b['causal'] / a['causal'] - 1:+.1%}",
                arms["A"]["state"]["step"],
                arms["B"]["state"]["step"],
                " / ".join(seconds),
            )
        )
    lines += table(
        [
            "seed",
            "FLOPs of A",
            "FLOPs of B",
            "B to A",
            "B to A, causal",
            "steps of A",
            "steps of B",
            "time (A / B)",
        ],
        rows,
    )
    lines += [
        "FLOPs as they ran, without evaluation and without the optimizer's own. Causal: of attention only what a token may see, and no padding. Time is the steps', with their evaluations.",
        "",
    ]
    if others:
        lines += [
            "## The six benchmarks",
            "",
            "Means over seeds. p: over problems, for these models, adjusted for all tests of the table (Holm). Smallest visible: in points, the largest of the "
            "three differences' that would be found in 4 of 5 cases after that adjustment.",
            "",
            *bench_lines,
        ]
    lines += [
        "## To read",
        "",
        "The same held-out problems, greedy, " + f"seed {next(iter(seeds))}:",
        "",
    ]
    shown = [first[arm]["results"][settings["task"], "greedy"][:3] for arm in ("start", "A", "B")]
    for start, a, b in zip(*shown):
        lines += [
            f"* `{start['prompt'][-1]['content']!r}`, answer {start['answer']}",
            *(
                f"  * {name}: `{o['texts'][0]!r}`"
                for name, o in zip(("start", "A: RL", "B: more SFT"), (start, a, b))
            ),
        ]
    numbers = dict(
        task=task,
        verdict=verdict,
        regression=regression,
        comparison={f"{key[0]} {key[1]}": c for key, c in main_found.items()},
        benchmarks=bench_found,
        curves=curves(seeds),
        flops={
            seed: {arm: arms[arm]["state"]["flops"] for arm in ARMS} for seed, arms in seeds.items()
        },
        torch=torch.__version__,
    )
    return lines, numbers, seeds, task


def main(folder, only=""):
    lines, numbers, seeds, task = report(folder, [int(seed) for seed in only.split(",") if seed])
    if not plot(seeds, task, os.path.join(folder, "accuracy.png")):
        lines[lines.index("![accuracy against FLOPs](accuracy.png)")] = (
            "(No plot: matplotlib is not installed. `pip install matplotlib`, and run this again.)"
        )
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as f:
        json.dump(numbers, f, indent=2)
    print(
        f"{task}\n  {numbers['verdict']}\n  the six benchmarks: {numbers['regression']}\nwrote {os.path.join(folder, 'report.md')}"
    )


if __name__ == "__main__":
    if (
        len(sys.argv) not in (2, 3)
        or not os.path.isdir(sys.argv[1])
        or not re.fullmatch(r"[\d,]*", "".join(sys.argv[2:]))
    ):
        sys.exit(
            "usage: python -m nanorl.tools.versus <folder, such as out/versus/sum3> [seeds, such as 0,1,2]"
        )
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
