"""The objective, as pure tensor functions. Formulas, sources and biases: docs/algorithm.md.

The default is REINFORCE with the group's mean as baseline. For prompt q, G completions o_i ~ pi(.|q), rewards r_i:

    A_i  = r_i - mean(r)                                                      (advantages)
    loss = - 1/N * sum_i sum_t A_i * log pi(o_it | q, o_i<t)                  (policy_loss)

N counts the sampled tokens of the whole optimizer step, over all micro-batches and all ranks, so that the gradient
depends neither on the micro-batch size nor on the number of GPUs. The samples come from the very weights that are
updated (on-policy, one update per rollout), so there is no ratio and nothing to clip.
"""
import torch


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


def token_weights(lengths, kind="token", max_new_tokens=1):
    """What each token of a completion counts in the loss, before division by the step's denominator.

    lengths, sampled tokens of each completion, of any shape -> weights of that shape, float64. The denominator is the sum over the whole step of
    lengths for 'token' (DAPO), and the number of rows for the other two:
    token     1         every token counts alike
    sequence  1 / L_i   every completion counts alike (GRPO); favours short right answers
    constant  1 / L_max every token counts alike, the step's length does not (Dr. GRPO)"""
    if kind == "token":
        return torch.ones_like(lengths, dtype=torch.float64)
    if kind == "sequence":
        return 1.0 / lengths.double()
    if kind == "constant":
        return torch.full_like(lengths, 1.0 / max_new_tokens, dtype=torch.float64)
    raise ValueError(f"loss_norm is {kind!r}: it must be token, sequence or constant")


def denominator(lengths, kind="token"):
    """This rank's part of the step's denominator, to be summed over ranks before the first backward."""
    return int(lengths.sum()) if kind == "token" else lengths.numel()


def policy_loss(logprobs, advantages, weights, denominator):
    """- sum of advantage * weight * log-prob / denominator, over this micro-batch's sampled tokens, all (N,).
    `denominator` is the whole step's: micro-batches and ranks are summed, never averaged."""
    return -(advantages * weights * logprobs).sum() / max(float(denominator), 1.0)
