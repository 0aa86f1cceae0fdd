"""The gradient's noise: how much of a step's gradient is signal.

The unit of sampling is a whole prompt group: its samples are tied by their common baseline. With
g_p the gradient of problem p's group, a step's gradient is the mean of P of them, and for problems
drawn independently

    g = E g_p        Sigma = Cov g_p        E |mean of P|^2 = |g|^2 + tr Sigma / P

    noise scale      tr Sigma / |g|^2        in problems: a step of so many is half noise
    noise to signal  tr Sigma / (P |g|^2)    of a step of P problems

all before clipping. Numerator and denominator are estimated without bias, each is averaged over
whatever there is to average over, and only then they are divided. (The mean of ratios is biased,
and a ratio of two noisy numbers has no mean at all where the second may be near 0.)

Two groups are drawn of each problem, g_p1 and g_p2, independent given the problem. That gives the
parts of Sigma: between problems (the gradient given the problem differs) and within a problem (its
G samples are few):

    E g_p1 . g_p2 = E |E[g_p | p]|^2        within  = E |g_p1 - g_p2|^2 / 2
                                            between = E g_p1 . g_p2 - |g|^2

A step divides by its tokens N, a random number. Here N is P times the mean number of tokens of a
group, over all that were drawn. What this leaves out is of the order |g|^2 / P.

Only sums over blocks of problems are kept, and the inner products of these.
"""

from dataclasses import dataclass

import torch

from nanorl import grpo, rollout
from nanorl.batch import pack
from nanorl.dynamics import vectors
from nanorl.dynamics.measured import gradient

DEVICE_TOKENS = 16384  # tokens of one forward, where the run's constant is found when it starts

# ---- gradients of groups -------------------------------------------------------------------------


def step_batches(measured, rollouts, settings):
    """Rollouts -> the step's batch.Batches and its N, as train_rl.py has them."""
    G = settings["samples_per_prompt"]
    advantages = grpo.advantages(rollout.reward_table(rollouts, G), settings["advantage"])  # (P, G)
    lengths = rollout.length_table(rollouts, G)  # (P, G)
    counted = None
    if settings["overlong"] == "mask":
        counted = rollout.finished_table(rollouts, G)
    loss_norm = settings["loss_norm"]
    weights = grpo.token_weights(lengths, loss_norm, settings["max_new_tokens"], counted)  # (P, G)
    N = max(1, grpo.denominator(lengths, loss_norm, counted))
    device = measured.model.cos.device
    tokens = settings["device_tokens"] or DEVICE_TOKENS
    return pack(rollouts, advantages, weights, tokens, device), N


def gain_gradient(measured, rollouts, settings):
    """The gradient of sum weight * A * l_k over the groups' tokens -> a vector, and their N.

    The loss's gradient is - vector / N. settings: advantage, loss_norm, samples_per_prompt,
    max_new_tokens, overlong, device_tokens.
    """
    batches, N = step_batches(measured, rollouts, settings)
    found = vectors.zeros(measured.theta)
    for batch in batches:

        def gain(theta, batch=batch):
            logprobs = measured.learner_logprobs(theta, batch)  # (S,)
            return (batch.token_weights * batch.advantages * logprobs).sum()

        found = vectors.plus(found, gradient(gain, measured.theta)[1])
    return found, N


# ---- sums over blocks ----------------------------------------------------------------------------


@dataclass
class Blocks:
    """What is kept of the gradients of m blocks of problems, two groups a problem.

    gram: (2, m, 2, m) inner products of sums of g_p over a block: [i, a, j, b] is of the first
        (i = 0) or second groups of block a with those of block b.
    squares: (m,) sum over the block of |g_p1|^2 + |g_p2|^2.
    products: (m,) sum over the block of g_p1 . g_p2.
    counts: (m,) problems.
    """

    gram: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor
    counts: torch.Tensor

    def only(self, which):
        """The blocks `which`, indices."""
        gram = self.gram[:, which][..., which]
        return Blocks(gram, self.squares[which], self.products[which], self.counts[which])

    def without(self, block):
        rest = [i for i in range(len(self.counts)) if i != block]
        return self.only(torch.tensor(rest))


def blocks_of(pairs, size):
    """(g_p1, g_p2) of each problem, flat tensors (n,), as an iterable -> Blocks of `size` problems.

    Problems beyond the last whole block are left out.
    """
    sums, squares, products = [], [], []
    for number, (one, two) in enumerate(pairs):
        if number % size == 0:
            sums.append([torch.zeros_like(one), torch.zeros_like(two)])
            squares.append(0.0)
            products.append(0.0)
        sums[-1][0] += one
        sums[-1][1] += two
        squares[-1] += float(one @ one + two @ two)
        products[-1] += float(one @ two)
    m = (number + 1) // size
    firsts = [first for first, _ in sums[:m]]
    seconds = [second for _, second in sums[:m]]
    rows = torch.stack(firsts + seconds)  # (2 m, n)
    return Blocks(
        gram=(rows @ rows.T).double().view(2, m, 2, m),
        squares=torch.tensor(squares[:m], dtype=torch.float64),
        products=torch.tensor(products[:m], dtype=torch.float64),
        counts=torch.full((m,), size, dtype=torch.float64),
    )


