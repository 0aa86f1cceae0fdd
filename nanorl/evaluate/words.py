"""Evaluations in words: lines and tables."""

from nanorl.evaluate.statistics import RATES, half_width, smallest_effect


def percent(share):
    return "-" if share is None else f"{share:.1%}"


def what_n_shows(n, paired):
    """What to expect of n problems before any is sampled, of one model or of two compared."""
    if not paired:
        return f"with {n} problems a greedy accuracy is known to about {100 * half_width(n):.1f} points"
    few, many = (f"{100 * smallest_effect(n, changed):.1f} points" for changed in (0.1, 0.5))
    return f"with {n} problems a greedy difference below {few} (if 10% of the answers change) to {many} (if 50%) will likely not show"


def describe(s, how=""):
    """A summary, and how it was sampled -> lines: accuracy with its interval, lengths; the rates there are; pass@k, of samples."""
    many = f" x {s['samples']}{how}" if s["samples"] > 1 else how
    found = [f"{name.replace('_', ' ')} {percent(s[name])}" for name in RATES if name in s]
    at_k = [
        f"{name} {share:.1%}"
        for name, share in s.items()
        if name.startswith("pass@") and s["samples"] > 1
    ]
    first = (
        f"{s['accuracy']:6.1%}  95% [{s['low']:.1%}, {s['high']:.1%}]  {s['n']} problems{many}, "
        f"{s['length']:.1f} tokens, {s['clipped']:.1%} cut off"
    )
    guessed = (
        f"guessing gets {s['chance']:.1%}; {s['centred']:.1%} of the way from there to 100%"
        if "chance" in s
        else ""
    )
    long = (
        f"{s['too_long']} prompts do not fit the model's context and count as not solved"
        if "too_long" in s
        else ""
    )
    return [line for line in (first, guessed, long, ", ".join(found), "  ".join(at_k)) if line]


def benchmark_table(rows):
    """[(task, how, summary with seconds and tok_per_s)] -> lines of at most 100 columns."""
    line = "{:13}  {:10}  {:>5}  {:>8}  {:16}  {:>6}  {:>7}  {:>7}  {:>9}"
    lines = [
        line.format(
            "benchmark", "how", "n", "accuracy", "95%", "chance", "centred", "seconds", "tokens/s"
        )
    ]
    for task, how, s in rows:
        lines.append(
            line.format(
                task,
                how,
                s["n"],
                percent(s["accuracy"]),
                f"[{s['low']:.1%}, {s['high']:.1%}]",
                percent(s.get("chance")),
                percent(s.get("centred")),
                f"{s['seconds']:.1f}",
                f"{s['tok_per_s']:,.0f}",
            )
        )
    return lines + [
        "centred: share of the way from guessing to 100%. tokens/s: of prompts (likelihood) or sampled."
    ]


def describe_difference(c):
    """A comparison -> lines: the difference with its interval and p; of greedy answers the four counts; the verdict."""
    signed = {name: f"{100 * c[name]:+.1f}" for name in ("difference", "low", "high")}
    lines = [
        f"A {c['accuracy_a']:.1%}, B {c['accuracy_b']:.1%}: B - A is {signed['difference']} points, "
        f"95% [{signed['low']}, {signed['high']}], p = {c['p']:.2g}"
    ]
    if c["samples"] == 1:
        lines.append(
            f"of {c['n']} problems both solve {c['both']}, only A {c['only_a']}, only B {c['only_b']}, neither {c['neither']}"
        )
    return lines + [c["verdict"]]


# RL learns from live groups, those with right and wrong samples: below one in five most of a step's work is wasted.
LIVE, NEARLY_ALL, CUT_OFF = 0.2, 0.95, 0.5


def verdict(row):
    """A summary of samples with `dead` (dead_groups) -> what RL could do on the task, in a few words."""
    if row["accuracy"] < NEARLY_ALL and row["dead"] <= 1 - LIVE:
        return "RL can learn here"
    if row["accuracy"] >= 0.5:
        return "little left to learn"
    return "mostly cut off" if row["clipped"] > CUT_OFF else "too hard as it is"


def survey_table(rows, G):
    """{task: summary with pass@G, dead and verdict} -> lines of at most 110 columns, in the order given."""
    line = f"{{:{max(map(len, ('task', *rows)))}}}  {{:>9}}  {{:>8}}  {{:>6}}  {{:>6}}  {{:>8}}  {{:>10}}  {{:>7}}  {{}}"
    lines = [
        line.format("", "", "", "", "", "answered", "correct", "", "").rstrip(),
        line.format(
            "task",
            "pass rate",
            f"pass@{G}",
            "dead",
            "format",
            "| format",
            "| answered",
            "cut off",
            "verdict",
        ),
    ]
    for name, row in rows.items():
        columns = (
            row["accuracy"],
            row[f"pass@{G}"],
            row["dead"],
            *(row.get(rate) for rate in RATES),
            row["clipped"],
        )
        lines.append(line.format(name, *map(percent, columns), row["verdict"]))
    return lines + [
        f"dead: groups of {G} samples all right or all wrong, which teach nothing. | format: of those in the format.",
        f"RL can learn where the pass rate is below {NEARLY_ALL:.0%} and at least {LIVE:.0%} of the groups are live. Elsewhere little is",
        f"left from a pass rate of 50%; below it is too hard, or over {CUT_OFF:.0%} are cut off: raise --max_new_tokens.",
    ]


def summary_block(way, summary, temperature):
    """A way's summary as lines, the way before the first."""
    sampled = f" at temperature {temperature:g}" if way == "sampled" else ""
    of_what = "of prompts" if way == "likelihood" else "sampled"
    speed = f"{summary['seconds']:.1f} s, {summary['tok_per_s']:,.0f} tokens/s {of_what}"
    return block(way, [*describe(summary, sampled), speed])


def difference_block(way, comparison):
    return block(way, describe_difference(comparison))


def block(label, lines):
    """Lines with a label before the first."""
    labels = [label] + [""] * len(lines)
    return [f"  {text:10}  {line}" for text, line in zip(labels, lines)]


def example(outcome):
    """One problem, and what was said."""
    asked, said = outcome["prompt"][-1]["content"], outcome["texts"][0]
    judged = f"answer {outcome['answer']}, reward {outcome['rewards'][0]:g}"
    return f"  {asked!r} -> {said!r}  ({judged})"
