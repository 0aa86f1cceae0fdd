"""Vectors over the trained parameters: dicts {name: tensor}, with named_parameters()'s names."""

import torch


def plus(theta, v, factor=1.0):
    """theta + factor * v."""
    return {name: p + factor * v[name] for name, p in theta.items()}


def like(v, theta):
    """v in the precision of theta."""
    return {name: x.to(theta[name].dtype) for name, x in v.items()}


def times(v, w):
    """The product of two vectors, number by number."""
    return {name: x * w[name] for name, x in v.items()}


def scaled(v, factor):
    return {name: factor * x for name, x in v.items()}


def zeros(theta):
    return {name: torch.zeros_like(p) for name, p in theta.items()}


def dot(v, w):
    """The inner product, a float, summed in fp64."""
    return sum(float((x.double() * w[name].double()).sum()) for name, x in v.items())


def norm(v):
    return dot(v, v) ** 0.5


def cosine(v, w):
    """Of the angle between two vectors; NaN where one of them is 0."""
    norms = norm(v) * norm(w)
    return dot(v, w) / norms if norms else float("nan")


def flat(v):
    """-> one tensor (n,), in the order of the names."""
    return torch.cat([x.flatten() for x in v.values()])
