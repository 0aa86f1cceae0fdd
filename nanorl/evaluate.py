"""Problems -> outcomes -> accuracy, pass@k, intervals; two models' outcomes -> their difference."""
import math

import numpy as np
from tqdm import tqdm

from nanorl import rollout
from nanorl.runtime import dist

Z = 1.959964  # 97.5% point of the normal distribution: 95% intervals, two-sided tests at 5%
Z_POWER = 0.841621  # its 80% point: found in 4 of 5 cases
RATES = ("format", "answered_given_format", "correct_given_answered")


def outcomes(engine, tokenizer, task, indices, samples, max_new_tokens, temperature, seed=0, progress=None, leave_long=False):
    """Sample each problem `samples` times (temperature 0: greedy, once). Returns one dict a problem, with everything
    that is needed to judge it again: index, prompt, answer, and per sample text, reward, solved, parts, length, finished;
    of multiple choice also chance. leave_long: a prompt that does not fit the model's context is not an error but a problem not solved."""
    problems, fit = _those_that_fit(engine, tokenizer, task, indices, max_new_tokens, leave_long)
    keys = [rollout.prompt_key(seed, "eval", i) for i, fits in zip(indices, fit) if fits]
    some = [problem for problem, fits in zip(problems, fit) if fits]
    rollouts = iter(rollout.generate(engine, tokenizer, task, some, keys, samples_per_prompt=samples,
                                     max_new_tokens=max_new_tokens, temperature=temperature, progress=progress))
    made = [next(rollouts) if fits else None for fits in fit]
    return [_unsolved(i, problem, samples) if r is None else
            dict(_about(i, problem), texts=r.texts, rewards=[x.total for x in r.rewards], solved=[is_correct(x) for x in r.rewards], parts=[x.parts for x in r.rewards],
                 lengths=[len(c.ids) for c in r.completions], finished=[c.finished for c in r.completions])
            for i, problem, r in zip(indices, problems, made)]


def held_out(engine, tokenizer, task, n, max_new_tokens):
    """Greedy accuracy on a task's first n problems, over all ranks -> metrics, and the FLOPs it took."""
    n = min(n, len(task))
    mine = range(n)[dist.share(n)]
    with tqdm(total=len(mine), desc="held-out", disable=None, leave=False) as bar:
        results = outcomes(engine, tokenizer, task, mine, 1, max_new_tokens, 0.0, progress=bar.update)
    flops = dist.total(sum(engine.flops().values()))
    results = dist.gather(results)
    return dist.broadcast({f"val/{k}": v for k, v in summary(results).items()} if dist.is_main() else None), flops


def by_likelihood(engine, tokenizer, task, indices, progress=None):
    """Multiple-choice problems, each answered with the label that is likeliest as the answer's first token -> outcomes as above, with the labels' logprobs."""
    problems, fit = _those_that_fit(engine, tokenizer, task, indices, 0, True)
    found = iter(rollout.label_logprobs(engine, tokenizer, [p for p, fits in zip(problems, fit) if fits], progress))
    results = []
    for i, problem, fits in zip(indices, problems, fit):
        if not fits:
            results.append(_unsolved(i, problem, 1))
            continue
        logprobs = dict(zip(problem.meta["labels"], next(found)))
        label = max(logprobs, key=logprobs.get)
        solved = label == problem.answer
        results.append(dict(_about(i, problem), texts=[label], rewards=[float(solved)], solved=[solved], parts=[{"correct": float(solved)}], lengths=[1],
                            finished=[True], logprobs=logprobs))
    return results


def _those_that_fit(engine, tokenizer, task, indices, new_tokens, leave_long):
    """-> the problems, and which of their prompts fit the context with `new_tokens` more; all, unless those that do not are to be left."""
    problems = [task.problem(i) for i in indices]
    context = engine.learner.config.context
    return problems, [not leave_long or len(tokenizer.render_prompt(p.prompt)) + new_tokens <= context for p in problems]


def _about(index, problem):
    labels = problem.meta.get("labels")
    return dict(index=int(index), prompt=problem.prompt, answer=problem.answer, **({"chance": 1 / len(labels)} if labels else {}))


