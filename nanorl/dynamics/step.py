"""The update v = theta after a step - theta before it, by hand, without stepping.

From a gradient g (of the loss, so that v goes against it), the optimizer's state and its settings.
With t the steps done, the new one counted, c = min(1, max_norm / |g|) and g <- c g:

AdamW (Loshchilov and Hutter 2019)      m' = b1 m + (1 - b1) g        s' = b2 s + (1 - b2) g^2
    v = - lr (m' / (1 - b1^t)) / (sqrt(s' / (1 - b2^t)) + eps) - lr decay theta
RMSprop (torch's)                       s' = b2 s + (1 - b2) g^2
    v = - lr g / (sqrt(s') + eps)       where decay theta is added to g first
SGD
    v = - lr g                          the same
Muon (Jordan et al. 2024)               m' = b m + (1 - b) g
    v = - lr sqrt(max(1, rows / columns)) orthogonalized((1 - b) g + b m') - lr decay theta

The parts of v are what this gradient does, - M g with M diagonal; what older gradients do, through
m; and decay. M depends on g, through s': as a part, it is what the gradient does at this step's M.
Muon's is no sum of such parts: all of it but the decay counts as the gradient's, and it has no M.

All is in fp64, whatever the weights are in.
"""

import math
from dataclasses import dataclass

import torch

from nanorl.dynamics import vectors
from nanorl.muon import orthogonalized, wide


@dataclass
class Update:
    """v and its parts, each a vector over the trained parameters."""

    gradient: dict
    momentum: dict
    decay: dict
    M: dict  # - M g is `gradient`, where g is clipped; None under Muon

    @property
    def v(self):
        return vectors.plus(vectors.plus(self.gradient, self.momentum), self.decay)


@dataclass
class Rules:
    """How the formulas are applied. All but the defaults are mistakes: see `mistakes`."""

    bias_correction: bool = True
    eps_inside: bool = False  # sqrt(s + eps) for sqrt(s) + eps
    stale: bool = False  # m and s of the step before, for m' and s'
    decays: bool = True


def clip_factor(g, max_norm):
    """c, by which a gradient is multiplied before the step. max_norm 0: 1."""
    norm = vectors.norm(g)
    return max_norm / norm if max_norm and norm > max_norm else 1.0


def update(optimizers, named, g, scale=1.0, max_norm=0.0, rules=None):
    """-> the Update that optim.update would make.

    optimizers: as optim.make_optimizers gives them. named: {name: parameter}, those that they
    have. g: the gradient, a vector. scale: the schedule's, as optim.lr_scale gives it.

    Raises ValueError for a gradient of 0, or one that is not finite: optim.update skips the step.
    """
    rules = rules or Rules()
    if not 0 < vectors.norm(g) < math.inf:
        raise ValueError("the gradient is 0 or not finite: such a step changes nothing")
    factor = clip_factor(g, max_norm)
    names = {id(p): name for name, p in named.items()}
    parts = Update({}, {}, {}, {})
    for optimizer in optimizers:
        rule = RULES[type(optimizer).__name__]
        for group in optimizer.param_groups:
            settings = dict(group, lr=group["initial_lr"] * scale)
            if not rules.decays:
                settings["weight_decay"] = 0.0
            for p in group["params"]:
                name = names[id(p)]
                theta, clipped = p.detach().double(), factor * g[name].double()
                state = {key: in_fp64(x) for key, x in optimizer.state.get(p, {}).items()}
                found = rule(theta, clipped, state, settings, rules)
                parts.gradient[name], parts.momentum[name], parts.decay[name] = found[:3]
                parts.M[name] = found[3]

    # The order of the names is theta's.
    ordered = {}
    for part in ("gradient", "momentum", "decay", "M"):
        ordered[part] = {name: getattr(parts, part)[name] for name in named}
    if any(M is None for M in ordered["M"].values()):
        ordered["M"] = None
    return Update(**ordered)


