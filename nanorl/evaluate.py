"""Problems -> outcomes -> accuracy, pass@k, intervals."""
import math

from nanorl import rollout


def outcomes(engine, tokenizer, task, indices, samples, max_new_tokens, temperature, seed=0, progress=None):
    """Sample each problem `samples` times (temperature 0: greedy, once). Returns one dict a problem, with everything
    that is needed to judge it again: index, prompt, answer, and per sample text, reward, solved, parts, length, finished."""
    problems = [task.problem(i) for i in indices]
    keys = [rollout.prompt_key(seed, "eval", i) for i in indices]
    rollouts = rollout.generate(engine, tokenizer, task, problems, keys, samples, max_new_tokens, temperature, progress)
    return [dict(index=int(i), prompt=r.problem.prompt, answer=r.problem.answer, texts=r.texts,
                 rewards=[x.total for x in r.rewards], solved=[is_correct(x) for x in r.rewards], parts=[x.parts for x in r.rewards],
                 lengths=[len(c.ids) for c in r.completions], finished=[c.finished for c in r.completions])
            for i, r in zip(indices, rollouts)]


def is_correct(reward):
    """Whether a Reward says that the problem was solved: its `correct` part, or a full reward where a task names none."""
    return bool(reward.parts.get("correct", reward.total >= 1))


def wilson(correct, n, z=1.959964):
    """95% interval of a share (Wilson 1927): correct of n -> (low, high). Stays in [0, 1], also at 0 of n."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_interval(shares, z=1.959964):
    """95% interval of the mean of per-problem shares (normal, clustered by problem): samples of one problem are not
    independent, problems are."""
    n = len(shares)
    mean = sum(shares) / n
    half = z * math.sqrt(sum((s - mean) ** 2 for s in shares) / max(1, n - 1) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(n, c, k):
    """Chance that k of the n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k), the unbiased
    estimator of Chen et al. 2021, eq. 1. Raises ValueError for k > n."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summary(results, ks=(1,)):
    """Outcomes -> accuracy with its 95% interval, pass@k, mean reward, mean length in tokens, share cut off."""
    solved = [o["solved"] for o in results]
    n, samples = len(solved), len(solved[0])
    shares = [sum(s) / samples for s in solved]
    low, high = wilson(sum(map(sum, solved)), n) if samples == 1 else clustered_interval(shares)
    tokens = [length for o in results for length in o["lengths"]]
    return dict(accuracy=sum(shares) / n, low=low, high=high, n=n, samples=samples,
                reward=sum(r for o in results for r in o["rewards"]) / len(tokens),
                length=sum(tokens) / len(tokens), clipped=1 - sum(f for o in results for f in o["finished"]) / len(tokens),
                **{f"pass@{k}": sum(pass_at_k(samples, sum(s), k) for s in solved) / n for k in ks if k <= samples})
