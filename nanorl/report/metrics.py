"""A step's numbers and its rollouts' records, over all ranks (docs/metrics.md)."""

import math
import time

import torch

from nanorl import grpo
from nanorl.rollout import length_table, reward_table
from nanorl.runtime import dist
from nanorl.tasks import is_correct
from nanorl.tasks.pool import RAISED, TIMEOUT

# ---- of the rollouts -----------------------------------------------------------------------------


def add_entropies(rollouts, batches, sums):
    """Give this rank's Rollouts the entropies of their tokens, from the learner's own forward.

    batches: what the Rollouts were packed into. sums: the learner.token_sums of each.
    """
    for rollout in rollouts:
        rollout.entropies = [None] * len(rollout.completions)
    for batch, found in zip(batches, sums):
        start = 0
        for p, g in batch.numbers:
            end = start + len(rollouts[p].completions[g].ids)
            rollouts[p].entropies[g] = found["entropies"][start:end]
            start = end


def of_rollouts(rollouts, replaced, advantages, run, step, decode):
    """Write all that the step sampled to disk -> its metrics, on every rank.

    replaced: Rollouts whose place others took, which nothing was learnt from; advantages (P, G).
    """
    rollouts = dist.gather(rollouts)
    replaced = dist.gather(replaced)
    advantages = dist.gather(advantages.tolist())
    row = None
    if dist.is_main():
        samples = len(rollouts[0].rewards)
        sampled = rollouts + replaced
        no_advantages = [[0.0] * samples for _ in replaced]
        left_out = write_rollouts(sampled, advantages + no_advantages, run, step, decode)
        row = rollout_metrics(sampled)
        if left_out:
            row["rollouts/left_out"] = left_out
        row["resampled"] = len(replaced)
        row.update(learnt_metrics(rollouts, torch.tensor(advantages)))
    return dist.broadcast(row)


def rollout_metrics(rollouts):
    """Rollouts of all ranks -> what can be said of them alone."""
    rewards = reward_table(rollouts, len(rollouts[0].rewards))  # (P, G)
    lengths = length_table(rollouts, rewards.size(1)).double()  # (P, G)
    dead = grpo.no_signal(rewards)  # (P)
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    cut_off = sum(not completion.finished for completion in completions)
    different = sum(len(set(rollout.texts)) for rollout in rollouts)

    solved = [is_correct(reward) for rollout in rollouts for reward in rollout.rewards]

    row = {"reward": float(rewards.mean())}
    row["solved"] = sum(solved) / len(solved)
    row["reward_std"] = float(rewards.std(dim=1).mean())  # within groups
    row["frac_reward_zero_std"] = float(dead.double().mean())
    row.update(part_metrics(rollouts))
    row.update(failure_metrics(rollouts))
    row["completions/mean_length"] = float(lengths.mean())
    row["completions/max_length"] = float(lengths.max())
    row["completions/clipped_ratio"] = cut_off / len(completions)
    row["completions/unique"] = different / len(completions)
    row["tokens_with_signal"] = float(lengths[~dead].sum() / lengths.sum())
    row["tokens"] = int(lengths.sum())
    return row


def part_metrics(rollouts):
    """Mean of each part of the reward, mean reward of each task of a mixture, and the share of
    right answers among those of the form that the task asks for."""
    all_parts = [reward.parts for rollout in rollouts for reward in rollout.rewards]
    row = {}
    for name in sorted({name for parts in all_parts for name in parts}):
        row[f"reward/{name}"] = sum(parts.get(name, 0.0) for parts in all_parts) / len(all_parts)

    means = {}  # of a mixture: {task: mean reward of each of its groups}
    for rollout, mean in zip(rollouts, group_means(rollouts)):
        means.setdefault(rollout.problem.task, []).append(mean)
    for task in sorted(means):
        if task:
            row[f"reward_of/{task}"] = sum(means[task]) / len(means[task])

    # It tells learning to solve from learning to comply. A task may have no such parts.
    formed = [parts for parts in all_parts if parts.get("format") and "correct" in parts]
    if formed:
        right = sum(bool(parts["correct"]) for parts in formed)
        row["accuracy_given_format"] = right / len(formed)
    return row


def group_means(rollouts):
    """(P) mean rewards."""
    return reward_table(rollouts, len(rollouts[0].rewards)).mean(dim=1).tolist()


def failure_metrics(rollouts):
    """How often the reward raised, or took too long."""
    failures = [failure for rollout in rollouts for failure in rollout.failures]
    kinds = [failure.kind for failure in failures if failure is not None]
    return {"reward/errors": kinds.count(RAISED), "reward/timeouts": kinds.count(TIMEOUT)}