def in_fp64(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def adamw(theta, g, state, group, rules):
    """-> the parts of v by the gradient, momentum and decay, and M, of one parameter."""
    lr, eps = group["lr"], group["eps"]
    b1, b2 = group["betas"]
    t = float(state.get("step", 0)) + 1
    m = state.get("exp_avg", torch.zeros_like(g))
    s = state.get("exp_avg_sq", torch.zeros_like(g))
    share = 1 - b1  # of the new gradient in m'
    if rules.stale:
        # m = b1 * (m / b1) + 0 * g
        share, t, m = 0.0, max(1.0, t - 1), m / b1
    else:
        s = b2 * s + (1 - b2) * g * g
    first, second = (1 - b1**t, 1 - b2**t) if rules.bias_correction else (1.0, 1.0)
    if rules.eps_inside:
        root = (s / second + eps).sqrt()
    else:
        root = (s / second).sqrt() + eps
    M = lr * share / first / root
    momentum = -lr * b1 * m / first / root
    return -M * g, momentum, -lr * group["weight_decay"] * theta, M


def rmsprop(theta, g, state, group, rules):
    """See adamw. The decay's part is - M decay theta, at the M that it has a part in."""
    b2 = group["alpha"]
    total = g + group["weight_decay"] * theta
    s = state.get("square_avg", torch.zeros_like(g))
    if not rules.stale:
        s = b2 * s + (1 - b2) * total * total
    root = (s + group["eps"]).sqrt() if rules.eps_inside else s.sqrt() + group["eps"]
    M = group["lr"] / root
    return -M * g, torch.zeros_like(g), -M * group["weight_decay"] * theta, M


def sgd(theta, g, _state, group, _rules):
    """See adamw."""
    M = torch.full_like(g, group["lr"])
    return -M * g, torch.zeros_like(g), -M * group["weight_decay"] * theta, M


def muon(theta, g, state, group, rules):
    """See adamw. torch orthogonalizes in bf16 where the weights are not in fp64."""
    b, lr = group["momentum"], group["lr"]
    m = state.get("momentum_buffer", torch.zeros_like(g))
    if not rules.stale:
        m = b * m + (1 - b) * g
    ahead = wide((1 - b) * g + b * m)  # (rows, columns), rows <= columns
    rule = group["ns_coefficients"], group["ns_steps"], group["eps"]
    direction = orthogonalized(ahead[None], *rule)[0]
    rows, columns = g.shape
    if rows > columns:
        direction = direction.mT
    v = -lr * math.sqrt(max(1, rows / columns)) * direction
    return v, torch.zeros_like(g), -lr * group["weight_decay"] * theta, None


RULES = {"AdamW": adamw, "RMSprop": rmsprop, "SGD": sgd, "Muon": muon}


# ---- what makes an update vector wrong -----------------------------------------------------------


WRONG_RULES = {
    "no weight decay": Rules(decays=False),
    "no bias correction": Rules(bias_correction=False),
    "eps inside the root": Rules(eps_inside=True),
    "stale state: m and s without this gradient": Rules(stale=True),
}


def mistakes(optimizers, named, g, scale, max_norm):
    """Update vectors with one mistake each -> {mistake: (norm / true norm, cosine with the true)}.

    Each has been taken for the update. A norm ratio of 1 and a cosine of 1 say that it does not
    matter here.
    """
    settings = optimizers, named, g, scale
    true = update(*settings, max_norm)
    v = true.v
    length = vectors.norm(v)

    wrong = {}
    for name, rules in WRONG_RULES.items():
        wrong[name] = update(*settings, max_norm, rules).v
    wrong["no clipping"] = update(*settings, 0.0).v
    wrong["no momentum: this gradient's part alone"] = true.gradient
    wrong["the plain gradient, made as long"] = vectors.scaled(g, -length / vectors.norm(g))
    wrong["the embedding left out"] = left_out(v, "embed_tokens")
    wrong["bf16 weights"] = in_bf16(named, v)

    found = {}
    for name, vector in wrong.items():
        found[name] = vectors.norm(vector) / length, vectors.cosine(vector, v)
    return found


def left_out(v, piece):
    """v, and 0 where a name has `piece` in it: a parameter frozen that is not."""
    return {name: torch.zeros_like(x) if piece in name else x for name, x in v.items()}


def in_bf16(named, v):
    """The update that weights in bf16 would show: most numbers do not move by a whole last bit."""
    found = {}
    for name, p in named.items():
        before = p.detach().double()
        after = before + v[name]
        found[name] = after.bfloat16().double() - before.bfloat16().double()
    return found
