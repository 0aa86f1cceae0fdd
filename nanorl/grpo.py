"""The objective, as pure tensor functions. Formulas, sources and biases: docs/algorithm.md.

The default is REINFORCE with the group's mean as baseline. For prompt q, G completions
o_i ~ pi(.|q), rewards r_i:

    A_i  = r_i - mean(r)                                             (advantages)
    loss = - 1/N * sum_i sum_t A_i * log pi(o_it | q, o_i<t)         (reinforce, policy_loss)

N counts the sampled tokens of the whole optimizer step, over all micro-batches and all ranks, so
that the gradient depends neither on the micro-batch size nor on the number of GPUs. The samples
come from the very weights that are updated (on-policy, one update per rollout), so there is no
ratio and nothing to clip.

The rest is chosen by name or by a coefficient: PPO's clipped ratio for several updates per rollout
(clipped), a KL term that holds the policy near the weights it started from (kl, kl_to_go). A
"token" below is a sampled token; S is their number in a micro-batch.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Objective:
    """Which objective: the script's constants of these names."""

    updates_per_rollout: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"

    @property
    def is_default(self):
        """Whether A * log pi is all there is: one update, and no KL term in the loss."""
        return self.updates_per_rollout == 1 and not self.kl_coef


ESTIMATORS = ("k1-in-reward", "k2", "k3")


