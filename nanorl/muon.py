"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), its products shared over ranks.

torch.optim.Muon is the plain form. For each matrix W of weights, with the gradient g, it does

    m <- 0.95 m + 0.05 g                                        the momentum
    U <- orthogonalized(0.05 g + 0.95 m)                        Nesterov's look ahead
    W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) U

one matrix at a time, and every rank repeats it. This one moves the weights by the same numbers.
Matrices of one shape are orthogonalized together, as a stack; each rank takes its share of the
matrices; one all-gather brings every U to all ranks.

The momentum is whole on every rank, 4 bytes a weight. So a checkpoint is as torch.optim.Muon's, and
it goes on with any number of ranks. Left out: a momentum in shares.
"""

import itertools
import math

import torch
from torch.nn.functional import pad

# Most numbers in a stack. A larger one is no faster, and takes 10 bytes a number while it is
# multiplied.
STACK = 2**25


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with its state and its defaults, in fewer products and shared over ranks.

    ranks: knows rank() and world_size() and can gather_numbers(), as runtime.dist; None: one rank.
    All ranks must have the same weights and gradients.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, ranks=None):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)
        self.ranks = ranks

    @torch.no_grad()
    def step(self):
        """Move the weights that have a gradient. The others keep their momentum too."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update_momenta(params, group["momentum"])
                self._move(params, group)

    def _update_momenta(self, params, momentum):
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, [p.grad for p in params], 1 - momentum)

    def _move(self, params, group):
        """Orthogonalize this rank's share, get what the others have, move all weights by it."""
        rank, world_size = 0, 1
        if self.ranks:
            rank, world_size = self.ranks.rank(), self.ranks.world_size()
        shares = shares_of(params, world_size)
        results = [self._orthogonalize_share(shares[rank], group)]
        if world_size > 1:
            # Shares are of unequal lengths, and what is gathered must be of one length.
            longest = max(sum(p.numel() for p in share) for share in shares)
            padded = pad(results[0], (0, longest - len(results[0])))
            results = self.ranks.gather_numbers(padded)  # of each rank (longest,)

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for share, numbers in zip(shares, results):
            move_share(share, numbers, group["lr"])

    def _orthogonalize_share(self, share, group):
        """-> one flat tensor: the result of each matrix, as `wide` has it, in the share's order."""
        # bf16, as torch.optim.Muon. Weights are in fp64 where exactness is tested.
        precise = group["params"][0].dtype == torch.float64
        dtype = torch.float64 if precise else torch.bfloat16
        results = [torch.empty(0, dtype=dtype, device=group["params"][0].device)]
        for params in stacks_of(share):
            stack = self._look_ahead(params, group["momentum"]).to(dtype)  # (matrices, m, n)
            rule = group["ns_coefficients"], group["ns_steps"], group["eps"]
            results.append(orthogonalized(stack, *rule).flatten())
        return torch.cat(results)

    def _look_ahead(self, params, momentum):
        """What is orthogonalized of matrices of one shape, as a stack."""
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        ahead = torch._foreach_lerp(grads, momenta, momentum)
        return torch.stack([wide(matrix) for matrix in ahead])


def orthogonalized(stack, coefficients, steps, eps):
    """A stack, (matrices, m, n) with m <= n -> the same matrices with singular values near 1.

    Newton and Schulz: each step turns every singular value x into a x + b x^3 + c x^5.
    """
    a, b, c = coefficients
    # No singular value is over 1: their squares add up to the square of the norm.
    norms = stack.norm(dim=(1, 2), keepdim=True)
    X = stack / norms.clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.mT  # (matrices, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        X = torch.baddbmm(X, polynomial, X, beta=a)  # a X + polynomial X
    return X


def wide(matrix):
    """The matrix, or its transpose, with no more rows than columns: products of m x m are least."""
    rows, columns = matrix.shape
    return matrix.mT if rows > columns else matrix


def work_of(p):
    """FLOPs of a step of Newton and Schulz: two products of m x m x n, and one of m x m x m."""
    m, n = wide(p).shape
    return 4 * m * m * n + 2 * m * m * m


def shares_of(params, ranks):
    """The matrices that each rank takes, about equal in FLOPs -> a list of matrices for each rank.

    The most expensive goes first, each to the rank with the least so far. In a share, matrices of
    one shape follow each other.
    """
    shares = [[] for _ in range(ranks)]
    work = [0] * ranks
    for p in sorted(params, key=work_of, reverse=True):
        rank = work.index(min(work))
        shares[rank].append(p)
        work[rank] += work_of(p)
    return [sorted(share, key=shape_of) for share in shares]


def shape_of(p):
    return tuple(wide(p).shape)


def stacks_of(share):
    """A share's matrices in lists of one shape, of at most STACK numbers, or of one matrix."""
    for (m, n), group in itertools.groupby(share, shape_of):
        same = list(group)
        most = max(1, STACK // (m * n))
        for start in range(0, len(same), most):
            yield same[start : start + most]


def move_share(share, numbers, lr):
    """Move a share's weights by its results, one flat tensor that may be longer."""
    start = 0
    for p in share:
        rows, columns = p.shape
        result = numbers[start : start + p.numel()].view(wide(p).shape)
        if rows > columns:
            result = result.mT
        p.add_(result, alpha=-lr * math.sqrt(max(1, rows / columns)))
        start += p.numel()
