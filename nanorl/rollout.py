"""Where ids and text meet: problems -> completions -> rewards.

The letters are gpt.py's: P problems, G samples of each.
"""

import hashlib
from dataclasses import dataclass

import torch

from nanorl.tasks import Problem, Reward, parse_weights
from nanorl.tasks.pool import Failure, RewardPool, ask


@dataclass
class Rollout:
    """One problem and its G completions: the group within which rewards are compared."""

    problem: Problem
    prompt_ids: list  # ids, ending where the assistant starts
    completions: list  # (G) of Completion: ids with the stop token, their log-probs, finished
    texts: list  # (G) str, without the stop token
    rewards: list  # (G) of Reward
    failures: list  # (G) of Failure where the reward raised or took too long, else None
    entropies: list = None  # (G) lists, of each token's distribution, once it was learnt from


# ---- problems -> Rollouts ------------------------------------------------------------------------


def sample(engine, tokenizer, task, step, asked, settings):
    """Sample for a training step. asked: (number, problem) pairs -> a Rollout of each."""
    seed = settings["seed"]
    return generate(
        engine,
        tokenizer,
        task,
        problems=[problem for _, problem in asked],
        keys=[prompt_key(seed, step, number) for number, _ in asked],
        part_weights=parse_weights(settings["reward_weights"]),
        samples_per_prompt=settings["samples_per_prompt"],
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
    )


def prompt_key(seed, step, number):
    """The random-number key of a problem's samples: the same on any rank, in any order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generate(engine, tokenizer, task, problems, keys, part_weights=None, **sampling):
    """Problems and the keys of their random numbers -> Rollouts.

    part_weights: see score. sampling: what Engine.generate takes besides, such as
    samples_per_prompt, max_new_tokens and temperature.
    """
    # Text -> ids -> ids.
    prompts = [tokenizer.render_prompt(problem.prompt) for problem in problems]
    groups = engine.generate(prompts, stop_ids=tokenizer.stop_ids, keys=keys, **sampling)

    # Ids -> text. All texts are judged in one call, since the task may have several workers.
    texts, questions = [], []
    for problem, completions in zip(problems, groups):
        group_texts = [text_of(completion, tokenizer) for completion in completions]
        texts.append(group_texts)
        questions += [(problem, text) for text in group_texts]
    results = iter(judge(task, questions))

    # Text -> rewards, group by group.
    rollouts = []
    for problem, prompt, completions, group_texts in zip(problems, prompts, groups, texts):
        finished = [completion.finished for completion in completions]
        judged = [next(results) for _ in group_texts]
        rewards, failures = score(task, problem, group_texts, finished, judged, part_weights)
        rollouts.append(Rollout(problem, prompt, completions, group_texts, rewards, failures))
    return rollouts


def text_of(completion, tokenizer):
    """What a completion says. Its stop token is left out here, and here only."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids)


# ---- texts -> rewards ----------------------------------------------------------------------------


def judge(task, questions):
    """(problem, text) pairs -> of each what the task's reward() gave: a Reward or a Failure.

    A Failure stands where it raised, gave no Reward of finite numbers, or took too long. A task
    that has a `timeout` is asked in worker processes, any other one here.
    """
    if getattr(task, "timeout", 0):
        if not hasattr(task, "_reward_pool"):
            task._reward_pool = RewardPool(task._recipe, task.timeout)
        return task._reward_pool.judge(questions)
    return [ask(task, problem, text) for problem, text in questions]


def check_weights(problems, part_weights):
    """Raise ValueError where part_weights name a part that a task does not give, before any step.

    problems: a problems.Problems. A few empty answers of each of its tasks are judged.
    """
    if not part_weights:
        return
    for _, task in problems.stages:
        few = min(problems.limit or len(task), 20)
        for result in judge(task, [(task.problem(i), "") for i in range(few)]):
            weighted(result, part_weights)


