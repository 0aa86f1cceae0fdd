"""Two ways of training, each with several seeds: how far is one above the other, and by chance?"""

import math

import numpy as np

from nanorl.evaluate.statistics import compare, paired_bootstrap, smallest_effect

# ---- Student's t ---------------------------------------------------------------------------------


def student_p(t, df):
    """Two-sided p-value of Student's t with `df` (a whole number) degrees of freedom.

    1 - A(t | df) in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4), with
    theta = atan(|t| / sqrt(df)):

    odd df    A = 2/pi (theta + sin theta (cos theta + 2/3 cos^3 theta + ...))
    even df   A = sin theta (1 + 1/2 cos^2 theta + (1*3)/(2*4) cos^4 theta + ...)
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    is_odd = df % 2 == 1
    term, total = (math.cos(theta) if is_odd else 1.0), 0.0
    for k in range(1 + df % 2, df, 2):  # the next term is k / (k + 1) cos^2 of this one
        total += term
        term = term * k / (k + 1) * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    if is_odd:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1.0 - inside)


def student_t(p, df):
    """The t whose two-sided p-value is p, by bisection: 4.303 for p = 0.05 and df = 2."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if student_p(middle, df) > p:
            low = middle
        else:
            high = middle
    return low


# ---- the comparison ------------------------------------------------------------------------------


def over_seeds(of, against):
    """Outcomes of two ways of training, {seed: outcomes} each -> how far `of` is above `against`.

    There are two answers to whether that is by chance:

    over problems   low, high and p, by paired_bootstrap over problems, of each the mean over seeds.
                    They hold for these seeds and other problems.
    over seeds      seeds_low, seeds_high and p_seeds, of Student's t over the seeds' differences.
                    They hold for other seeds too. Of one seed there are none. The standard error is
                    taken to be no less than that over problems, since a few seeds may differ by
                    exactly as much by chance.

    Also n problems, seeds, samples; of and against, the accuracies; difference; mean_square, of the
    problems' differences; each, the comparison of every seed (statistics.compare); smallest, the
    smallest difference that would be found in 4 of 5 cases (two-sided 5%). Over seeds that is
    (t + t') s / sqrt(S), with t and t' Student's for 5% two-sided and 20% one-sided and s the
    seeds' deviation; at least what the problems can show.

    Raises ValueError where the two have other seeds, or other problems.
    """
    seeds = sorted(of)
    if seeds != sorted(against):
        raise ValueError(
            f"seeds {seeds} against seeds {sorted(against)}: a comparison needs the same"
        )
    each = {seed: compare(against[seed], of[seed]) for seed in seeds}
    a, b = mean_shares(against, seeds), mean_shares(of, seeds)  # (n,) each
    mean, low, high, p = paired_bootstrap(a, b)
    mean_square = float(np.mean((b - a) ** 2))
    samples = len(seeds) * len(of[seeds[0]][0]["solved"])
    found = dict(n=len(a), seeds=len(seeds), samples=samples, mean_square=mean_square)
    found.update(of=float(b.mean()), against=float(a.mean()), difference=mean)
    found.update(low=low, high=high, p=p, each=each)
    found["smallest"] = smallest_effect(len(a), mean_square, samples)
    if len(seeds) == 1:
        return found

    # The standard error over seeds, which is no less than that over problems.
    differences = np.array([each[seed]["difference"] for seed in seeds])
    error = float(differences.std(ddof=1)) / math.sqrt(len(seeds))
    if len(a) > 1:
        error = max(error, float((b - a).std(ddof=1)) / math.sqrt(len(a)))

    df = len(seeds) - 1
    t = student_t(0.05, df)
    found["seeds_low"], found["seeds_high"] = mean - t * error, mean + t * error
    if error > 1e-12:
        found["p_seeds"] = student_p(mean / error, df)
    else:
        found["p_seeds"] = 1.0 if mean == 0 else p
    visible = (t + student_t(0.4, df)) * error
    found["smallest"] = min(1.0, max(found["smallest"], visible))
    return found


def mean_shares(outcomes_of, seeds):
    """{seed: outcomes} -> the share solved of each problem, on average over seeds, (n,)."""
    shares = []
    for seed in seeds:
        shares.append([np.mean(outcome["solved"]) for outcome in outcomes_of[seed]])
    return np.mean(shares, axis=0)


def holm(ps):
    """p-values of several tests -> the same, adjusted (Holm 1979).

    In 95% of cases none of those below 0.05 is then by chance.
    """
    adjusted, least = [0.0] * len(ps), 0.0
    ascending = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(ascending):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted


# ---- in words ------------------------------------------------------------------------------------


def signed_points(share):
    """A difference of shares -> points with their sign."""
    return f"{100 * share:+.1f}"


def verdict_over_seeds(d, name_of, name_against):
    """over_seeds' result -> which is better, in words."""
    sign = ">" if d["difference"] > 0 else "<"
    relation = f"{name_of} {sign} {name_against}"
    by = f"{signed_points(d['difference'])} points"
    over_other_seeds = ""
    if d["seeds"] > 1:
        interval = f"[{signed_points(d['seeds_low'])}, {signed_points(d['seeds_high'])}]"
        over_other_seeds = f"95% {interval}, p = {d['p_seeds']:.2g}"

    # The seeds speak for other seeds too.
    if d["seeds"] > 1 and d["p_seeds"] < 0.05:
        return f"{relation}: by {by}, over seeds {over_other_seeds}"

    # Or each of them shows it by itself.
    comparisons = d["each"].values()
    agree = all(c["p"] < 0.05 and c["difference"] * d["difference"] > 0 for c in comparisons)
    if agree and d["seeds"] == 1:
        over_problems = f"p = {d['p']:.2g} over {d['n']} problems"
        return (
            f"{relation} with this seed: by {by}, {over_problems}; one seed cannot speak for others"
        )
    if agree:
        worst = max(c["p"] for c in comparisons)
        return (
            f"{relation} with each of these {d['seeds']} seeds (p at most {worst:.1g} each, "
            f"over {d['n']} problems), on average by {by}; how much it is "
            f"with other seeds, {d['seeds']} cannot say: {over_other_seeds}"
        )

    seeds = f"{d['seeds']} seed{'s' if d['seeds'] > 1 else ''}"
    return (
        f"no difference that {seeds} of {d['n']} problems can see ({by}); one below about "
        f"{100 * d['smallest']:.1f} points would likely not show"
    )
