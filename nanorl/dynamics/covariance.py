"""Which tokens make the entropy fall: the covariance criterion, and each token's true share.

For a softmax over the logits of one state, moved by the policy gradient with advantages A whose
mean is 0,

    delta H = - lr Cov_a(log pi(a), pi(a) A(a))        a ~ pi            (Cui et al. 2025)

and by the natural policy gradient, - lr Cov_a(log pi(a), A(a)). From this comes the criterion: over
the tokens of a step, which one has a large

    cov_k = (l_k - mean l) (A_k - mean A)

A network's tokens share their weights, and a step is no natural gradient. What token k of the
step's gradient does to the entropy is, to first order and at this step's M,

    d_k = a_k grad H . M grad l_k        sum_k d_k = grad H . (the gradient's part of v)

which is a derivative of l_k along the one direction M grad H: exact, for all tokens at once. The
criterion is good where tokens of large cov_k have a share of the sum of d_k to match.
"""

from dataclasses import dataclass

import torch

from nanorl.dynamics import vectors
from nanorl.dynamics.entropy import ROWS
from nanorl.dynamics.measured import derivative


def one_state_change(logprobs, advantages, natural=False):
    """delta H / lr of one state, by the formulas above: all actions' log pi(a) and A(a), (V,)."""
    pi = logprobs.exp()
    A = advantages - (pi * advantages).sum()
    x = A if natural else pi * A
    return -float((pi * logprobs * x).sum() - (pi * logprobs).sum() * (pi * x).sum())


def covariances(logprobs, advantages, sampled):
    """cov_k of each token, (B, K), 0 where there is none; their mean is the covariance.

    logprobs: l_k (B, K). advantages: (B,). sampled: (B, K) bool.
    """
    A = advantages[:, None].expand_as(logprobs)
    n = sampled.sum()
    l_mean = (logprobs * sampled).sum() / n
    A_mean = (A * sampled).sum() / n
    return (logprobs - l_mean) * (A - A_mean) * sampled


def entropy_shares(measured, sequences, a, entropy_gradient, M, rows=ROWS):
    """d_k of each token, (B, K). a: (B,) what the completion's tokens count, as kernel.py's."""
    direction = vectors.times(M, entropy_gradient)
    found = []
    for which in torch.arange(len(sequences)).split(rows):
        part = sequences.rows(which)

        def logprobs(theta, part=part):
            return measured.tokens(theta, part)[0]

        slopes = derivative(logprobs, measured.theta, direction)  # (rows, K)
        found.append(slopes * a[which, None])
    return torch.cat(found)


@dataclass
class Top:
    """The tokens with the largest |cov_k|, what they do to the entropy and have in common."""

    tokens: int
    change: float  # the sum of their d_k
    unlikely: float  # share of them whose l_k is below the mean
    wrong: float  # share of them in completions of negative advantage


def top(cov, shares, logprobs, advantages, sampled, part=0.01):
    """The `part` of the tokens with the largest |cov_k| -> Top. All but advantages: (B, K)."""
    count = max(1, int(part * int(sampled.sum())))
    order = cov.abs().masked_fill(~sampled, -1.0).flatten().argsort(descending=True)[:count]
    A = advantages[:, None].expand_as(cov).flatten()[order]
    l_mean = logprobs[sampled].mean()
    return Top(
        tokens=count,
        change=float(shares.flatten()[order].sum()),
        unlikely=float((logprobs.flatten()[order] < l_mean).double().mean()),
        wrong=float((A < 0).double().mean()),
    )


def rank_correlation(x, y):
    """Spearman's, of two (n,)."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])
