"""How likely a model finds each of some texts that may follow a prompt: for multiple choice.

A base model has learnt no chat, so it is asked in plain text. A choice's score is the mean log-prob
of its tokens, so that a long choice is as good as a short one: the choice of least perplexity is
the answer, as in the CORE score of DataComp-LM (Li et al. 2024).
"""

from collections import Counter

import torch

from nanorl import learner
from nanorl.batch import Group, Sample, make_batch
from nanorl.sampling import Completion

TOKENS = 16384  # of one forward, at most, or of one prompt with its continuations


def plain_text(messages):
    """Chat messages -> one text: an answer follows its question, and a blank line the answer."""
    text = ""
    for message in messages:
        text += message["content"]
        if message["role"] == "assistant":
            text += "\n\n"
    return text


def prompt_ids(tokenizer, problem):
    """A problem's prompt as plain text. A text starts after a boundary, as in pretraining."""
    return [tokenizer.document_end, *tokenizer.encode(plain_text(problem.prompt))]


def choice_ids(tokenizer, problem):
    """The ids of each of its choices, which are texts of one token or more."""
    return [tokenizer.encode(choice) for choice in problem.meta["choices"]]


def slots(prompt, continuations):
    """Tokens that a forward over a prompt and its continuations takes: a last one is no input."""
    return len(prompt) + sum(len(ids) - 1 for ids in continuations)


def mean_logprobs(engine, tokenizer, problems, progress=None):
    """Problems with meta["choices"] -> of each the mean log-probs of the tokens of its choices.

    A prompt is computed once for all its choices, and problems are packed into one row without
    padding (batch.py), those of like length together. engine.stats says what that took.
    """
    model = engine.learner
    asked = [(prompt_ids(tokenizer, p), choice_ids(tokenizer, p)) for p in problems]
    order = sorted(range(len(asked)), key=lambda i: slots(*asked[i]))
    found, work = [None] * len(asked), Counter()
    for some in in_parts(order, [slots(*one) for one in asked]):
        batch = make_batch([group_of(*asked[i]) for i in some], engine.device)
        with torch.no_grad():
            outputs = learner.forward(model, batch)  # logprobs (S,), choice after choice
        sums = outputs.logprobs.double().split(batch.lengths.tolist())
        means = iter([float(of_choice.mean()) for of_choice in sums])
        for i in some:
            found[i] = [next(means) for _ in asked[i][1]]

        done = dict(tokens=batch.ids.numel(), pairs=outputs.computed_pairs)
        work.update(done, head_tokens=len(batch.targets))
        if progress:
            progress(len(some))
    engine.stats = dict(work={"prefill": work}, prompt_tokens=work["tokens"])
    return found


def in_parts(order, sizes):
    """Numbers in their order -> lists of them, each of TOKENS tokens or one number. sizes: of all.

    [0, 1, 2] of 9,000, 9,000 and 7,000 tokens -> [[0], [1, 2]]
    """
    parts, room = [], 0
    for i in order:
        if sizes[i] > room:
            parts.append([])
            room = TOKENS
        parts[-1].append(i)
        room -= sizes[i]
    return parts


def group_of(prompt, continuations):
    """As if the continuations had been sampled: what batch.py packs."""
    samples = []
    for g, ids in enumerate(continuations):
        unknown = Completion(ids, [0.0] * len(ids), True)  # no sampler gave them log-probs
        samples.append(Sample((0, g), unknown, advantage=0.0, token_weight=0.0))
    return Group(prompt, samples)
