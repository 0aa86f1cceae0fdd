"""Optimizers, learning-rate schedule, gradient clipping. No collectives: gradients come already summed."""

import math

import torch


def make_optimizers(model, matrix_lr, other_lr, weight_decay=0.0, muon=True):
    """Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest, or AdamW for all. model: what has named_parameters(), a GPT
    or its LoRA.

    Returns a list of torch optimizers; each group's `initial_lr` is what set_lr scales."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if p.dim() == 2 and ".layers." in n]
    rest = [p for n, p in named if not (p.dim() == 2 and ".layers." in n)]
    fused = {"fused": True} if named[0][1].dtype != torch.float64 else {}
    adamw = dict(betas=(0.9, 0.95), eps=1e-8, **fused)
    if muon:
        optimizers = [
            torch.optim.Muon(hidden, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=other_lr, weight_decay=0.0, **adamw),
        ]
    else:
        optimizers = [
            torch.optim.AdamW(
                [
                    dict(params=hidden, lr=matrix_lr, weight_decay=weight_decay),
                    dict(params=rest, lr=other_lr, weight_decay=0.0),
                ],
                **adamw,
            )
        ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def load_states(optimizers, states):
    """Put back what [o.state_dict() for o in optimizers] gave."""
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)


def lr_scale(step, steps, warmup=0, cooldown=0.0, shape="linear"):
    """Factor on the learning rate at `step` of `steps`: linear from 0 over `warmup` steps, constant, then down to 0 over the
    last `cooldown` share of the run, along a line or (shape "cosine") half a cosine."""
    up = (step + 1) / warmup if step < warmup else 1.0
    down = min(1.0, (steps - step) / max(1.0, cooldown * steps)) if cooldown else 1.0
    if shape == "cosine":
        down = (1 - math.cos(math.pi * down)) / 2
    return max(0.0, min(1.0, up, down))


PARTS = {
    "attention": ".self_attn.",
    "mlp": ".mlp.",
    "norms": "norm.weight",
    "embeddings": "embed_tokens",
    "head": "lm_head",
}


def group_norms(model):
    """Norms of the gradients by what they belong to: attention (with its QK norms), mlp, norms, embeddings, and the head where it is
    not the embedding. Their squares add up to the square of the global norm."""
    squares = dict.fromkeys(PARTS, 0.0)
    for name, p in model.named_parameters():
        if p.grad is not None:
            part = next(part for part, piece in PARTS.items() if piece in name)
            squares[part] = squares[part] + p.grad.double().square().sum()
    return {
        part: float(square) ** 0.5
        for part, square in squares.items()
        if not isinstance(square, float)
    }


def update(optimizers, params, scale, max_norm):
    """Clip by the global norm, then step with learning rates times `scale`, then clear the gradients.

    Returns the norm before clipping. With a norm that is zero or not finite nothing at all changes (no momentum,
    no decay): Muon would move the weights by a full step on any gradient, however small. Every rank holds the
    same summed gradient, so every rank decides alike."""
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
