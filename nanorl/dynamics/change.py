"""What moving along the update does to the entropy: foreseen from the derivatives, and truly.

With u = v / lr, so that eta = lr is the step itself, and S of entropy.py,

    delta H1(eta) = eta grad H . u                  first order
    delta H2(eta) = eta^2 / 2 u . (Hessian of H) u  what the second order adds
    the change    = H(theta + eta u) - H(theta)

All three come from the same completions: the derivatives are S's along u, and the true change is
S(theta + eta u) - S(theta). Their sampling noise is then the same one, and what is between them is
curvature, or rounding, and not chance. The importance weights have no bias at any eta, but the
larger it is the fewer completions count: the effective sample size says how many. Completions
sampled afresh at theta + eta u are the check.
"""

from dataclasses import dataclass

import torch

from nanorl.dynamics import vectors
from nanorl.dynamics.entropy import (
    ROWS,
    Estimate,
    baseline,
    effective_size,
    estimate,
    surrogate,
    surrogate_at,
    tokens_at,
)
from nanorl.dynamics.measured import derivative, derivatives

ETAS = tuple(10.0**exponent for exponent in range(-10, -2))  # 1e-10 .. 1e-3


def expansion(measured, sequences, u, rows=ROWS):
    """-> Estimates of grad H . u and of u . (Hessian of H) u."""
    start, entropies = tokens_at(measured, measured.theta, sequences, rows)
    b = baseline(entropies)
    first, second = [], []
    for which in torch.arange(len(sequences)).split(rows):
        function = surrogate_at(measured, sequences.rows(which), start[which], b[which])
        slopes, curvatures = derivatives(function, measured.theta, u)  # (rows,) each
        first.append(slopes)
        second.append(curvatures)
    return estimate(torch.cat(first)), estimate(torch.cat(second))


def slope(measured, sequences, v, rows=ROWS):
    """-> Estimate of grad H . v."""
    start, entropies = tokens_at(measured, measured.theta, sequences, rows)
    b = baseline(entropies)
    found = []
    for which in torch.arange(len(sequences)).split(rows):
        function = surrogate_at(measured, sequences.rows(which), start[which], b[which])
        found.append(derivative(function, measured.theta, v))  # (rows,)
    return estimate(torch.cat(found))


@dataclass
class Point:
    """The change at one eta."""

    eta: float
    change: Estimate
    effective: float  # completions that count, of those that there are


@torch.no_grad()
def curve(measured, sequences, u, etas=ETAS, rows=ROWS):
    """-> a Point for each eta, by importance sampling from one batch."""
    start, entropies = tokens_at(measured, measured.theta, sequences, rows)
    b = baseline(entropies)
    points = []
    for eta in etas:
        theta = vectors.plus(measured.theta, u, eta)
        logprobs, moved = tokens_at(measured, theta, sequences, rows)
        changes = surrogate(logprobs, moved, start, b) - entropies.sum(1)  # (B,)
        log_weights = (logprobs - start).sum(1)
        points.append(Point(eta, estimate(changes), effective_size(log_weights)))
    return points


def linear_range(points, slope, tolerance=0.1):
    """Where change / eta is the slope up to `tolerance` -> (lowest, highest eta), or None.

    Below the lowest the difference of two entropies is rounding: the precision floor. Above the
    highest the curvature shows: the end of the linear regime. slope: grad H . u.
    """
    holds = []
    for point in points:
        off = abs(point.change.mean / point.eta - slope)
        if off <= tolerance * abs(slope):
            holds.append(point.eta)
    return (min(holds), max(holds)) if holds else None