def _unsolved(index, problem, samples):
    return dict(_about(index, problem), texts=[""] * samples, rewards=[0.0] * samples, solved=[False] * samples, parts=[{}] * samples, lengths=[0] * samples,
                finished=[False] * samples, too_long=True)


def is_correct(reward):
    """Whether a Reward says that the problem was solved: its `correct` part, or a full reward where a task names none."""
    return bool(reward.parts.get("correct", reward.total >= 1))


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
    return sum((math.comb(c, G) + math.comb(n - c, G)) / math.comb(n, G) for c in right) / len(right)


def rates(results):
    """Outcomes -> RATES, where samples fail: the share in the task's format, of those the share that answer, of those that
    answer the share solved. From the parts `format` and `answered` (present where not 0); a rate whose part no reward has is
    left out, a share of no samples is None."""
    parts = [p for o in results for p in o["parts"]]
    solved = [s for o in results for s in o["solved"]]
    form, answered = ([bool(p.get(name)) for p in parts] if any(name in p for p in parts) else None for name in ("format", "answered"))
    share = lambda those, of: None if not any(of) else sum(a and b for a, b in zip(those, of)) / sum(of)
    found = [("format", form, [True] * len(parts)), ("answered_given_format", answered, form), ("correct_given_answered", solved, answered)]
    return {name: share(those, of) for name, those, of in found if those is not None and of is not None}


def summary(results, ks=(1,)):
    """Outcomes -> accuracy with its 95% interval, pass@k, mean reward, mean length in tokens, share cut off, and rates(); of multiple choice also chance,
    what guessing gets, and centred, the share of the way from there to 1, (accuracy - chance) / (1 - chance)."""
    solved = [o["solved"] for o in results]
    n, samples = len(solved), len(solved[0])
    shares = [sum(s) / samples for s in solved]
    low, high = wilson(sum(map(sum, solved)), n) if samples == 1 else clustered_interval(shares)
    tokens = [length for o in results for length in o["lengths"]]
    cut_off = sum(not finished for o in results if not o.get("too_long") for finished in o["finished"])
    accuracy, chance = sum(shares) / n, sum(o.get("chance", 0.0) for o in results) / n
    guessed = dict(chance=chance, centred=(accuracy - chance) / (1 - chance)) if chance else {}
    long = sum(o.get("too_long", False) for o in results)
    return dict(accuracy=accuracy, **guessed, **({"too_long": long} if long else {}), low=low, high=high, n=n, samples=samples,
                reward=sum(r for o in results for r in o["rewards"]) / len(tokens),
                length=sum(tokens) / len(tokens), clipped=cut_off / len(tokens),
                **{f"pass@{k}": sum(pass_at_k(samples, sum(s), k) for s in solved) / n for k in ks if k <= samples}, **rates(results))


# ---- two models on the same problems -----------------------------------------------------------------------

