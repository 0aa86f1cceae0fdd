"""The forward passes that have a gradient: of a micro-batch in RL, of rows of text in base and SFT.

RL's loss itself stands in train_rl.py's loop. S counts a micro-batch's sampled tokens.
"""

from dataclasses import dataclass, replace

import torch

from nanorl import grpo
from nanorl.attention import CausalAttention, pick
from nanorl.flex import packed_attention


@dataclass
class Forward:
    """What a forward pass over a Batch gave, and what its attention computed for it."""

    logprobs: torch.Tensor  # (S,) of the sampled tokens under the model, with a gradient
    entropy: torch.Tensor  # (S,) of the distributions, or None
    computed_slots: int  # padding included
    computed_pairs: int  # of a query and a key, padding and what a token may not see included


def forward(model, batch, temperature=1.0, with_entropy=False):
    """-> Forward. The head runs only where a log-prob is needed, in chunks."""
    device, dtype = batch.ids.device, model.compute_dtype
    attend = packed_attention(batch.rows, device, dtype, model.config.head_dim)
    h = model.hidden(batch.ids, batch.positions, attend)  # (1, T, C): each prompt is there once
    h = pick(h[0], batch.predicted_at)  # (S, C)
    logprobs, entropy = model.logprobs(h, batch.targets, temperature, with_entropy)
    return Forward(logprobs, entropy, attend.computed_slots, attend.computed_pairs)


@torch.no_grad()
def with_reference(batches, policy, objective, temperature, meter):
    """The batches with the log-probs of the policy's reference. k1 goes into their advantages."""
    found = []
    with policy.reference() as model:
        for batch in batches:
            outputs = forward(model, batch, temperature)
            meter.reference(batch, outputs)
            scored = replace(batch, reference_logprobs=outputs.logprobs.double())
            found.append(grpo.lowered(scored, objective))
    return found


def token_sums(outputs, batch, objective):
    """What is logged of the tokens of one micro-batch: sums, and each one's entropy."""
    sums = grpo.token_sums(outputs.logprobs, outputs.entropy, batch, objective)
    return {**sums, "slots": batch.ids.numel(), "computed_slots": outputs.computed_slots}


# ---- text: base and SFT --------------------------------------------------------------------------


def text_loss(model, inputs, targets):
    """Sum of - log p over rows of text: inputs, targets (B, T)."""
    h = model.hidden(inputs)  # (B, T, C)
    logprobs, _ = model.logprobs(h.flatten(0, 1), targets.flatten())  # (B * T,)
    return -logprobs.sum()


def chat_loss(model, inputs, targets, mask, document, positions):
    """Sum of - log p of what the assistant says, over packed rows of conversations: all (B, T).

    mask: 1 where the target is the assistant's. document numbers each token's conversation, which
    sees nothing of the others in its row; positions: the token's in its conversation.
    """
    h = model.hidden(inputs, positions, CausalAttention(document))  # (B, T, C)
    said = mask.flatten().nonzero().squeeze(1)  # (said,) a mask would be looked at in every use
    logprobs, _ = model.logprobs(h.flatten(0, 1)[said], targets.flatten()[said])  # (said,)
    return -logprobs.sum()