def learnt_metrics(rollouts, advantages):
    """Of the groups that were learnt from, and their advantages (P, G)."""
    dead = grpo.no_signal(reward_table(rollouts, advantages.size(1)))  # (P)
    return {
        "frac_learned_zero_std": float(dead.double().mean()),
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std()),
        "advantage/max": float(advantages.abs().max()),
    }


# ---- what is on disk of them ---------------------------------------------------------------------


def write_rollouts(rollouts, advantages, run, step, decode):
    """Write a step's records, as much of them as --rollouts_gb has room for -> what is left out.

    advantages: P lists of G. 0: nothing is left out; 1: what is known token by token; 2: all.
    """
    most, now = allowed_bytes(step, run.settings), time.time()
    for left_out in (0, 1):
        by_token = run.settings["rollout_tokens"] and not left_out
        written = records(rollouts, advantages, decode, step, now, by_token)
        if run.log.rollouts(step, written, most):
            return left_out
    return 2


def allowed_bytes(step, settings):
    """What rollouts/ may hold after a step: half of the bound at once, the rest step by step.

    So a run that needs more than the bound leaves something out all along, and not its end.
    """
    return settings["rollouts_gb"] * 1e9 * (1 + step / settings["steps"]) / 2


def records(rollouts, advantages, decode, step, at, by_token):
    """One JSON-ready record a completion (docs/metrics.md).

    advantages: P lists of G; at: the time. by_token: with ids, log-probs and entropies.
    """
    for number, (rollout, group_advantages) in enumerate(zip(rollouts, advantages)):
        prompt = decode(rollout.prompt_ids)
        for sample in range(len(rollout.completions)):
            record = {"step": step, "time": round(at, 3), "group": number, "sample": sample}
            record["prompt"] = prompt
            record["advantage"] = float(group_advantages[sample])
            record.update(record_of(rollout, sample))
            if by_token:
                record.update(by_token_of(rollout, sample))
            yield record


def record_of(rollout, sample):
    """What was asked, what the model wrote, and what it got for that."""
    problem, completion = rollout.problem, rollout.completions[sample]
    reward, failure = rollout.rewards[sample], rollout.failures[sample]
    record = {"index": problem.index}
    if problem.task:
        record["task"] = problem.task
    record["answer"] = problem.answer
    record["completion"] = rollout.texts[sample]
    record["reward"] = reward.total
    record["parts"] = reward.parts
    record["correct"] = is_correct(reward)
    record["tokens"] = len(completion.ids)
    record["finish"] = "stop" if completion.finished else "length"
    if failure:
        record["error"] = failure.text
    return record


def by_token_of(rollout, sample):
    """A completion token by token; with the first of a group the ids of its prompt."""
    completion = rollout.completions[sample]
    found = {}
    if sample == 0:
        found["prompt_ids"] = rollout.prompt_ids
    found["ids"] = completion.ids
    found["logprobs"] = rounded(completion.logprobs, 4)
    if rollout.entropies:
        found["entropies"] = rounded(rollout.entropies[sample], 3)
    return found


def rounded(numbers, decimals):
    return [round(number, decimals) + 0.0 for number in numbers]  # 0.0 in the place of -0.0


# ---- of the updates ------------------------------------------------------------------------------


def of_updates(sums, norms, part_norms):
    """A step's updates -> the learner's metrics, over all ranks.

    sums: of each update the learner.token_sums of its micro-batches; norms: of each update's
    gradient; part_norms: norms of the last gradient by parts of the model.
    """
    totals = [over_ranks(micro_batches) for micro_batches in sums]
    first, last = totals[0], totals[-1]
    row = grpo.token_metrics(first, last)
    row["learnt_tokens"] = first["tokens"]
    row["padding"] = 1 - first["slots"] / first["computed_slots"]
    row["grad_norm"] = norms[-1]
    for part, norm in part_norms.items():
        row[f"grad_norm/{part}"] = norm
    row["updated"] = sum(0 < norm < math.inf for norm in norms) / len(norms)
    return row


def over_ranks(micro_batches):
    """One update's token_sums, one a micro-batch -> their sums over all ranks, the largest gap."""
    # A rank without completions has no micro-batch, and still takes part in the sum.
    sums = {}
    for name in (*grpo.TOKEN_SUMS, "slots", "computed_slots"):
        sums[name] = sum(part[name] for part in micro_batches)
    sums = dist.totals(sums)
    largest = max([part["gap_max"] for part in micro_batches], default=0.0)
    sums["gap_max"] = dist.total(largest, "max")
    return sums
