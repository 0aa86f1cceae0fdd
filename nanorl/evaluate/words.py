"""Evaluations in words: lines and tables."""

from nanorl.evaluate.statistics import RATES, half_width, smallest_effect

# RL learns from live groups, those with right and wrong samples. Below one in five most of a step's
# work is wasted.
LIVE, NEARLY_ALL, CUT_OFF = 0.2, 0.95, 0.5


def percent(share):
    return "-" if share is None else f"{share:.1%}"


def points(share):
    return f"{100 * share:.1f} points"


def failed(count, reason):
    """That the reward failed on so many samples."""
    return (
        f"WARNING: the task's reward failed on {count} samples, which count as not solved, such "
        f"as: {reason}"
    )


def failed_line(name, row):
    """The same of a task's summary."""
    return f"{name}: {failed(row['failed'], row['failure'])}"


# ---- one evaluation, or two ----------------------------------------------------------------------


def what_n_shows(n, paired):
    """What to expect of n problems before any is sampled, of one model or of two compared."""
    if not paired:
        return f"with {n} problems a greedy accuracy is known to about {points(half_width(n))}"
    few, many = points(smallest_effect(n, 0.1)), points(smallest_effect(n, 0.5))
    return (
        f"with {n} problems a greedy difference below {few} (if 10% of the answers change) to "
        f"{many} (if 50%) will likely not show"
    )


def describe(summary, how=""):
    """A summary -> lines: accuracy with its interval, lengths; the rates there are; pass@k.

    how: how it was sampled.
    """
    many = how
    if summary["samples"] > 1:
        many = f" x {summary['samples']}{how}"
    interval = f"95% [{summary['low']:.1%}, {summary['high']:.1%}]"
    size = f"{summary['n']} problems{many}"
    length = f"{summary['length']:.1f} tokens, {summary['clipped']:.1%} cut off"
    lines = [f"{summary['accuracy']:6.1%}  {interval}  {size}, {length}"]

    if "chance" in summary:
        gets = f"guessing gets {summary['chance']:.1%}"
        lines.append(f"{gets}; {summary['centred']:.1%} of the way from there to 100%")
    if "too_long" in summary:
        lines.append(
            f"{summary['too_long']} prompts do not fit the model's context and count as not solved"
        )
    if "failed" in summary:
        lines.append(failed(summary["failed"], summary["failure"]))
    known = [name for name in RATES if name in summary]
    if known:
        lines.append(
            ", ".join(f"{name.replace('_', ' ')} {percent(summary[name])}" for name in known)
        )
    if summary["samples"] > 1:
        at_k = [name for name in summary if name.startswith("pass@")]
        if at_k:
            lines.append("  ".join(f"{name} {summary[name]:.1%}" for name in at_k))
    return lines


def mostly_cut_off(name, ways, max_new_tokens):
    """{way: summary} of a task -> a line for each way whose completions are mostly cut off.

    A completion that is cut off counts as not solved, whatever it says.
    """
    lines = []
    for way, summary in ways.items():
        if summary["clipped"] > CUT_OFF:
            lines.append(
                f"{name}, {way}: {summary['clipped']:.0%} of the completions are cut off at "
                f"{max_new_tokens} tokens, so the accuracy says little: give room, "
                f"--max_new_tokens={4 * max_new_tokens}"
            )
    return lines


def describe_difference(comparison):
    """A comparison -> lines: the difference with its interval and p; the verdict.

    Of greedy answers the four counts come between.
    """
    c = comparison
    accuracies = f"A {c['accuracy_a']:.1%}, B {c['accuracy_b']:.1%}"
    difference = f"B - A is {100 * c['difference']:+.1f} points"
    interval = f"95% [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]"
    lines = [f"{accuracies}: {difference}, {interval}, p = {c['p']:.2g}"]
    if c["samples"] == 1:
        lines.append(
            f"of {c['n']} problems both solve {c['both']}, only A {c['only_a']}, "
            f"only B {c['only_b']}, neither {c['neither']}"
        )
    return [*lines, c["verdict"]]


def summary_block(way, summary, temperature):
    """A way's summary as lines, with the way before the first."""
    sampled = f" at temperature {temperature:g}" if way == "sampled" else ""
    of_what = "of prompts" if way == "likelihood" else "sampled"
    speed = f"{summary['seconds']:.1f} s, {summary['tok_per_s']:,.0f} tokens/s {of_what}"
    return block(way, [*describe(summary, sampled), speed])


def difference_block(way, comparison):
    """A way's comparison as lines, with the way before the first."""
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


# ---- tables --------------------------------------------------------------------------------------


def benchmark_table(rows):
    """(task, how, summary with seconds and tok_per_s) of each -> lines of some 100 columns."""
    width = max(13, *(len(task) for task, _, _ in rows))
    line = f"{{:{width}}}" + "  {:10}  {:>5}  {:>8}  {:16}  {:>6}  {:>7}  {:>7}  {:>9}"
    head = ("benchmark", "how", "n", "accuracy", "95%", "chance", "centred", "seconds", "tokens/s")
    lines = [line.format(*head)]
    for task, how, summary in rows:
        interval = f"[{summary['low']:.1%}, {summary['high']:.1%}]"
        above_chance = percent(summary.get("chance")), percent(summary.get("centred"))
        speed = f"{summary['seconds']:.1f}", f"{summary['tok_per_s']:,.0f}"
        accuracy = percent(summary["accuracy"])
        cells = (task, how, summary["n"], accuracy, interval, *above_chance, *speed)
        lines.append(line.format(*cells))
    lines.append(
        "centred: share of the way from guessing to 100%. "
        "tokens/s: of prompts (likelihood) or sampled."
    )
    return lines


def verdict(row):
    """A summary of samples with `dead` (dead_groups) -> what RL could do on the task."""
    if row.get("failed", 0) > row["n"] * row["samples"] / 2:
        return "the reward fails"
    if row["accuracy"] < NEARLY_ALL and row["dead"] <= 1 - LIVE:
        return "RL can learn here"
    if row["accuracy"] >= 0.5:
        return "little left to learn"
    return "mostly cut off" if row["clipped"] > CUT_OFF else "too hard as it is"


def survey_table(rows, G):
    """{task: summary with pass@G, dead and verdict} -> lines of at most 110 columns, in order."""
    width = max(map(len, ("task", *rows)))
    line = f"{{:{width}}}  {{:>9}}  {{:>8}}  {{:>6}}  {{:>6}}  {{:>8}}  {{:>10}}  {{:>7}}  {{}}"
    upper = ("", "", "", "", "", "answered", "correct", "", "")
    left = ("task", "pass rate", f"pass@{G}", "dead", "format")
    right = ("| format", "| answered", "cut off", "verdict")
    lines = [line.format(*upper).rstrip(), line.format(*left, *right)]
    for name, row in rows.items():
        shares = [row["accuracy"], row[f"pass@{G}"], row["dead"]]
        shares += [row.get(rate) for rate in RATES]
        shares.append(row["clipped"])
        lines.append(line.format(name, *map(percent, shares), row["verdict"]))
    return lines + [
        f"dead: groups of {G} samples all right or all wrong, which teach nothing. "
        "| format: of those in the format.",
        f"RL can learn where the pass rate is below {NEARLY_ALL:.0%} and at least {LIVE:.0%} of "
        "the groups are live. Elsewhere little is",
        f"left from a pass rate of 50%; below it is too hard, or over {CUT_OFF:.0%} are cut off: "
        "raise --max_new_tokens.",
        *(failed_line(name, row) for name, row in rows.items() if "failed" in row),
    ]
