"""A model as a function of its trained parameters theta, so that it can be asked at theta + v.

Two forward passes serve the measurements. The learner's own (nanorl/learner.py), packed and fast,
gives gradients of whole prompt groups. `tokens` is the model's own too, with a row a completion and
attention spelled out in matrix products: of that pass torch can take derivatives of derivatives,
derivatives forward along a direction, and those of each completion alone.
"""

import copy
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch.func import functional_call

from nanorl import learner
from nanorl.attention import MaskedAttention
from nanorl.gpt import all_logprobs

# ---- completions, a row each ---------------------------------------------------------------------


@dataclass
class Sequences:
    """B completions with their prompts, in rectangles padded on the right: T inputs, K tokens."""

    ids: torch.Tensor  # (B, T) prompt and completion; the last token is no input
    predicted_at: torch.Tensor  # (B, K) the input whose activations predict token k
    targets: torch.Tensor  # (B, K) token k
    sampled: torch.Tensor  # (B, K) bool, False: padding
    group: torch.Tensor  # (B,) number of the completion's prompt group

    def __len__(self):
        return len(self.ids)

    @property
    def lengths(self):
        """(B,) sampled tokens of each."""
        return self.sampled.sum(1)

    def rows(self, which):
        """The completions `which`: a slice, or indices."""
        return Sequences(*(getattr(self, field.name)[which] for field in fields(self)))

    def parts(self, size):
        """-> Sequences of at most `size` completions each."""
        return [self.rows(slice(i, i + size)) for i in range(0, len(self), size)]


def sequences_of(rollouts):
    """Rollouts -> Sequences, prompt after prompt."""
    rows = []
    for number, rollout in enumerate(rollouts):
        for completion in rollout.completions:
            rows.append((number, rollout.prompt_ids, completion.ids))
    T = max(len(prompt) + len(completion) - 1 for _, prompt, completion in rows)
    K = max(len(completion) for _, _, completion in rows)
    B = len(rows)
    ids = torch.zeros(B, T, dtype=torch.long)
    predicted_at = torch.zeros(B, K, dtype=torch.long)
    targets = torch.zeros(B, K, dtype=torch.long)
    sampled = torch.zeros(B, K, dtype=torch.bool)
    for i, (_, prompt, completion) in enumerate(rows):
        inputs = prompt + completion[:-1]
        k = len(completion)
        ids[i, : len(inputs)] = torch.tensor(inputs)
        predicted_at[i, :k] = torch.arange(len(prompt) - 1, len(inputs))
        targets[i, :k] = torch.tensor(completion)
        sampled[i, :k] = True
    group = torch.tensor([number for number, _, _ in rows])
    return Sequences(ids, predicted_at, targets, sampled, group)


# ---- the model at any theta ----------------------------------------------------------------------


class Measured:
    """A model, and which of its parameters count.

    model: a GPT. adapters: its LoRA, or None. temperature: of the sampling, by which logits are
    divided.

    theta: {name: tensor} the trained parameters, as they are.
    """

    def __init__(self, model, adapters=None, temperature=1.0):
        self.model, self.adapters, self.temperature = model, adapters, temperature
        self.caller = Caller(model)
        trained = adapters or model
        self.theta = {name: p.detach() for name, p in trained.named_parameters()}
        if adapters:
            # In training only the product's gradient knows of A and B. Here the weights do.
            for projection in adapters.projections.values():
                projection.module.product = F.linear

    def weights(self, theta):
        """theta -> {name: the model's weight} of those that depend on it."""
        if not self.adapters:
            return theta
        found = {}
        for name, projection in self.adapters.projections.items():
            a, b = theta[f"{name}.lora_A.weight"], theta[f"{name}.lora_B.weight"]
            found[f"{name}.weight"] = projection.own_weight + self.adapters.scale * (b @ a)
        return found

    def call(self, theta, function, *arguments):
        """function(model, *arguments) where the model has the parameters theta."""
        weights = {f"model.{name}": w for name, w in self.weights(theta).items()}
        return functional_call(self.caller, weights, (function, *arguments))

    def tokens(self, theta, sequences):
        """-> l_k and H_k of the sampled tokens, (B, K) each, 0 where there is none."""
        return self.call(theta, tokens, sequences, self.temperature)

    def learner_logprobs(self, theta, batch):
        """-> l_k of a batch.Batch's tokens, (S,), by the learner's own pass."""
        return self.call(theta, learner.forward, batch, self.temperature).logprobs

    @torch.no_grad()
    def at(self, theta):
        """A copy of the model with the parameters theta, to sample from."""
        model = copy.deepcopy(self.model)
        weights = self.weights(theta)
        for name, p in model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
        return model


class Caller(torch.nn.Module):
    """functional_call calls a module's forward, and this one calls any function of the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *arguments):
        return function(self.model, *arguments)


def tokens(model, sequences, temperature):
    """See Measured.tokens."""
    h = model.hidden(sequences.ids, attend=PlainAttention())  # (B, T, C)
    at = sequences.predicted_at[..., None].expand(-1, -1, h.size(-1))  # (B, K, C)
    logits = model.head(h.gather(1, at))  # (B, K, V)
    logprobs = all_logprobs(logits, temperature)  # (B, K, V)
    entropies = -(logprobs.exp() * logprobs).sum(-1)  # (B, K)
    chosen = logprobs.gather(-1, sequences.targets[..., None])[..., 0]  # (B, K)
    sampled = sequences.sampled
    return chosen * sampled, entropies * sampled


class PlainAttention:
    """Causal attention in matrix products: the fused kernels have no second derivative."""

    def __init__(self):
        self.masked = MaskedAttention()

    def __call__(self, _layer, q, k, v):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.masked.by_matrix_products(q, k, v).transpose(1, 2)


# ---- derivatives ---------------------------------------------------------------------------------


def gradient(function, theta):
    """The gradient at theta of a function of theta that gives one number -> (value, vector)."""
    leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
    value = function(leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    found = {}
    for (name, leaf), grad in zip(leaves.items(), grads):
        found[name] = torch.zeros_like(leaf) if grad is None else grad
    return value.detach(), found


def along(function, theta, u):
    """A function of theta, as one of the number eta: function(theta + eta u)."""

    def moved(eta):
        return function({name: p + eta * u[name] for name, p in theta.items()})

    return moved


def derivatives(function, theta, u):
    """First and second derivative of function(theta + eta u) by eta, at 0; of the output's shape.

    Forward over forward, so that nothing is kept for a backward pass.
    """
    moved = along(function, theta, u)
    start = next(iter(theta.values())).new_zeros(())
    one = torch.ones_like(start)

    def slope(eta):
        return torch.func.jvp(moved, (eta,), (one,))[1]

    return torch.func.jvp(slope, (start,), (one,))


def derivative(function, theta, u):
    """First derivative of function(theta + eta u) by eta at 0, of the output's shape."""
    start = next(iter(theta.values())).new_zeros(())
    moved = along(function, theta, u)
    return torch.func.jvp(moved, (start,), (torch.ones_like(start),))[1]
