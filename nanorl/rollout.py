"""Where ids and text meet: problems -> rollouts with rewards -> micro-batches for the learner."""
import hashlib
import math
from collections import namedtuple
from dataclasses import dataclass

import torch

from nanorl.grpo import no_signal
from nanorl.tasks import Problem, Reward
from nanorl.tasks.pool import RAISED, TIMEOUT, Failure, RewardPool, describe


@dataclass
class Rollout:
    """One problem and its G completions: the group within which rewards are compared."""
    problem: Problem
    prompt_ids: list  # ids, ending where the assistant starts
    completions: list  # (G) of engine.Completion: ids with the stop token, log-probs, finished
    texts: list  # (G) str, the stop token stripped
    rewards: list  # (G) of Reward
    failures: list  # (G) of Failure, or None: where the reward raised, or took longer than the task allows


def prompt_key(seed, step, index):
    """The random-number key of a problem's rollouts: the same on any rank, in any order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generate(engine, tokenizer, task, problems, keys, samples, max_new_tokens, temperature, progress=None, part_weights=None):
    """Problems and their keys -> Rollouts: render, sample, decode, score. part_weights: see score."""
    prompts = [tokenizer.render_prompt(problem.prompt) for problem in problems]
    groups = engine.generate(prompts, samples_per_prompt=samples, max_new_tokens=max_new_tokens, temperature=temperature,
                             stop_ids=tokenizer.stop_ids, keys=keys, progress=progress)
    texts = [[tokenizer.decode(c.ids[:-1] if c.finished else c.ids) for c in completions] for completions in groups]
    judged = judge(task, [(problem, text) for problem, some in zip(problems, texts) for text in some])
    return [Rollout(problem, prompt, completions, some, *score(task, problem, some, [c.finished for c in completions],
                                                               judged[i * samples:(i + 1) * samples], part_weights))
            for i, (problem, prompt, completions, some) in enumerate(zip(problems, prompts, groups, texts))]


def label_logprobs(engine, tokenizer, problems, progress=None):
    """Multiple-choice problems -> of each the log-probs of its labels (meta["labels"]) as the first token of an answer."""
    token = {label: tokenizer.encode(label) for problem in problems for label in problem.meta["labels"]}
    long = [label for label, ids in token.items() if len(ids) != 1]
    if long:
        raise ValueError(f"the labels {', '.join(long)} are more than one token each in this vocabulary: their likelihoods cannot be compared as one token's")
    candidates = [[token[label][0] for label in problem.meta["labels"]] for problem in problems]
    return engine.next_logprobs([tokenizer.render_prompt(problem.prompt) for problem in problems], candidates, progress=progress)


def judge(task, pairs):
    """[(problem, text)] -> for each what the task's reward() gave, a Reward, or the Failure if it raised or took too long. A task with a `timeout`
    is asked in worker processes, any other here."""
    if getattr(task, "timeout", 0):
        if not hasattr(task, "_reward_pool"):
            task._reward_pool = RewardPool(task._recipe, task.timeout)
        results = task._reward_pool.judge(pairs)
    else:
        results = [_ask(task, *pair) for pair in pairs]
    for result in results:
        if not isinstance(result, Failure) and (not isinstance(result, Reward) or not math.isfinite(result.total)):
            raise ValueError(f"the task's reward() gave {result!r}: it must give Reward(total, parts) with a finite total")
    return results


def _ask(task, problem, text):
    try:
        return task.reward(problem, text)
    except Exception as error:
        return Failure(RAISED, describe(error))


def score(task, problem, texts, finished, judged=None, part_weights=None):
    """Texts of a problem -> (rewards, failures: a Failure or None each). All of these earn at most 0, and at most what saying nothing earns: a
    completion that was cut off, since the task is to solve the problem within the limit, and one on which the reward raises or
    hangs, since one odd completion must not end a run. part_weights {part: weight}: the total is this sum of the parts."""
    weigh = lambda reward: weighted(reward, part_weights) if part_weights and isinstance(reward, Reward) else reward
    judged = [weigh(x) for x in (judge(task, [(problem, text) for text in texts]) if judged is None else judged)]
    failures = [x if isinstance(x, Failure) else None for x in judged]
    if any(failures) or not all(finished):
        silence = weigh(judge(task, [(problem, "")])[0])
        known = [silence] if isinstance(silence, Reward) else [x for x in judged if isinstance(x, Reward)]  # or else the least of the others
        nothing = min([0.0] + [x.total for x in known])
    rewards = [Reward(nothing) if failure else x if whole else Reward(min(nothing, x.total), dict.fromkeys(x.parts, 0.0))
               for x, failure, whole in zip(judged, failures, finished)]
    return rewards, failures


def weighted(reward, part_weights):
    """The reward with another total: sum of weight * part. Raises ValueError for a part that the task does not give."""
    unknown = part_weights.keys() - reward.parts.keys()
    if unknown:
        raise ValueError(f"reward_weights names {', '.join(sorted(unknown))}: the parts of this task's reward are {', '.join(reward.parts) or 'none'}")
    return Reward(sum(weight * float(reward.parts[part]) for part, weight in part_weights.items()), reward.parts)


def reward_table(rollouts, samples):
    """Rollouts -> total rewards (P, G) in float64."""
    return torch.tensor([[r.total for r in rollout.rewards] for rollout in rollouts], dtype=torch.float64).reshape(len(rollouts), samples)


def length_table(rollouts, samples):
    """Rollouts -> sampled tokens of each completion (P, G), int64."""
    return torch.tensor([[len(c.ids) for c in rollout.completions] for rollout in rollouts], dtype=torch.long).reshape(len(rollouts), samples)


def finished_table(rollouts, samples):
    """Rollouts -> which completions were not cut off (P, G), bool."""
    return torch.tensor([[c.finished for c in rollout.completions] for rollout in rollouts], dtype=torch.bool).reshape(len(rollouts), samples)


# What the learner needs of some completions. S counts their sampled tokens; these are known from the record of what was sampled, never from id values.
Batch = namedtuple("Batch", "ids positions rows predictors targets advantages weights logprobs counts pairs reference", defaults=[None])


def micro_batches(rollouts, advantages, weights, token_budget, device):
    """Rollouts with advantages (P, G) and token weights (P, G) -> list of Batch, each of at most `token_budget` tokens (or one completion with its
    prompt), problems of like length together.

    Batch: the tokens packed into one row without padding, each prompt once and then its completions: ids and positions (1, N), and rows, what
    attention.SharedPrefixAttention needs to keep them apart (it is made where it is used, since its masks are large). One entry per sampled token, in the order of completions: predictors, the place whose activations predict it, targets, advantages,
    weights, and the sampler's logprobs, all (S,). counts: sampled tokens of each completion. pairs: (query, key) pairs of attention. reference: the
    reference policy's log-probs (S,), which the script adds where there is a KL term."""
    groups = [(rollout.prompt_ids, list(zip(rollout.completions, group_a, group_w)))
              for rollout, group_a, group_w in zip(rollouts, advantages.tolist(), weights.tolist())]
    groups.sort(key=lambda group: len(group[0]) + max(len(c.ids) for c, _, _ in group[1]))
    batches, batch, tokens = [], [], 0
    for prompt, samples in groups:
        fresh = True  # the prompt is not yet in this micro-batch
        for one in samples:
            more = len(one[0].ids) - 1 + fresh * len(prompt)  # the last token is predicted, never an input
            if batch and tokens + more > token_budget:
                batches.append(_batch(batch, device))
                batch, tokens, fresh = [], 0, True
                more = len(one[0].ids) - 1 + len(prompt)
            if fresh:
                batch.append((prompt, []))
            batch[-1][1].append(one)
            tokens, fresh = tokens + more, False
    return batches + ([_batch(batch, device)] if batch else [])