def advantages(rewards, kind="mean"):
    """rewards (P, G) -> advantages (P, G), in the rewards' precision.

    mean    r - mean(r): Dr. GRPO (Liu et al. 2025). Its expected gradient is (1 - 1/G) times the
            true one.
    loo     r_i - mean of the others = G/(G-1) * (r - mean(r)): RLOO (Ahmadian et al. 2024),
            unbiased.
    zscore  (r - mean) / (std + 1e-4), std with ddof 1: GRPO (Shao et al. 2024); weights a prompt
            by about 1 / sqrt(p(1-p)).
    A group whose rewards are all equal gets exactly 0 in each. Raises ValueError for groups of one.
    """
    P, G = rewards.shape
    if G < 2:
        raise ValueError(
            f"samples_per_prompt is {G}: an advantage needs at least 2 samples to compare"
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "mean":
        a = centred
    elif kind == "loo":
        a = centred * (G / (G - 1))
    elif kind == "zscore":
        a = centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    else:
        raise ValueError(f"advantage is {kind!r}: it must be mean, loo or zscore")
    return a.masked_fill(no_signal(rewards)[:, None], 0.0)


def no_signal(rewards):
    """(P, G) -> bool (P,): groups whose rewards are all equal: no sample is better than another."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


# ---- what a token counts -------------------------------------------------------------------------


def token_weights(lengths, kind="token", max_new_tokens=1, counted=None):
    """What each token of a completion counts in the loss, before division by N.

    lengths, sampled tokens of each completion, of any shape -> weights of that shape, float64.
    The denominator N is the sum over the whole step of the lengths for 'token' (DAPO), and the
    number of completions for the other two:
    token     1         every token counts alike
    sequence  1 / L_i   every completion counts alike (GRPO); favours short right answers
    constant  1 / L_max every token counts alike, the step's length does not (Dr. GRPO)
    counted (bool, same shape): a completion that is not counted has weight 0, and N leaves it out
    (DAPO's overlong mask).
    """
    if kind == "token":
        weights = torch.ones_like(lengths, dtype=torch.float64)
    elif kind == "sequence":
        weights = 1.0 / lengths.double()
    elif kind == "constant":
        weights = torch.full_like(lengths, 1.0 / max_new_tokens, dtype=torch.float64)
    else:
        raise ValueError(f"loss_norm is {kind!r}: it must be token, sequence or constant")
    return weights if counted is None else weights * counted


def denominator(lengths, kind="token", counted=None):
    """This rank's part of N, to be summed over ranks before the first backward."""
    lengths = lengths if counted is None else lengths[counted]
    return int(lengths.sum()) if kind == "token" else lengths.numel()


# ---- what a token contributes --------------------------------------------------------------------


def reinforce(logprobs, advantages):
    """A * log pi of each token, (S,).

    Its gradient is the policy gradient (Williams 1992) where the samples come from pi.
    """
    return advantages * logprobs


def clipped(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2):
    """PPO's surrogate of each token (Schulman et al. 2017, eq. 7), (S,).

    With the ratio rho = pi / pi_old to the policy that sampled:
    min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). DAPO's clip-higher is (0.2, 0.28). At
    pi = pi_old nothing is clipped and its gradient is reinforce's.
    """
    ratio = (logprobs - old_logprobs).exp()
    held = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, held * advantages)


def kl(logprobs, reference, estimator="k3", old_logprobs=None):
    """A KL penalty of each token against the reference policy, (S,), to be subtracted times
    kl_coef. With d = log pi - log pi_ref:

    k2  d^2 / 2            its gradient d * grad log pi is that of KL(pi || ref), prefixes held
                           fixed
    k3  exp(-d) - 1 + d    (Schulman 2020; GRPO's) never negative; its gradient is that of
                           KL(ref || pi), prefixes held fixed
    With old_logprobs, of the policy that sampled, each token counts pi / pi_old, through which no
    gradient flows.
    """
    d = logprobs - reference
    if estimator == "k2":
        k = d * d / 2
    elif estimator == "k3":
        k = torch.expm1(-d) + d
    else:
        raise ValueError(
            f"kl_estimator is {estimator!r}: it must be one of {', '.join(ESTIMATORS)}"
        )
    if old_logprobs is None:
        return k
    return (logprobs - old_logprobs).detach().exp() * k


def kl_to_go(logprobs, reference, lengths):
    """k1 in the reward: what a token's advantage is lowered by, times kl_coef, (S,).

    logprobs: of the policy that sampled. lengths: tokens of each completion.

    It is the sum of d = log pi - log pi_ref over the token itself and all later ones of its
    completion. It has no gradient of its own. As a part of the advantage it gives the loss the
    gradient of the whole sequence's KL(pi || ref), exactly, in expectation.
    """
    d = (logprobs - reference).double()
    # Running sums over all completions: only differences within one are used.
    up_to = d.cumsum(0)
    last = lengths.cumsum(0) - 1  # (completions,)
    at_end = up_to[last].repeat_interleave(lengths, output_size=len(d))
    return at_end - up_to + d


def surrogate(logprobs, batch, objective):
    """What is maximised of each token, (S,).

    On-policy it is A * log pi; with several updates per rollout PPO's clipped ratio; less the KL
    penalty where the batch has a reference.
    """
    if objective.updates_per_rollout == 1:
        old = None  # the samples are the policy's own: the ratio is 1
        gain = reinforce(logprobs, batch.advantages)
    else:
        old = batch.sampler_logprobs
        limits = objective.clip_low, objective.clip_high
        gain = clipped(logprobs, old, batch.advantages, *limits)

    if batch.reference_logprobs is None or objective.kl_estimator == "k1-in-reward":
        return gain
    penalty = kl(logprobs, batch.reference_logprobs, objective.kl_estimator, old)
    return gain - objective.kl_coef * penalty


def lowered(batch, objective):
    """The batch with its advantages lowered by the KL to go: k1 in the reward. Else as it is."""
    if objective.kl_estimator != "k1-in-reward":
        return batch
    to_go = kl_to_go(batch.sampler_logprobs, batch.reference_logprobs, batch.lengths)
    return replace(batch, advantages=batch.advantages - objective.kl_coef * to_go)


def policy_loss(gain, weights, denominator):
    """- sum of weight * gain / N over this micro-batch's tokens, all (S,).

    N is the whole step's: micro-batches and ranks are summed, never averaged. train_rl.py has this
    line in its loop.
    """
    return -(weights * gain).sum() / max(float(denominator), 1.0)


# ---- what is logged of the tokens ----------------------------------------------------------------


# The sums that token_sums gives, beside the largest gap.
TOKEN_SUMS = (
    "tokens",
    "entropy",
    "gap",
    "gap_kl",
    "kl",
    "ratio_off",
    "ratio_off_square",
    "clip_low",
    "clip_high",
)


def token_sums(logprobs, entropy, batch, objective):
    """Sums over a micro-batch's tokens, in fp64, the largest gap, and each token's entropy.

    logprobs, entropy: (S,) each, of the policy. batch: a batch.Batch of those tokens.
    """
    logprobs = logprobs.detach().double()
    gap = logprobs - batch.sampler_logprobs
    ratio = gap.exp()
    off = gap.expm1()  # ratio - 1
    k = gap.new_zeros(())
    if batch.reference_logprobs is not None:
        k = kl(logprobs, batch.reference_logprobs)

    # Where the clip takes the gradient away: a bad token is already rarer than 1 - clip_low, or a
    # good one more frequent than 1 + clip_high.
    low = (ratio < 1 - objective.clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + objective.clip_high) & (batch.advantages > 0)

    found = {"tokens": gap.new_full((), len(gap)), "entropy": entropy.double().sum()}
    found["gap"] = gap.abs().sum()
    found["gap_kl"] = (off - gap).sum()
    found["kl"] = k.to(gap).sum()
    found["ratio_off"] = off.sum()
    found["ratio_off_square"] = off.square().sum()
    found["clip_low"] = low.sum().double()
    found["clip_high"] = high.sum().double()
    found["gap_max"] = gap.abs().max()
    # One look at the device for all.
    values = torch.cat([torch.stack(list(found.values())), entropy.double()]).tolist()
    sums = dict(zip(found, values))
    sums["entropies"] = values[len(found) :]  # (S,)
    return sums


def token_metrics(first, last):
    """token_sums over all micro-batches and ranks -> metrics.

    first: of a step's first update, whose weights are those that sampled; last: of its last.
    """
    n = first["tokens"]
    row = {"entropy": first["entropy"] / n, "kl": first["kl"] / n}
    row["logp_diff/mean"] = first["gap"] / n
    row["logp_diff/max"] = first["gap_max"]
    row["logp_diff/kl"] = first["gap_kl"] / n
    row["ratio/mean"] = 1 + last["ratio_off"] / n
    row["ratio/std"] = (last["ratio_off_square"] / n) ** 0.5
    row["clip_ratio/low_mean"] = last["clip_low"] / n
    row["clip_ratio/high_mean"] = last["clip_high"] / n
    row["clip_ratio/region_mean"] = (last["clip_low"] + last["clip_high"]) / n
    return row
