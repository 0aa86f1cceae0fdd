"""What the learner computes of a micro-batch: the only forward pass that there is with a gradient.

The loss itself stands in train_rl.py's loop. S counts a micro-batch's sampled tokens.
"""

from dataclasses import dataclass, replace

import torch

from nanorl import grpo
from nanorl.attention import SharedPrefixAttention, pick


@dataclass
class Forward:
    """What a forward pass over a Batch gave, and what its attention computed for it."""

    logprobs: torch.Tensor  # (S,) of the sampled tokens under the model, with a gradient
    entropy: torch.Tensor  # (S,) of the distributions, or None
    computed_slots: int  # padding included
    computed_pairs: int  # of a query and a key, padding and what a token may not see included


def forward(model, batch, temperature=1.0, with_entropy=False):
    """-> Forward. The head runs only where a log-prob is needed, in chunks."""
    attend = SharedPrefixAttention(batch.rows, batch.ids.device)
    h = model.hidden(batch.ids, batch.positions, attend)  # (1, T, C): each prompt is there once
    h = pick(h[0], batch.predicted_at)  # (S, C)
    logprobs, entropy = model.logprobs(h, batch.targets, temperature, with_entropy)
    return Forward(logprobs, entropy, attend.computed_slots, attend.computed_pairs)


@torch.no_grad()
def with_reference(batches, reference, objective, temperature, meter):
    """The batches with the reference's log-probs. k1 goes into their advantages, before any update.

    reference: a context that gives the reference model.
    """
    found = []
    with reference() as model:
        for batch in batches:
            outputs = forward(model, batch, temperature)
            meter.reference(batch, outputs)
            batch = replace(batch, reference_logprobs=outputs.logprobs.double())
            found.append(grpo.lowered(batch, objective))
    return found


def token_sums(outputs, batch, objective):
    """What is logged of the tokens of one micro-batch, as sums."""
    sums = grpo.token_sums(
        outputs.logprobs,
        batch.sampler_logprobs,
        outputs.entropy,
        batch.advantages,
        batch.reference_logprobs,
        objective.clip_low,
        objective.clip_high,
    )
    return {**sums, "slots": batch.ids.numel(), "computed_slots": outputs.computed_slots}