def score(task, problem, texts, finished, judged=None, part_weights=None):
    """Texts of one problem -> (rewards, failures), of each text a Reward, and a Failure or None.

    judged: what judge() gave for them, if it was asked already. part_weights {part: weight}: a
    reward's total is this sum of its parts. A text earns what reward() says, with two exceptions:

    1. reward() raised or took too long: it earns what silence, the empty text, earns, and never
       more than 0. To break the verifier must not pay.
    2. The completion was cut off: it earns at most what silence earns, and at most 0. The task is
       to solve the problem within the limit. Where a wrong answer costs something, rambling on
       must not be a way around it.
    """
    if judged is None:
        judged = judge(task, [(problem, text) for text in texts])
    judged = [weighted(result, part_weights) for result in judged]
    failures = [result if isinstance(result, Failure) else None for result in judged]
    if all(finished) and not any(failures):
        return judged, failures

    silence = worth_of_silence(task, problem, judged, part_weights)
    rewards = []
    for result, failure, whole in zip(judged, failures, finished):
        if failure:
            rewards.append(Reward(silence))
        elif not whole:
            no_parts = {name: 0.0 for name in result.parts}
            rewards.append(Reward(min(silence, result.total), no_parts))
        else:
            rewards.append(result)
    return rewards, failures


def worth_of_silence(task, problem, judged, part_weights):
    """What the empty text earns, at most 0."""
    [empty] = judge(task, [(problem, "")])
    if isinstance(empty, Failure):
        # The reward fails on it too: then it is worth the least of what the others earn.
        known = [result.total for result in judged if isinstance(result, Reward)]
    else:
        known = [weighted(empty, part_weights).total]
    return min([0.0, *known])


def weighted(result, part_weights):
    """A reward with the total sum(weight * part). A Failure, or without weights, stays as it is.

    Raises ValueError for a part that the task does not give.
    """
    if not part_weights or isinstance(result, Failure):
        return result
    unknown = part_weights.keys() - result.parts.keys()
    if unknown:
        raise ValueError(
            f"reward_weights names {', '.join(sorted(unknown))}: "
            f"the parts of this task's reward are {', '.join(result.parts) or 'none'}"
        )
    total = sum(weight * float(result.parts[part]) for part, weight in part_weights.items())
    return Reward(total, result.parts)


# ---- Rollouts as tables (P, G) -------------------------------------------------------------------
# The number of samples is given, because a rank may have no problem and still needs (0, G).


def reward_table(rollouts, samples):
    """Total rewards, float64."""
    values = [[reward.total for reward in rollout.rewards] for rollout in rollouts]
    return torch.tensor(values, dtype=torch.float64).reshape(-1, samples)


def length_table(rollouts, samples):
    """Sampled tokens of each completion, the stop token included, int64."""
    values = [[len(completion.ids) for completion in rollout.completions] for rollout in rollouts]
    return torch.tensor(values, dtype=torch.long).reshape(-1, samples)


def finished_table(rollouts, samples):
    """Which completions were not cut off, bool."""
    values = [[completion.finished for completion in rollout.completions] for rollout in rollouts]
    return torch.tensor(values, dtype=torch.bool).reshape(-1, samples)


# ---- dynamic sampling (DAPO) ---------------------------------------------------------------------


def replace_dead(rollouts, times, more, total):
    """Groups whose rewards are all equal teach nothing: they give their place to other problems.

    It is done up to `times` times. more(count): this rank's Rollouts of the next `count` problems
    of all ranks; total(number): its sum over ranks. Returns (rollouts to learn from, replaced).
    """
    replaced = []
    for _ in range(times):
        alive = [rollout for rollout in rollouts if not is_dead(rollout)]
        dead = [rollout for rollout in rollouts if is_dead(rollout)]
        missing = int(total(len(dead)))
        if missing == 0:
            break
        rollouts = alive + more(missing)
        replaced += dead
    return rollouts, replaced


def is_dead(rollout):
    """Whether no sample of the group is better than another."""
    return len({reward.total for reward in rollout.rewards}) == 1


# ---- multiple choice -----------------------------------------------------------------------------


def label_logprobs(engine, tokenizer, problems, progress=None):
    """Multiple-choice problems -> of each the log-probs of its labels as an answer's first token.

    The labels are the problem's meta["labels"].
    """
    token_of = {}
    for problem in problems:
        for label in problem.meta["labels"]:
            token_of[label] = tokenizer.encode(label)
    long = [label for label, ids in token_of.items() if len(ids) != 1]
    if long:
        raise ValueError(
            f"the labels {', '.join(long)} are more than one token each in this vocabulary: "
            "their likelihoods cannot be compared as one token's"
        )
    candidates = [[token_of[label][0] for label in p.meta["labels"]] for p in problems]
    prompts = [tokenizer.render_prompt(problem.prompt) for problem in problems]
    return engine.next_logprobs(prompts, candidates, progress=progress)
