"""The entropy of completions: its estimators, its gradient, and its value at weights nearby.

    H(theta) = - E_t log pi(t) = E_t sum_k H_k            t ~ pi_theta, of prompts as they come

The second form is the first with the sum over token k done exactly, given what is before it
(Rao-Blackwell): the mean is the same, the variance smaller. A completion that is cut off counts
with the tokens that it has: the policy is the process that stops there.

All else follows from one function. With start, the l_k at theta, held fixed, and b_k any numbers
that do not depend on t,

    S(theta') = mean over t ~ pi_theta of  sum_k [ w_<k (H_k(theta') - b_k) + b_k ]
    w_<k      = product over j < k of  pi_theta'(token j) / pi_theta(token j)

is an unbiased estimate of H(theta') by importance sampling, since E w_<k = 1. So its derivatives of
each order at theta are unbiased estimates of H's. The first one is the gradient with its score
term,

    grad H = E_t sum_k [ grad H_k + (H_k - b_k) sum_{j<k} grad l_j ]

The score term is what a moved policy changes by coming to other prefixes. Without it the gradient
is that of the mean H_k over prefixes held fixed, which is another function.
"""

from dataclasses import dataclass

import torch

from nanorl.dynamics import vectors
from nanorl.dynamics.measured import gradient

ROWS = 16  # completions of one forward pass


@dataclass
class Estimate:
    """A mean of independent numbers and its standard error."""

    mean: float
    error: float
    variance: float  # of one number


def estimate(values):
    """Independent numbers (B,) -> Estimate."""
    variance = float(values.var())  # ddof 1
    return Estimate(float(values.mean()), (variance / len(values)) ** 0.5, variance)


def estimates(logprobs, entropies):
    """l_k and H_k (B, K) of completions of independent prompts -> two Estimates of H.

    The first is the Rao-Blackwellised sum of H_k, the second - log pi(t).
    """
    return estimate(entropies.sum(1)), estimate(-logprobs.sum(1))


@torch.no_grad()
def tokens_at(measured, theta, sequences, rows=ROWS):
    """-> l_k and H_k at theta, (B, K) each, some rows at a time."""
    found = [measured.tokens(theta, part) for part in sequences.parts(rows)]
    logprobs, entropies = zip(*found)
    return torch.cat(logprobs), torch.cat(entropies)


def baseline(entropies):
    """H_k (B, K) -> b_k for each completion, (B, K): the mean H_k of the others.

    A completion that has ended has H_k = 0. It depends on the other completions alone, so that it
    changes the variance of S's derivatives, and not their mean.
    """
    others = len(entropies) - 1
    if others < 1:
        return torch.zeros_like(entropies)
    return (entropies.sum(0) - entropies) / others


def surrogate(logprobs, entropies, start, b):
    """S of each completion, (B,): see the top. l_k, H_k, the l_k to start from, b_k: (B, K) each.

    After a completion's end l_k and H_k are 0, and w keeps the value that it had there.
    """
    ratio = logprobs - start  # (B, K) log of pi_theta' / pi_theta
    before = ratio.cumsum(1) - ratio  # (B, K) over j < k
    return (before.exp() * (entropies - b) + b).sum(1)


def surrogate_at(measured, sequences, start, b):
    """-> the function theta' -> S of each completion, (B,)."""

    def at(theta):
        logprobs, entropies = measured.tokens(theta, sequences)
        return surrogate(logprobs, entropies, start, b)

    return at


def entropy_gradient(measured, sequences, with_score=True, rows=ROWS):
    """The gradient of H at theta, a vector; without the score term where asked, which is biased."""
    start, entropies = tokens_at(measured, measured.theta, sequences, rows)
    b = baseline(entropies)
    found = vectors.zeros(measured.theta)
    for which in torch.arange(len(sequences)).split(rows):
        part = sequences.rows(which)

        def total(theta, part=part, which=which):
            logprobs, entropies = measured.tokens(theta, part)
            if not with_score:
                logprobs = logprobs.detach()
            return surrogate(logprobs, entropies, start[which], b[which]).sum()

        _, grad = gradient(total, measured.theta)
        found = vectors.plus(found, grad, 1 / len(sequences))
    return found


def effective_size(log_weights):
    """log of the weights pi_theta'(t) / pi_theta(t), (B,) -> (sum w)^2 / sum w^2.

    So many completions of theta' itself would tell as much, where the weights and what is averaged
    are not related.
    """
    w = (log_weights - log_weights.max()).exp()
    return float(w.sum() ** 2 / w.square().sum())
