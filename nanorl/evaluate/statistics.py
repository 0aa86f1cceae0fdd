"""Outcomes -> accuracy, pass@k, intervals; two models' outcomes -> their difference."""

import math

import numpy as np

Z = 1.959964  # 97.5% point of the normal distribution: 95% intervals, two-sided tests at 5%
Z_POWER = 0.841621  # its 80% point: found in 4 of 5 cases
RATES = ("format", "answered_given_format", "correct_given_answered")


# ---- one model ---------------------------------------------------------------------------------------------


def wilson(correct, n, z=Z):
    """95% interval of a share (Wilson 1927): correct of n -> (low, high). Stays in [0, 1], also at 0 of n."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def half_width(n):
    """Half the width of a greedy accuracy's 95% interval over n problems where it is widest, at one half (Wilson)."""
    low, high = wilson(n / 2, n)
    return (high - low) / 2


def clustered_interval(shares, z=Z):
    """95% interval of the mean of per-problem shares (normal, clustered by problem): samples of one problem are not
    independent, problems are. Where all shares are equal, such as all 0, there is no spread to go by: Wilson over problems."""
    n = len(shares)
    mean = sum(shares) / n
    if min(shares) == max(shares):
        return wilson(mean * n, n, z)
    half = z * math.sqrt(sum((s - mean) ** 2 for s in shares) / max(1, n - 1) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(n, c, k):
    """Chance that k of the n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k), the unbiased
    estimator of Chen et al. 2021, eq. 1. Raises ValueError for k > n."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def dead_groups(results, G):
    """Outcomes -> expected share of groups of G samples that are all solved or all not, in [0, 1]: the mean over problems of
    (C(c, G) + C(n-c, G)) / C(n, G) for c of n samples right, unbiased as pass@k is and for the same reason. With graded
    rewards such a group may still hold different rewards, and teach. Raises ValueError for G > n."""
    n = len(results[0]["solved"])
    if G > n:
        raise ValueError(f"groups of {G} need at least {G} samples a problem, there are {n}")
    right = [sum(o["solved"]) for o in results]
    return sum((math.comb(c, G) + math.comb(n - c, G)) / math.comb(n, G) for c in right) / len(
        right
    )


def rates(results):
    """Outcomes -> RATES, where samples fail: the share in the task's format, of those the share that answer, of those that
    answer the share solved. From the parts `format` and `answered` (present where not 0); a rate whose part no reward has is
    left out, a share of no samples is None."""
    parts = [p for o in results for p in o["parts"]]
    solved = [s for o in results for s in o["solved"]]
    form, answered = (
        [bool(p.get(name)) for p in parts] if any(name in p for p in parts) else None
        for name in ("format", "answered")
    )
    share = lambda those, of: (
        None if not any(of) else sum(a and b for a, b in zip(those, of)) / sum(of)
    )
    found = [
        ("format", form, [True] * len(parts)),
        ("answered_given_format", answered, form),
        ("correct_given_answered", solved, answered),
    ]
    return {
        name: share(those, of) for name, those, of in found if those is not None and of is not None
    }


def summary(results, ks=(1,)):
    """Outcomes -> accuracy with its 95% interval, pass@k, mean reward, mean length in tokens, share cut off, and rates(); of multiple choice also chance,
    what guessing gets, and centred, the share of the way from there to 1, (accuracy - chance) / (1 - chance)."""
    solved = [o["solved"] for o in results]
    n, samples = len(solved), len(solved[0])
    shares = [sum(s) / samples for s in solved]
    low, high = wilson(sum(map(sum, solved)), n) if samples == 1 else clustered_interval(shares)
    tokens = [length for o in results for length in o["lengths"]]
    cut_off = sum(
        not finished for o in results if not o.get("too_long") for finished in o["finished"]
    )
    accuracy, chance = sum(shares) / n, sum(o.get("chance", 0.0) for o in results) / n
    guessed = dict(chance=chance, centred=(accuracy - chance) / (1 - chance)) if chance else {}
    long = sum(o.get("too_long", False) for o in results)
    return dict(
        accuracy=accuracy,
        **guessed,
        **({"too_long": long} if long else {}),
        low=low,
        high=high,
        n=n,
        samples=samples,
        reward=sum(r for o in results for r in o["rewards"]) / len(tokens),
        length=sum(tokens) / len(tokens),
        clipped=cut_off / len(tokens),
        **{
            f"pass@{k}": sum(pass_at_k(samples, sum(s), k) for s in solved) / n
            for k in ks
            if k <= samples
        },
        **rates(results),
    )


# ---- two models on the same problems -----------------------------------------------------------------------


def mcnemar(only_a, only_b):
    """Two-sided p-value of "neither is better" from the problems that only A and only B solved (McNemar 1947, in its exact
    form): twice the chance of so few heads, or fewer, in only_a + only_b tosses of a coin. 1.0 when both are 0."""
    n, term, tail = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += term  # C(n, 0) + ... + C(n, i), in exact integers
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Per-problem shares solved by A and by B, (n,) each -> (mean of b - a, low, high, p).

    low, high: 95% percentile interval of the mean over problems drawn anew with replacement (Efron 1979); without width when
    all differences are equal.
    p: two-sided, by random sign flips (Fisher 1935). Were A and B alike, each difference could as well have had the other
    sign; p is the share of draws of all signs whose mean is as far from 0 as the one seen, itself counted as a draw. Unlike
    one read off the bootstrap it holds for few problems too; for shares 0 and 1 it is McNemar's test.

    Only how often each distinct difference is drawn matters, so a draw is one multinomial (or, of signs, one binomial) count
    of each: few numbers, since G samples give at most 2G + 1 differences. Raises ValueError for unequal lengths."""
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"{len(a)} shares for A and {len(b)} for B: a paired comparison needs the same problems, at least one"
        )
    rng, n = np.random.default_rng(seed), len(a)
    differences = np.round(np.subtract(b, a), 12)  # 0.3 - 0.2 and 0.2 - 0.1 are one difference
    mean = float(differences.mean())
    values, counts = np.unique(differences, return_counts=True)  # (U,), (U,)
    sizes, size_counts = np.unique(np.abs(differences), return_counts=True)
    means, flipped = np.empty(draws), np.empty(draws)
    chunk = max(1, 2**20 // len(values))  # draws at once: 8 MB of counts
    for start in range(0, draws, chunk):
        some = slice(start, min(draws, start + chunk))
        m = some.stop - start
        means[some] = rng.multinomial(n, counts / n, size=m) @ values / n
        flipped[some] = (
            (2 * rng.binomial(size_counts, 0.5, size=(m, len(sizes))) - size_counts) @ sizes / n
        )
    low, high = np.quantile(means, [0.025, 0.975])
    p = (1 + np.sum(np.abs(flipped) >= abs(mean) - 1e-9)) / (draws + 1)
    return mean, float(low), float(high), float(p)


def smallest_effect(n, changed, samples=1):
    """The smallest difference in accuracy that a paired comparison over n problems finds in 4 of 5 cases (power 0.8,
    two-sided 5%), in [0, 1]. `changed`: the mean squared difference of the shares solved, which for greedy answers is the
    share of problems that one model solves and the other does not.

    (z + z') sqrt(changed / n), z = 1.96, z' = 0.84: Connor 1987, without the difference^2 under its second root, which makes
    up for the exact test being a little weaker. At least (z + z')^2 / n / samples: some 8 problems must change, all in one
    direction, each by one sample of `samples` or more."""
    z = Z + Z_POWER
    return min(1.0, max(z * math.sqrt(changed / n), z * z / n / samples))


def compare(results_a, results_b):
    """Two models' outcomes of the same problems -> n, samples, accuracy of each, difference B - A with its 95% interval
    (paired_bootstrap), p, smallest (smallest_effect, at the changes seen), verdict (in words).

    Greedy outcomes (one sample): also the counts both, only_a, only_b, neither, and p is McNemar's. Raises ValueError when
    the two are not of the same problems, with as many samples."""
    for outcome_a, outcome_b in zip(results_a, results_b):
        if any(outcome_a[key] != outcome_b[key] for key in ("prompt", "answer")) or len(
            outcome_a["solved"]
        ) != len(outcome_b["solved"]):
            raise ValueError(
                f"problem {outcome_a['index']} of A is not problem {outcome_b['index']} of B, or has another number of samples: "
                "evaluate both with the same task, split and samples"
            )
    shares = lambda results: np.array([np.mean(o["solved"]) for o in results])  # (n,)
    a, b = shares(results_a), shares(results_b)
    difference, low, high, p = paired_bootstrap(a, b)
    n, samples = len(a), len(results_a[0]["solved"])
    found = dict(
        n=n,
        samples=samples,
        accuracy_a=float(a.mean()),
        accuracy_b=float(b.mean()),
        difference=difference,
        low=low,
        high=high,
    )
    if samples == 1:
        count = lambda in_a, in_b: int(np.sum((a == in_a) & (b == in_b)))
        found.update(both=count(1, 1), only_a=count(1, 0), only_b=count(0, 1), neither=count(0, 0))
        p = mcnemar(found["only_a"], found["only_b"])
    smallest = smallest_effect(n, float(np.mean((b - a) ** 2)), samples)
    if p < 0.05:
        words = "B is better" if difference > 0 else "A is better"
    else:
        words = f"no difference that n = {n} can see; one below about {100 * smallest:.1f} points would likely not show"
    return dict(**found, p=p, smallest=smallest, verdict=words)