def _batch(groups, device):
    """[(prompt, [(completion, advantage, weight)])] -> Batch."""
    ids, positions, rows, predictors = [], [], [], []
    for prompt, samples in groups:
        start = len(ids)
        rows.append((start, len(prompt), start, 0))
        ids += prompt
        positions += range(len(prompt))
        for completion, _, _ in samples:
            first, n = len(ids), len(completion.ids) - 1
            rows.append((first, n, start, len(prompt)))
            ids += completion.ids[:-1]
            positions += range(len(prompt), len(prompt) + n)
            predictors += [start + len(prompt) - 1, *range(first, first + n)]  # the first token is predicted by the prompt's last
    completions, advantages, weights = zip(*(one for _, samples in groups for one in samples))
    counts = torch.tensor([len(c.ids) for c in completions])  # (completions,)
    flat = lambda lists: [x for values in lists for x in values]
    on_device = lambda values, kind=torch.long: torch.tensor(values, dtype=kind, device=device)
    per_token = lambda values: torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).to(device)
    return Batch(on_device([ids]), on_device([positions]), rows, on_device(predictors), on_device(flat(c.ids for c in completions)),
                 per_token(advantages), per_token(weights), on_device(flat(c.logprobs for c in completions), torch.float64), counts.to(device),
                 sum(n * before + n * (n + 1) // 2 for _, n, _, before in rows))


# ---- what a step's rollouts look like ----------------------------------------------------------------------

def metrics(rollouts):
    """All ranks' Rollouts of a step -> the metrics that need nothing else (docs/metrics.md)."""
    rewards = reward_table(rollouts, len(rollouts[0].rewards))  # (P, G)
    completions = [c for r in rollouts for c in r.completions]
    lengths = length_table(rollouts, rewards.size(1)).double()  # (P, G)
    dead = no_signal(rewards)
    names = sorted({name for r in rollouts for reward in r.rewards for name in reward.parts})
    by_task = {}  # of a mixture: mean rewards of its groups
    for rollout, mean in zip(rollouts, rewards.mean(dim=1).tolist()):
        by_task.setdefault(rollout.problem.task, []).append(mean)
    part = {f"reward/{name}": sum(reward.parts.get(name, 0.0) for r in rollouts for reward in r.rewards) / rewards.numel() for name in names}
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(dim=1).mean()),  # within groups
        "frac_reward_zero_std": float(dead.double().mean()),
        **part,
        **{f"reward_of/{task}": sum(means) / len(means) for task, means in sorted(by_task.items()) if task},
        **_given_format([reward.parts for r in rollouts for reward in r.rewards]),
        "reward/errors": sum(f is not None and f.kind == RAISED for r in rollouts for f in r.failures),
        "reward/timeouts": sum(f is not None and f.kind == TIMEOUT for r in rollouts for f in r.failures),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": sum(not c.finished for c in completions) / len(completions),
        "completions/unique": sum(len(set(r.texts)) for r in rollouts) / len(completions),
        "tokens_with_signal": float(lengths[~dead].sum() / lengths.sum()),
        "tokens": int(lengths.sum()),
    }


def _given_format(parts):
    """Of the completions that have the form that the task asks for, the share that is right: tells learning to solve from
    learning to comply. Absent where the task has no such parts, or no completion the form."""
    right = [bool(p["correct"]) for p in parts if p.get("format") and "correct" in p]
    return {"accuracy_given_format": sum(right) / len(right)} if right else {}


def records(rollouts, advantages, decode, **every):
    """One JSON-ready record a completion, for the rollouts file: the prompt as the model saw it, what it wrote, and
    what it got for it (and why, where the reward failed). every: what all records carry, such as step and time."""
    for number, (rollout, group) in enumerate(zip(rollouts, advantages)):
        prompt = decode(rollout.prompt_ids)
        for sample, (text, c, reward, failure, a) in enumerate(zip(rollout.texts, rollout.completions, rollout.rewards, rollout.failures, group)):
            yield dict(**every, group=number, sample=sample, prompt=prompt, answer=rollout.problem.answer, completion=text,
                       reward=reward.total, parts=reward.parts, advantage=float(a), tokens=len(c.ids),
                       finish="stop" if c.finished else "length", **({"error": failure.text} if failure else {}))