# ---- the estimators ------------------------------------------------------------------------------


@dataclass
class Noise:
    """Unbiased estimates from some problems; those of their quotient are ratios of these."""

    signal: float  # |g|^2
    within: float  # the part of tr Sigma that more samples a problem would lower
    between: float  # the part that only more problems lower

    @property
    def trace(self):
        """tr Sigma."""
        return self.within + self.between

    @property
    def scale(self):
        """tr Sigma / |g|^2, in problems."""
        return self.trace / self.signal


def noise(blocks):
    """Blocks -> Noise.

    |g|^2 is the mean of g_p . g_q over pairs of different problems, each with both of its groups:

        (|sum_p h_p|^2 - sum_p |h_p|^2) / (4 P (P - 1))        h_p = g_p1 + g_p2
    """
    P = float(blocks.counts.sum())
    squares, products = float(blocks.squares.sum()), float(blocks.products.sum())
    own = squares + 2 * products  # sum |h_p|^2
    signal = (float(blocks.gram.sum()) - own) / (4 * P * (P - 1))
    within = (squares - 2 * products) / (2 * P)
    between = products / P - signal
    return Noise(signal, within, between)


def jackknife(blocks, quantity):
    """A quantity of Noise, and its standard error: each block left out once.

    quantity: a function of Noise, such as Noise.scale's.

    error^2 = (m - 1) / m * sum over blocks of (value without it - mean of those)^2 (Tukey 1958).
    """
    m = len(blocks.counts)
    values = [quantity(noise(blocks.without(block))) for block in range(m)]
    mean = sum(values) / m
    spread = sum((value - mean) ** 2 for value in values)
    return quantity(noise(blocks)), ((m - 1) / m * spread) ** 0.5


def observed_variance(blocks, together):
    """What the gradient of a batch of `together` blocks varies by, seen and not computed -> float.

    Of the J disjoint batches that the blocks give, sum |mean_b - their mean|^2 / (J - 1), averaged
    over first and second groups. By the law of independent problems it is tr Sigma / (problems of
    a batch). Raises ValueError where there are not two batches.
    """
    J = len(blocks.counts) // together
    if J < 2:
        raise ValueError(f"{len(blocks.counts)} blocks make no two batches of {together}")
    problems = float(blocks.counts[:together].sum())
    found = 0.0
    for half in range(2):
        gram = blocks.gram[half, :, half][: J * together, : J * together]
        # (J, J) inner products of the batches' mean gradients.
        means = gram.view(J, together, J, together).sum((1, 3)) / problems**2
        found += float(means.trace() - means.sum() / J) / (J - 1) / 2
    return found


# ---- a window of steps ---------------------------------------------------------------------------


def from_two_sizes(small_square, large_square, small, large):
    """|gradient|^2 of a batch of `small` problems and of `large` -> unbiased (tr Sigma, |g|^2).

    The smaller may be a part of the larger. From E |mean of P|^2 = |g|^2 + tr Sigma / P at both
    sizes (McCandlish et al. 2018, appendix A.1). One step's pair is very noisy: `windowed` averages
    many.
    """
    trace = (small_square - large_square) / (1 / small - 1 / large)
    signal = (large * large_square - small * small_square) / (large - small)
    return trace, signal


def windowed(numerators, denominators):
    """One entry a step -> sum of numerators / sum of denominators, its jackknife's standard error.

    Over a window of steps the weights move. g is then another at each step, and what comes out is
    mean tr Sigma over mean |g|^2 and not that of a mean gradient.
    """
    m = len(numerators)
    top, bottom = sum(numerators), sum(denominators)
    without = [(top - a) / (bottom - b) for a, b in zip(numerators, denominators)]
    mean = sum(without) / m
    spread = sum((value - mean) ** 2 for value in without)
    return top / bottom, ((m - 1) / m * spread) ** 0.5


def more_samples(found):
    """What is left of tr Sigma / P with twice the samples of a problem, as a share, of a Noise.

    The within part falls as 1 / G, up to terms in 1 / G^2 that the common baseline makes. Twice the
    problems leave 0.5 in every case, and cost as many completions.
    """
    return (found.between + found.within / 2) / found.trace
