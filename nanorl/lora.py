"""LoRA (Hu et al. 2021): the weights W of some projections stay, and B A of low rank is learned.

    W + alpha / r * B A      A (r, in), random at first      B (out, r), zero at first

The model always holds the merged weights, in the precision of its activations, and multiplies by
them alone: sampler, learner and what is saved are one set of numbers. (x W^T + x A^T B^T with W in
bf16 would be another one. Most of what is learned is smaller than the last bit of W, so that the
sampler would not see it.) Only the gradient knows about A and B, and it never forms W's.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanorl.hf import load_model

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LowRank(torch.autograd.Function):
    """x W^T (..., out) for x (..., in) and the merged W (out, in), with A's and B's gradient.

    With g the gradient of the output: dL/dB = scale g^T (x A^T), and dL/dA = scale (g B)^T x. That
    is what the chain rule gives through W, in O(r) a token and weight row and not O(in).
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        grad_x = g @ weight if ctx.needs_input_grad[0] else None
        x, g = x.flatten(0, -2), g.flatten(0, -2)  # (n, in), (n, out)
        a_narrow, b_narrow = a.to(x.dtype), b.to(x.dtype)
        grad_b = g.T @ (x @ a_narrow.T)  # (out, r)
        grad_a = (g @ b_narrow).T @ x  # (r, in)
        return grad_x, None, ctx.scale * grad_a.to(a.dtype), ctx.scale * grad_b.to(b.dtype), None


class Product:
    """F.linear with LowRank's gradient: what gpt.Linear multiplies by."""

    def __init__(self, a, b, scale):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x, weight, bias=None):
        y = LowRank.apply(x, weight, self.a, self.b, self.scale)
        return y if bias is None else y + bias


class Projection(NamedTuple):
    """An adapted projection of the model."""

    module: object  # gpt.Linear, which holds the merged weight
    own_weight: torch.Tensor  # W (out, in)
    a: torch.Tensor  # (r, in), in fp32 or better
    b: torch.Tensor  # (out, r)


class LoRA:
    """Adapters for the projections `targets` in all layers of `model`, whose weights stay.

    alpha / rank scales what is learned. seed: of A's first values.
    Raises ValueError for a rank below 1, an alpha of 0 or less, and an unknown projection.
    """

    def __init__(self, model, rank, alpha, targets=TARGETS, seed=0):
        if rank < 1 or not alpha > 0:
            raise ValueError(f"lora_rank is {rank} and lora_alpha {alpha}: both must be above 0")
        unknown = set(targets) - set(TARGETS)
        if unknown or not targets:
            names = ", ".join(sorted(unknown)) or "nothing"
            raise ValueError(f"lora_targets names {names}: it takes some of {', '.join(TARGETS)}")

        model.requires_grad_(False)
        self.rank, self.scale = rank, alpha / rank
        self.projections = {}  # by the module's name
        generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]  # such as q_proj
            if kind.endswith("_proj") and kind.removesuffix("_proj") in targets:
                projection = self._adapt(module, generator)
                module.product = Product(projection.a, projection.b, self.scale)
                self.projections[name] = projection

    def _adapt(self, module, generator):
        n_out, n_in = module.weight.shape
        device = module.weight.device
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        a = torch.randn(self.rank, n_in, generator=generator) * n_in**-0.5
        a = a.to(device, dtype).requires_grad_()
        b = torch.zeros(n_out, self.rank, dtype=dtype, device=device, requires_grad=True)
        return Projection(module, module.weight.data.clone(), a, b)

    def named_parameters(self):
        """(name, tensor) of what trains, as a module has it."""
        for name, projection in self.projections.items():
            yield f"{name}.lora_A.weight", projection.a
            yield f"{name}.lora_B.weight", projection.b

    @torch.no_grad()
    def merge(self):
        """Put W + scale B A into the model, after every update.

        It starts from W itself each time, so that the rounding to the weights' precision does not
        add up. The sum is taken in fp32 or better.
        """
        for projection in self.projections.values():
            change = self.scale * (projection.b @ projection.a)
            projection.module.weight.copy_(projection.own_weight + change)

    @contextmanager
    def base(self, model):
        """Inside, the model is what it was before: a KL term's reference, at no cost in memory."""
        projections = list(self.projections.values())
        merged = [projection.module.weight.data for projection in projections]
        for projection in projections:
            projection.module.weight.data = projection.own_weight
        try:
            yield model
        finally:
            for projection, weight in zip(projections, merged):
                projection.module.weight.data = weight

    def state_dict(self):
        return {name: p.detach().cpu() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, p in self.named_parameters():
            p.copy_(state[name])
        self.merge()


def adapted_model(path, dtype, device, *adapters):
    """A model directory -> (GPT, its LoRA). adapters: what LoRA takes besides the model.

    The weights stay as they are, so that they need no fp32 master: they are in `dtype`, which is
    that of the activations.
    """
    model = load_model(path, dtype, device)
    return model, LoRA(model, *adapters)
