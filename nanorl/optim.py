"""Optimizers, the learning rate's schedule, clipping.

Gradients come summed over ranks. The one collective is Muon's, and it is passed in.
"""

import math

import torch

from nanorl.muon import Muon

# The rules of RL, and what they are called. The last two have no momentum, and their weight decay
# is added to the gradient.
RULES = {"adamw": "AdamW", "rmsprop": "RMSprop", "sgd": "SGD"}
BETAS = (0.9, 0.95)  # of AdamW's two moments, where the script has no constants for them


def make_optimizers(
    model, matrix_lr, other_lr, weight_decay=0.0, muon=True, ranks=None, rule="adamw", betas=BETAS
):
    """-> a list of torch optimizers.

    muon: Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest; else `rule` for
    all. Only the blocks' matrices decay. model: whatever has named_parameters(), a GPT or its LoRA.
    ranks: over which Muon's work is shared, as runtime.dist; None: every rank does all of it.
    rule: one of RULES. betas: of AdamW's moments; RMSprop has the second one's, SGD has none.

    The rate of a group is kept as its `initial_lr`, which `update` scales.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.dim() == 2 and ".layers." in name
            (matrices if is_matrix else others).append(p)

    adamw = dict(betas=betas, eps=1e-8)
    if (matrices + others)[0].dtype != torch.float64:
        adamw["fused"] = True
    of_matrices = dict(lr=matrix_lr, weight_decay=weight_decay)
    of_others = dict(lr=other_lr, weight_decay=0.0)
    if muon:
        optimizers = [
            Muon(matrices, momentum=0.95, ranks=ranks, **of_matrices),
            torch.optim.AdamW(others, **of_others, **adamw),
        ]
    else:
        groups = [dict(params=matrices, **of_matrices), dict(params=others, **of_others)]
        if rule == "rmsprop":
            optimizers = [torch.optim.RMSprop(groups, alpha=betas[1], eps=1e-8)]
        elif rule == "sgd":
            optimizers = [torch.optim.SGD(groups)]
        else:
            optimizers = [torch.optim.AdamW(groups, **adamw)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def load_states(optimizers, states):
    """Put back what [o.state_dict() for o in optimizers] gave."""
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)


def lr_scale(step, steps, warmup=0, cooldown=0.0, shape="linear"):
    """Factor on the learning rate at `step` of `steps`, in [0, 1].

    It rises from 0 over `warmup` steps, is constant, then falls to 0 over the last `cooldown` share
    of the run: along a line, or (shape "cosine") along half a cosine.
    """
    up = (step + 1) / warmup if step < warmup else 1.0
    down = 1.0
    if cooldown:
        down = min(1.0, (steps - step) / max(1.0, cooldown * steps))
    if shape == "cosine":
        down = (1 - math.cos(math.pi * down)) / 2
    return max(0.0, min(1.0, up, down))


def update(optimizers, params, scale, max_norm):
    """Clip the gradient by its global norm, step with the rates times `scale`, clear the gradient.

    max_norm: 0 does not clip. Returns the norm before clipping.

    With a norm that is zero or not finite nothing at all changes, no momentum and no decay. Muon
    would move the weights by a full step on any gradient, however small. Every rank holds the same
    summed gradient, so that every rank decides alike.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
    if norm > 0 and math.isfinite(norm):
        if max_norm and norm > max_norm:
            torch._foreach_mul_(grads, max_norm / norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
    for p in params:
        p.grad = None
    return norm


# Parts of the model, and the piece of a parameter's name that tells them.
PARTS = {
    "attention": ".self_attn.",
    "mlp": ".mlp.",
    "norms": "norm.weight",
    "embeddings": "embed_tokens",
    "head": "lm_head",
}


def group_norms(model):
    """Norms of the gradients by the parts of the model that they belong to, {part: norm}.

    The attention has its QK norms with it, and a head that is the embedding is the embedding. The
    squares add up to the square of the global norm.
    """
    grads = {}  # part -> its gradients
    for name, p in model.named_parameters():
        if p.grad is not None:
            part = next(part for part, piece in PARTS.items() if piece in name)
            grads.setdefault(part, []).append(p.grad)
    if not grads:
        return {}

    # Norms of norms: no gradient is copied to fp64, and the device is looked at once.
    parts = [part for part in PARTS if part in grads]
    norms = [torch.nn.utils.get_total_norm(grads[part]).double() for part in parts]
    return dict(zip(parts, torch.stack(norms).tolist()))
