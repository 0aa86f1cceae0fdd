"""Rollouts -> micro-batches for the learner: prompts and completions packed into one row.

Nothing is padded, and a prompt is there once for all its completions. A slot is a place in the
packed row. Two prompts, A with two completions and B with one; $ is a stop token (pack would put
the shorter B first):

    slot          0   1   2 |  3   4 |  5 |  6   7 |  8
    input         A   A   A | a1  a2 | a3 |  B   B | b1
    position      0   1   2 |  3   4 |  3 |  0   1 |  2

    target       a1  a2   $ | a3   $ | b1   $
    predicted at  2   3   4 |  2   5 |  7   8      (a slot)

What stands between two bars is a Row. A completion's first token is predicted at its prompt's last
slot, so slot 2 predicts two tokens. Its last token, here $, is a target and never an input: nothing
follows that it could predict. Who sees whom in the packed row: attention.py.

T counts the slots of the packed row, S its targets, which are the sampled tokens.
"""

from dataclasses import dataclass, field
from itertools import chain

import torch


@dataclass
class Row:
    """A run of slots in the packed row, and the run that it goes on from, its prefix."""

    start: int  # its first slot
    length: int  # slots; 0 for a completion of one token
    prefix_start: int
    prefix_length: int  # 0: a prompt itself

    @property
    def visible_pairs(self):
        """(query, key) pairs of attention: every slot sees the prefix, itself and those before."""
        return self.length * self.prefix_length + self.length * (self.length + 1) // 2


@dataclass
class Batch:
    """One micro-batch. What was sampled is known from the record of it, never from the ids."""

    # The packed row.
    ids: torch.Tensor  # (1, T) the input of each slot
    positions: torch.Tensor  # (1, T) of each slot in its own prompt and completion
    rows: list  # of Row, which cover all slots
    # One entry a sampled token, completion after completion.
    targets: torch.Tensor  # (S,) the token
    predicted_at: torch.Tensor  # (S,) the slot whose activations predict it
    advantages: torch.Tensor  # (S,) float64, its completion's
    token_weights: torch.Tensor  # (S,) float64, its weight in the loss
    sampler_logprobs: torch.Tensor  # (S,) float64, as it was sampled
    # One entry a completion.
    lengths: torch.Tensor  # (completions,) sampled tokens of each; their sum is S
    numbers: list  # (p, g) of each: it is completion g of the p-th of the rollouts
    # Where there is a KL term, learner.with_reference adds it.
    reference_logprobs: torch.Tensor = None  # (S,) float64

    @property
    def visible_pairs(self):
        """(query, key) pairs that attention needs; it computes more (attention.py)."""
        return sum(row.visible_pairs for row in self.rows)


@dataclass
class Sample:
    """A completion, which one it is, and what each of its tokens counts."""

    number: tuple  # (p, g): completion g of the p-th of the rollouts
    completion: object  # Completion: ids, log-probs, finished
    advantage: float
    token_weight: float


@dataclass
class Group:
    """A prompt and those of its samples that are in one micro-batch."""

    prompt_ids: list
    samples: list = field(default_factory=list)

    def tokens(self):
        """Of its longest row, prompt included."""
        longest = max(len(sample.completion.ids) for sample in self.samples)
        return len(self.prompt_ids) + longest


def pack(rollouts, advantages, token_weights, token_budget, device):
    """Rollouts, advantages (P, G) and token weights (P, G) -> a list of Batch.

    Each has at most `token_budget` slots, or one completion with its prompt. A group may be split
    over two, which changes no gradient: its advantages are known already. Problems of like length
    come together, so that attention pads little.
    """
    groups = []
    for p, rollout in enumerate(rollouts):
        columns = zip(rollout.completions, advantages[p].tolist(), token_weights[p].tolist())
        samples = [Sample((p, g), *column) for g, column in enumerate(columns)]
        groups.append(Group(rollout.prompt_ids, samples))
    groups.sort(key=Group.tokens)

    batches, current, slots = [], [], 0
    for group in groups:
        prompt_is_in = False  # whether `current` has this group's prompt
        for sample in group.samples:
            prompt_slots = len(group.prompt_ids)
            completion_slots = len(sample.completion.ids) - 1

            # It does not fit any more: the next micro-batch needs the prompt again.
            needed = completion_slots + (0 if prompt_is_in else prompt_slots)
            if current and slots + needed > token_budget:
                batches.append(current)
                current, slots, prompt_is_in = [], 0, False

            if not prompt_is_in:
                current.append(Group(group.prompt_ids))
                slots += prompt_slots
                prompt_is_in = True
            current[-1].samples.append(sample)
            slots += completion_slots
    if current:
        batches.append(current)
    return [make_batch(some_groups, device) for some_groups in batches]


def make_batch(groups, device):
    """Groups -> the Batch of all their samples."""
    ids, positions, rows = [], [], []
    targets, predicted_at, sampler_logprobs = [], [], []
    advantages, token_weights, lengths, numbers = [], [], [], []
    for group in groups:
        prompt = Row(
            start=len(ids),
            length=len(group.prompt_ids),
            prefix_start=len(ids),
            prefix_length=0,
        )
        rows.append(prompt)
        ids += group.prompt_ids
        positions += range(prompt.length)

        for sample in group.samples:
            completion = sample.completion
            row = Row(
                start=len(ids),
                length=len(completion.ids) - 1,
                prefix_start=prompt.start,
                prefix_length=prompt.length,
            )
            rows.append(row)
            # The last token is a target and never an input.
            ids += completion.ids[:-1]
            positions += range(prompt.length, prompt.length + row.length)

            # The first token is predicted at the prompt's last slot, each further one at the slot
            # of the token before it.
            targets += completion.ids
            predicted_at.append(prompt.start + prompt.length - 1)
            predicted_at += range(row.start, row.start + row.length)
            sampler_logprobs += completion.logprobs

            # What is known of a completion holds for each of its tokens.
            length = len(completion.ids)
            lengths.append(length)
            numbers.append(sample.number)
            advantages += [sample.advantage] * length
            token_weights += [sample.token_weight] * length

    integers = on_device([ids, positions, targets, predicted_at, lengths], torch.long, device)
    floats = on_device([advantages, token_weights, sampler_logprobs], torch.float64, device)
    ids, positions, targets, predicted_at, lengths = integers
    advantages, token_weights, sampler_logprobs = floats
    return Batch(
        ids=ids[None],
        positions=positions[None],
        rows=rows,
        targets=targets,
        predicted_at=predicted_at,
        advantages=advantages,
        token_weights=token_weights,
        sampler_logprobs=sampler_logprobs,
        lengths=lengths,
        numbers=numbers,
    )


def on_device(lists, dtype, device):
    """Lists of numbers -> a tensor each, by one copy: a GPU is waited for in each."""
    together = torch.tensor(list(chain(*lists)), dtype=dtype).to(device)
    return together.split([len(numbers) for numbers in lists])
