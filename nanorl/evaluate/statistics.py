"""Outcomes -> accuracy, pass@k, intervals; two models' outcomes -> their difference."""

import math

import numpy as np

Z = 1.959964  # 97.5% point of the normal distribution: 95% intervals, two-sided tests at 5%
Z_POWER = 0.841621  # its 80% point: found in 4 of 5 cases
DRAWS_AT_ONCE = 2**20  # counts that paired_bootstrap draws at once: 8 MB

# Where samples fail (see rates).
RATES = ("format", "answered_given_format", "correct_given_answered")


# ---- one model -----------------------------------------------------------------------------------


def wilson(correct, n, z=Z):
    """95% interval of a share, correct of n -> (low, high) (Wilson 1927).

    With p = correct / n: (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    It stays in [0, 1], also at 0 of n.
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def half_width(n):
    """Half the width of Wilson's interval over n problems where it is widest, at one half."""
    low, high = wilson(n / 2, n)
    return (high - low) / 2


def clustered_interval(shares, z=Z):
    """95% interval of the mean of the shares that were solved of each problem -> (low, high).

    mean -+ z s / sqrt(n), with s the standard deviation over problems: samples of one problem are
    not independent, problems are. Where all shares are equal, such as all 0, there is no spread to
    go by; then it is Wilson's over problems.
    """
    n = len(shares)
    mean = sum(shares) / n
    if min(shares) == max(shares):
        return wilson(mean * n, n, z)
    squares = sum((share - mean) ** 2 for share in shares)
    half = z * math.sqrt(squares / max(1, n - 1) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(n, c, k):
    """Chance that k of the n samples, of which c are right, hold a right one.

    1 - C(n-c, k) / C(n, k): unbiased (Chen et al. 2021, eq. 1). Raises ValueError for k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def dead_groups(results, G):
    """Outcomes -> expected share of groups of G samples that are all solved or all not.

    The mean over problems of (C(c, G) + C(n-c, G)) / C(n, G), for c of n samples right: unbiased,
    as pass@k is and for the same reason. With graded rewards such a group may still hold different
    rewards, and teach. Raises ValueError for G > n.
    """
    n = len(results[0]["solved"])
    if G > n:
        raise ValueError(f"groups of {G} need at least {G} samples a problem, there are {n}")
    right = [sum(outcome["solved"]) for outcome in results]
    dead = [(math.comb(c, G) + math.comb(n - c, G)) / math.comb(n, G) for c in right]
    return sum(dead) / len(right)


def rates(results):
    """Outcomes -> {RATES: share}, which tell where samples fail.

    format                   of all samples those in the task's format
    answered_given_format    of those the ones that answer
    correct_given_answered   of the samples that answer those that are right

    They come from the rewards' parts `format` and `answered` (present where not 0). A rate whose
    part no reward has is left out. A share of no samples is None.
    """
    solved = [is_solved for outcome in results for is_solved in outcome["solved"]]
    everything = [True] * len(solved)
    in_format = which_have(results, "format")
    answered = which_have(results, "answered")
    found = {}
    if in_format:
        found["format"] = share(in_format, everything)
    if in_format and answered:
        found["answered_given_format"] = share(answered, in_format)
    if answered:
        found["correct_given_answered"] = share(solved, answered)
    return found


def which_have(results, name):
    """Of each sample whether its reward has that part; None if no reward has it."""
    parts = [sample_parts for outcome in results for sample_parts in outcome["parts"]]
    if not any(name in sample_parts for sample_parts in parts):
        return None
    return [bool(sample_parts.get(name)) for sample_parts in parts]


def share(chosen, among):
    """Of the samples that are `among`, the share that is `chosen`; None if none is among."""
    if not any(among):
        return None
    both = sum(a and b for a, b in zip(chosen, among))
    return both / sum(among)


def summary(results, ks=(1,)):
    """Outcomes -> their figures.

    accuracy with low and high, its 95% interval; n problems, samples of each; pass@k for ks; the
    mean reward; length, the mean in tokens; clipped, the share cut off; and rates(). Of multiple
    choice also chance, what guessing gets, and centred, (accuracy - chance) / (1 - chance), the
    share of the way from there to 1. too_long: prompts that do not fit, where there are any. Where
    the reward failed also failed, on how many samples, and failure, the reason that came first.
    """
    solved = [outcome["solved"] for outcome in results]
    n, samples = len(solved), len(solved[0])
    right = [sum(of_problem) for of_problem in solved]
    shares = [count / samples for count in right]
    accuracy = sum(shares) / n
    low, high = wilson(sum(right), n) if samples == 1 else clustered_interval(shares)

    lengths = [length for outcome in results for length in outcome["lengths"]]
    rewards = [reward for outcome in results for reward in outcome["rewards"]]
    asked = [outcome for outcome in results if not outcome.get("too_long")]
    cut_off = sum(outcome["finished"].count(False) for outcome in asked)

    found = dict(accuracy=accuracy)
    chance = sum(outcome.get("chance", 0.0) for outcome in results) / n
    if chance:
        found.update(chance=chance, centred=(accuracy - chance) / (1 - chance))
    if len(asked) < n:
        found["too_long"] = n - len(asked)
    errors = [error for outcome in asked for error in outcome.get("errors", []) if error]
    if errors:
        found.update(failed=len(errors), failure=errors[0])
    found.update(low=low, high=high, n=n, samples=samples)
    found["reward"] = sum(rewards) / len(lengths)
    found["length"] = sum(lengths) / len(lengths)
    found["clipped"] = cut_off / len(lengths)
    for k in ks:
        if k <= samples:
            found[f"pass@{k}"] = sum(pass_at_k(samples, count, k) for count in right) / n
    return {**found, **rates(results)}


def check_judged(summary):
    """Raise ValueError where no sample was judged: an accuracy of 0 would mean nothing."""
    asked = (summary["n"] - summary.get("too_long", 0)) * summary["samples"]
    if asked and summary.get("failed") == asked:
        raise ValueError(
            f"the task's reward failed on all {asked} samples, so that there is no accuracy: mend "
            f"its reward() ({summary['failure']})"
        )


# ---- two models on the same problems -------------------------------------------------------------


def mcnemar(only_a, only_b):
    """Two-sided p-value of 'neither is better' (McNemar 1947, in its exact form).

    From the numbers of problems that only A and only B solved: twice the chance of so few heads,
    or fewer, in only_a + only_b tosses of a coin. 1.0 when both are 0.
    """
    n = only_a + only_b
    term, tail = 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += term  # C(n, 0) + ... + C(n, i), in exact integers
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def more_often(right_a, n_a, right_b, n_b):
    """One-sided p-value of 'A solves no larger share than B', of other problems each.

    Of n_a + n_b problems, as many solved as were, the chance that n_a drawn at random hold right_a
    solved ones or more (Fisher 1922, in its exact form).
    """
    right, n = right_a + right_b, n_a + n_b
    as_many = 0
    for k in range(right_a, min(n_a, right) + 1):
        as_many += math.comb(right, k) * math.comb(n - right, n_a - k)  # in exact integers
    return as_many / math.comb(n, n_a)


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Shares solved by A and by B of each problem, (n,) each -> (mean of b - a, low, high, p).

    low, high: 95% percentile interval of the mean over problems drawn anew with replacement (Efron
    1979). It has no width when all differences are equal.

    p: two-sided, by random sign flips (Fisher 1935). Were A and B alike, each difference could as
    well have had the other sign. p is the share of draws of all signs whose mean is as far from 0
    as the one seen, itself counted as a draw. It holds for few problems too, unlike one that is
    read off the bootstrap. For shares 0 and 1 it is McNemar's test.

    Only how often each distinct difference is drawn matters. So a draw is one multinomial (or, of
    signs, one binomial) count of each. These are few numbers: G samples give at most 2G + 1
    differences. Raises ValueError for unequal lengths.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"{len(a)} shares for A and {len(b)} for B: a paired comparison needs the same "
            "problems, at least one"
        )
    rng, n = np.random.default_rng(seed), len(a)
    differences = np.round(np.subtract(b, a), 12)  # 0.3 - 0.2 and 0.2 - 0.1 are one difference
    mean = float(differences.mean())
    values, counts = np.unique(differences, return_counts=True)  # (distinct,) each
    sizes, size_counts = np.unique(np.abs(differences), return_counts=True)  # without their signs

    means, flipped = np.empty(draws), np.empty(draws)
    chunk = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, draws, chunk):
        stop = min(draws, start + chunk)
        drawn = rng.multinomial(n, counts / n, size=stop - start)  # (chunk, distinct)
        means[start:stop] = drawn @ values / n

        positive = rng.binomial(size_counts, 0.5, size=(stop - start, len(sizes)))
        flipped[start:stop] = (2 * positive - size_counts) @ sizes / n
    low, high = np.quantile(means, [0.025, 0.975])
    as_far = np.sum(np.abs(flipped) >= abs(mean) - 1e-9)
    p = (1 + as_far) / (draws + 1)
    return mean, float(low), float(high), float(p)


def smallest_effect(n, changed, samples=1):
    """The smallest difference in accuracy that a paired comparison over n problems finds.

    In 4 of 5 cases (power 0.8, two-sided 5%), in [0, 1]. changed: the mean squared difference of
    the shares solved. For greedy answers that is the share of problems that one model solves and
    the other does not.

    (z + z') sqrt(changed / n), with z = 1.96 and z' = 0.84 (Connor 1987, without the difference^2
    under its second root, which makes up for the exact test being a little weaker). At least
    (z + z')^2 / n / samples: some 8 problems must change, all in one direction, each by one sample
    of `samples` or more.
    """
    z = Z + Z_POWER
    return min(1.0, max(z * math.sqrt(changed / n), z * z / n / samples))


def compare(results_a, results_b):
    """Two models' outcomes of the same problems -> their comparison.

    n, samples; accuracy_a and accuracy_b; difference, B - A, with low and high, its 95% interval
    (paired_bootstrap); p; smallest (smallest_effect, at the changes seen); verdict, in words. Of
    greedy outcomes (one sample) also the counts both, only_a, only_b, neither, and p is McNemar's.

    Raises ValueError when the two are not of the same problems, with as many samples.
    """
    check_same_problems(results_a, results_b)
    a = np.array([np.mean(outcome["solved"]) for outcome in results_a])  # (n,) shares
    b = np.array([np.mean(outcome["solved"]) for outcome in results_b])  # (n,)
    difference, low, high, p = paired_bootstrap(a, b)
    n, samples = len(a), len(results_a[0]["solved"])
    found = dict(n=n, samples=samples, accuracy_a=float(a.mean()), accuracy_b=float(b.mean()))
    found.update(difference=difference, low=low, high=high)
    if samples == 1:
        found["both"] = count((a == 1) & (b == 1))
        found["only_a"] = count((a == 1) & (b == 0))
        found["only_b"] = count((a == 0) & (b == 1))
        found["neither"] = count((a == 0) & (b == 0))
        p = mcnemar(found["only_a"], found["only_b"])

    smallest = smallest_effect(n, float(np.mean((b - a) ** 2)), samples)
    if p < 0.05:
        verdict = "B is better" if difference > 0 else "A is better"
    else:
        verdict = (
            f"no difference that n = {n} can see; one below about {100 * smallest:.1f} points "
            "would likely not show"
        )
    if said(results_a) == said(results_b):
        verdict = (
            f"no difference: all {n * samples} completions are the same, word for word, so A and B "
            "may be one model, or one that a run has not changed"
        )
    verdict = "; but ".join([verdict, *weaknesses("A", results_a), *weaknesses("B", results_b)])
    return dict(found, p=p, smallest=smallest, verdict=verdict)


def said(results):
    """What every problem's samples say; where that was not kept, something that equals nothing."""
    return [outcome.get("texts", object()) for outcome in results]


def weaknesses(name, results):
    """What makes a comparison with this model's outcomes mean less, a sentence each."""
    failed, ended = 0, []
    for outcome in results:
        failed += sum(bool(error) for error in outcome.get("errors", []))
        if not outcome.get("too_long"):
            ended += outcome.get("finished", [])
    found = []
    if failed:
        found.append(f"the reward failed on {failed} samples of {name}, which count as not solved")
    if 2 * sum(ended) < len(ended):
        share = 1 - sum(ended) / len(ended)
        found.append(
            f"{share:.0%} of the completions of {name} are cut off: raise --max_new_tokens"
        )
    return found


def check_same_problems(results_a, results_b):
    for a, b in zip(results_a, results_b):
        same_problem = a["prompt"] == b["prompt"] and a["answer"] == b["answer"]
        if not same_problem or len(a["solved"]) != len(b["solved"]):
            raise ValueError(
                f"problem {a['index']} of A is not problem {b['index']} of B, or has another "
                "number of samples: evaluate both with the same task, split and samples"
            )


def count(those):
    return int(np.sum(those))
