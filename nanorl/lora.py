"""LoRA (Hu et al. 2021): the weights W of some projections stay as they are, and what is learned is B A, of low rank r:

    W + alpha / r * B A      A (r, in), random at first      B (out, r), zero at first

The model always holds the merged weights, in the precision of its activations, and multiplies by them alone: sampler, learner and what is
saved are one set of numbers. (x W^T + x A^T B^T with W in bf16 would be another one: most of what is learned is smaller than the last bit of W, so
the sampler would not see it.) Only the gradient knows about A and B, and never forms W's."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanorl.hf import load_model

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LowRank(torch.autograd.Function):
    """x (..., in), merged weight (out, in), A, B, scale -> x W^T (..., out). With g the gradient of the output: dL/dB = scale g^T (x A^T),
    dL/dA = scale (g B)^T x, what the chain rule gives through W, in O(r) a token and weight row and not O(in)."""

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
        x, g = x.flatten(0, -2), g.flatten(0, -2)  # (N, in), (N, out)
        a_here, b_here = a.to(x.dtype), b.to(x.dtype)
        grad_b = ctx.scale * (g.T @ (x @ a_here.T)).to(b.dtype)  # (out, r)
        grad_a = ctx.scale * ((g @ b_here).T @ x).to(a.dtype)  # (r, in)
        return grad_x, None, grad_a, grad_b, None


class _Product:
    """F.linear with LowRank's gradient."""

    def __init__(self, *adapter):
        self.adapter = adapter

    def __call__(self, x, weight, bias=None):
        y = LowRank.apply(x, weight, *self.adapter)
        return y if bias is None else y + bias


def adapted_model(path, dtype, device, *adapters):
    """A model directory -> (GPT, its LoRA). The weights stay as they are, so they need no fp32 master: they are in `dtype`, that of the activations."""
    model = load_model(path, dtype, device)
    return model, LoRA(model, *adapters)


class LoRA:
    """Adapters for the projections `targets` of every layer of `model`, whose own weights no longer train. rank r; alpha, whose ratio to the rank
    scales what is learned. Raises ValueError for a rank below 1 or an unknown projection."""

    def __init__(self, model, rank, alpha, targets=TARGETS, seed=0):
        if rank < 1 or not alpha > 0:
            raise ValueError(f"lora_rank is {rank} and lora_alpha {alpha}: both must be above 0")
        unknown = set(targets) - set(TARGETS)
        if unknown or not targets:
            raise ValueError(
                f"lora_targets names {', '.join(sorted(unknown)) or 'nothing'}: it takes some of {', '.join(TARGETS)}"
            )
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.scale, self.projections = (
            rank,
            alpha / rank,
            {},
        )  # name -> (Linear, its own weight W (out, in), A, B)
        for name, module in model.named_modules():
            if name.removesuffix("_proj").rpartition(".")[2] in targets and name.endswith("_proj"):
                n_out, n_in = module.weight.shape
                master = torch.promote_types(module.weight.dtype, torch.float32)
                a = (
                    (torch.randn(rank, n_in, generator=generator) * n_in**-0.5)
                    .to(module.weight.device, master)
                    .requires_grad_()
                )
                b = torch.zeros(n_out, rank, dtype=master, device=a.device, requires_grad=True)
                self.projections[name] = module, module.weight.data.clone(), a, b
                module.product = _Product(a, b, self.scale)

    def named_parameters(self):
        """(name, tensor) of what trains, as a module has it."""
        for name, (_, _, a, b) in self.projections.items():
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", b

    @torch.no_grad()
    def merge(self):
        """Put W + scale B A into the model, after every update. Always from W itself, so that rounding to the weights' precision does not add up."""
        for module, own, a, b in self.projections.values():
            module.weight.copy_(own + self.scale * (b @ a))  # the sum is taken in fp32 or better

    @contextmanager
    def base(self, model):
        """Inside, the model is what it was before: a KL term's reference, which so costs no memory."""
        merged = [module.weight.data for module, *_ in self.projections.values()]
        for module, own, *_ in self.projections.values():
            module.weight.data = own
        try:
            yield model
        finally:
            for (module, *_), weight in zip(self.projections.values(), merged):
                module.weight.data = weight

    def state_dict(self):
        return {name: p.detach().cpu() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, p in self.named_parameters():
            p.copy_(state[name])
        self.merge()