def mcnemar(only_a, only_b):
    """Two-sided p-value of "neither is better" from the problems that only A and only B solved (McNemar 1947, in its exact
    form): twice the chance of so few heads, or fewer, in only_a + only_b tosses of a coin. 1.0 when both are 0."""
    n, term, tail = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += term  # C(n, 0) + ... + C(n, i), in exact integers
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2 ** n)


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
        raise ValueError(f"{len(a)} shares for A and {len(b)} for B: a paired comparison needs the same problems, at least one")
    rng, n = np.random.default_rng(seed), len(a)
    differences = np.round(np.subtract(b, a), 12)  # 0.3 - 0.2 and 0.2 - 0.1 are one difference
    mean = float(differences.mean())
    values, counts = np.unique(differences, return_counts=True)  # (U,), (U,)
    sizes, size_counts = np.unique(np.abs(differences), return_counts=True)
    means, flipped = np.empty(draws), np.empty(draws)
    chunk = max(1, 2 ** 20 // len(values))  # draws at once: 8 MB of counts
    for start in range(0, draws, chunk):
        some = slice(start, min(draws, start + chunk))
        m = some.stop - start
        means[some] = rng.multinomial(n, counts / n, size=m) @ values / n
        flipped[some] = (2 * rng.binomial(size_counts, 0.5, size=(m, len(sizes))) - size_counts) @ sizes / n
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
        if any(outcome_a[key] != outcome_b[key] for key in ("prompt", "answer")) or len(outcome_a["solved"]) != len(outcome_b["solved"]):
            raise ValueError(f"problem {outcome_a['index']} of A is not problem {outcome_b['index']} of B, or has another number of samples: "
                             "evaluate both with the same task, split and samples")
    shares = lambda results: np.array([np.mean(o["solved"]) for o in results])  # (n,)
    a, b = shares(results_a), shares(results_b)
    difference, low, high, p = paired_bootstrap(a, b)
    n, samples = len(a), len(results_a[0]["solved"])
    found = dict(n=n, samples=samples, accuracy_a=float(a.mean()), accuracy_b=float(b.mean()), difference=difference, low=low, high=high)
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


# ---- in words ----------------------------------------------------------------------------------------------

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
    at_k = [f"{name} {share:.1%}" for name, share in s.items() if name.startswith("pass@") and s["samples"] > 1]
    first = (f"{s['accuracy']:6.1%}  95% [{s['low']:.1%}, {s['high']:.1%}]  {s['n']} problems{many}, "
             f"{s['length']:.1f} tokens, {s['clipped']:.1%} cut off")
    guessed = f"guessing gets {s['chance']:.1%}; {s['centred']:.1%} of the way from there to 100%" if "chance" in s else ""
    long = f"{s['too_long']} prompts do not fit the model's context and count as not solved" if "too_long" in s else ""
    return [line for line in (first, guessed, long, ", ".join(found), "  ".join(at_k)) if line]


def benchmark_table(rows):
    """[(task, how, summary with seconds and tok_per_s)] -> lines of at most 100 columns."""
    line = "{:13}  {:10}  {:>5}  {:>8}  {:16}  {:>6}  {:>7}  {:>7}  {:>9}"
    lines = [line.format("benchmark", "how", "n", "accuracy", "95%", "chance", "centred", "seconds", "tokens/s")]
    for task, how, s in rows:
        lines.append(line.format(task, how, s["n"], percent(s["accuracy"]), f"[{s['low']:.1%}, {s['high']:.1%}]", percent(s.get("chance")), percent(s.get("centred")),
                                 f"{s['seconds']:.1f}", f"{s['tok_per_s']:,.0f}"))
    return lines + ["centred: share of the way from guessing to 100%. tokens/s: of prompts (likelihood) or sampled."]


def describe_difference(c):
    """A comparison -> lines: the difference with its interval and p; of greedy answers the four counts; the verdict."""
    signed = {name: f"{100 * c[name]:+.1f}" for name in ("difference", "low", "high")}
    lines = [f"A {c['accuracy_a']:.1%}, B {c['accuracy_b']:.1%}: B - A is {signed['difference']} points, "
             f"95% [{signed['low']}, {signed['high']}], p = {c['p']:.2g}"]
    if c["samples"] == 1:
        lines.append(f"of {c['n']} problems both solve {c['both']}, only A {c['only_a']}, only B {c['only_b']}, neither {c['neither']}")
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
    lines = [line.format("", "", "", "", "", "answered", "correct", "", "").rstrip(),
             line.format("task", "pass rate", f"pass@{G}", "dead", "format", "| format", "| answered", "cut off", "verdict")]
    for name, row in rows.items():
        columns = (row["accuracy"], row[f"pass@{G}"], row["dead"], *(row.get(rate) for rate in RATES), row["clipped"])
        lines.append(line.format(name, *map(percent, columns), row["verdict"]))
    return lines + [f"dead: groups of {G} samples all right or all wrong, which teach nothing. | format: of those in the format.",
                    f"RL can learn where the pass rate is below {NEARLY_ALL:.0%} and at least {LIVE:.0%} of the groups are live. Elsewhere little is",
                    f"left from a pass rate of 50%; below it is too hard, or over {CUT_OFF:.0%} are cut off: raise --max_new_tokens."]
