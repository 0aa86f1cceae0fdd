"""The objective, as pure tensor functions. Formulas, sources and biases: docs/algorithm.md.

The default is REINFORCE with the group's mean as baseline. For prompt q, G completions o_i ~ pi(.|q), rewards r_i:

    A_i  = r_i - mean(r)                                                      (advantages)
    loss = - 1/N * sum_i sum_t A_i * log pi(o_it | q, o_i<t)                  (reinforce, policy_loss)

N counts the sampled tokens of the whole optimizer step, over all micro-batches and all ranks, so that the gradient
depends neither on the micro-batch size nor on the number of GPUs. The samples come from the very weights that are
updated (on-policy, one update per rollout), so there is no ratio and nothing to clip.

The rest is chosen by name or by a coefficient: PPO's clipped ratio for several updates per rollout (clipped), a KL term
that holds the policy near the weights it started from (kl, kl_to_go). A "token" below is a sampled token; N is their number
in a micro-batch where it is a shape, and the step's denominator in the formulas.
"""
import torch

ESTIMATORS = ("k1-in-reward", "k2", "k3")


def advantages(rewards, kind="mean"):
    """rewards (P, G) -> advantages (P, G), in the rewards' precision.

    mean    r - mean(r): Dr. GRPO (Liu et al. 2025). Its expected gradient is (1 - 1/G) times the true one.
    loo     r_i - mean of the others = G/(G-1) * (r - mean(r)): RLOO (Ahmadian et al. 2024), unbiased.
    zscore  (r - mean) / (std + 1e-4), std with ddof 1: GRPO (Shao et al. 2024); weights a prompt by about
            1 / sqrt(p(1-p)).
    A group whose rewards are all equal gets exactly 0 in each. Raises ValueError for groups of one."""
    P, G = rewards.shape
    if G < 2:
        raise ValueError(f"samples_per_prompt is {G}: an advantage needs at least 2 samples to compare")
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
    """(P, G) -> bool (P,): groups whose rewards are all equal, so that no sample is better than another."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


# ---- what a token counts ------------------------------------------------------------------------------------

def token_weights(lengths, kind="token", max_new_tokens=1, counted=None):
    """What each token of a completion counts in the loss, before division by the step's denominator.

    lengths, sampled tokens of each completion, of any shape -> weights of that shape, float64. The denominator is the sum over the whole step of
    lengths for 'token' (DAPO), and the number of rows for the other two:
    token     1         every token counts alike
    sequence  1 / L_i   every completion counts alike (GRPO); favours short right answers
    constant  1 / L_max every token counts alike, the step's length does not (Dr. GRPO)
    counted (bool, same shape): completions that are not have weight 0 and no part in the denominator (DAPO's overlong mask)."""
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
    """This rank's part of the step's denominator, to be summed over ranks before the first backward."""
    lengths = lengths if counted is None else lengths[counted]
    return int(lengths.sum()) if kind == "token" else lengths.numel()


# ---- what a token contributes -------------------------------------------------------------------------------

def reinforce(logprobs, advantages):
    """A * log pi of each token, (N,): its gradient is the policy gradient (Williams 1992) where the samples come from pi."""
    return advantages * logprobs


def clipped(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2):
    """PPO's surrogate of each token (Schulman et al. 2017, eq. 7), (N,), with the ratio rho = pi / pi_old to the policy that
    sampled: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). DAPO's clip-higher is (0.2, 0.28). At pi = pi_old
    nothing is clipped and its gradient is reinforce's."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl(logprobs, reference, estimator="k3", old_logprobs=None):
    """A KL penalty of each token against the reference policy, (N,), to be subtracted with kl_coef; d = log pi - log pi_ref.

    k2  d^2 / 2            its gradient d * grad log pi is that of KL(pi || ref), prefixes held fixed
    k3  exp(-d) - 1 + d    (Schulman 2020; GRPO's) never negative; its gradient is that of KL(ref || pi), prefixes held fixed
    With old_logprobs, of the policy that sampled, each token counts pi / pi_old, through which no gradient flows."""
    d = logprobs - reference
    if estimator == "k2":
        k = d * d / 2
    elif estimator == "k3":
        k = torch.expm1(-d) + d
    else:
        raise ValueError(f"kl_estimator is {estimator!r}: it must be one of {', '.join(ESTIMATORS)}")
    return k if old_logprobs is None else (logprobs - old_logprobs).detach().exp() * k


def kl_to_go(logprobs, reference, counts):
    """k1 in the reward: what a token's advantage is lowered by, times kl_coef: the sum of d = log pi - log pi_ref over itself and
    all later tokens of its completion, (N,), with log pi of the policy that sampled. Its gradient is that of the whole sequence's
    KL(pi || ref), exactly, in expectation. counts: how many of the N tokens each completion has."""
    d = (logprobs - reference).double()
    up_to = d.cumsum(0)  # (N,), over completions too: only differences within one are used
    return up_to[counts.cumsum(0) - 1].repeat_interleave(counts, output_size=len(d)) - up_to + d


def policy_loss(objective, weights, denominator):
    """- sum of weight * objective / denominator over this micro-batch's tokens, all (N,). `denominator` is the whole
    step's: micro-batches and ranks are summed, never averaged."""
    return -(weights * objective).sum() / max(float(denominator), 1.0)


# ---- what is logged of the tokens ---------------------------------------------------------------------------

TOKEN_SUMS = ("tokens", "entropy", "gap", "gap_kl", "kl", "ratio_off", "ratio_off_square", "clip_low", "clip_high")


def token_sums(logprobs, old_logprobs, entropy, advantages, reference, clip_low, clip_high):
    """Sums over a micro-batch's tokens, all (N,), in fp64, and the largest gap: old_logprobs are the sampler's; reference None: no KL."""
    logprobs = logprobs.detach().double()
    gap = logprobs - old_logprobs
    ratio = gap.exp()
    k = torch.zeros(()) if reference is None else kl(logprobs, reference)
    # Where the clip takes the gradient away: a bad token is already rarer than 1 - clip_low, or a good one more frequent than 1 + clip_high.
    low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    k = k.to(gap)
    values = (gap.new_tensor(len(gap)), entropy.double().sum(), gap.abs().sum(), (gap.expm1() - gap).sum(), k.sum(), gap.expm1().sum(), gap.expm1().square().sum(), low.sum(), high.sum())
    *sums, largest = torch.stack([*(value.double() for value in values), gap.abs().max()]).tolist()  # one look at the device
    return {**dict(zip(TOKEN_SUMS, sums)), "gap_max": largest}


def token_metrics(first, last):
    """token_sums over all micro-batches and ranks, of a step's first update, whose weights are those that sampled, and of its last -> metrics."""
    n = first["tokens"]
    return {"entropy": first["entropy"] / n, "kl": first["kl"] / n, "logp_diff/mean": first["gap"] / n, "logp_diff/max": first["gap_max"],
            "logp_diff/kl": first["gap_kl"] / n, "ratio/mean": 1 + last["ratio_off"] / n, "ratio/std": (last["ratio_off_square"] / n) ** 0.5,
            "clip_ratio/low_mean": last["clip_low"] / n, "clip_ratio/high_mean": last["clip_high"] / n,
            "clip_ratio/region_mean": (last["clip_low"] + last["clip_high"]) / n}
