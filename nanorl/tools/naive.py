"""The obvious way to sample and to learn, for the benchmark to measure against.

Every row has its own copy of its prompt's cache, and no row leaves before the last is done. The
learner runs each completion with its whole prompt, and computes the logits of every position. The
letters are gpt.py's.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F

from nanorl.gpt import scaled

Sampled = namedtuple("Sampled", "ids")  # as much of a Completion as learning needs


class Cache:
    """Keys and values of all rows so far, (L, rows, K, T, D); an `attend` for GPT.hidden."""

    def __init__(self, model, rows, length):
        """length: most tokens of a row."""
        config, device = model.config, next(model.parameters()).device
        shape = (config.n_layer, rows, config.n_kv_head, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.compute_dtype, device=device)
        self.values = torch.zeros(shape, dtype=model.compute_dtype, device=device)
        self.length = 0  # tokens of each row that are in it

    def __call__(self, layer, q, k, v):
        """q (rows, T, H, D), k and v (rows, T, K, D) of T new tokens -> (rows, T, H, D)."""
        # Keep the new tokens. The cache has the heads before the time, as torch wants them.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        start, end = self.length, self.length + k.size(2)
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v

        # A prompt's tokens see those before them. A token that comes alone sees all there are.
        keys = self.keys[layer, :, :, :end]  # (rows, K, end, D)
        values = self.values[layer, :, :, :end]
        layout = dict(is_causal=start == 0, enable_gqa=q.size(1) != k.size(1))
        y = F.scaled_dot_product_attention(q, keys, values, **layout)  # (rows, H, T, D)
        return y.transpose(1, 2)


@torch.inference_mode()
def generate(model, prompts, samples, new_tokens, stop_ids=()):
    """Prompts of one length (P lists of ids) -> sampled ids (P * G, at most new_tokens), kept.

    kept: how many of the ids stand before, or are, their row's first stop token.
    """
    device = next(model.parameters()).device
    prompt_length, rows = len(prompts[0]), len(prompts) * samples

    # Prefill each prompt once, and copy its cache for each of its samples.
    prompt_cache = Cache(model, len(prompts), prompt_length)
    cache = Cache(model, rows, prompt_length + new_tokens)
    ids = torch.tensor(prompts, device=device)  # (P, T)
    h = model.hidden(ids, attend=prompt_cache)  # (P, T, C)
    h = h[:, -1].repeat_interleave(samples, 0)  # (rows, C)
    cache.keys[:, :, :, :prompt_length] = prompt_cache.keys.repeat_interleave(samples, 1)
    cache.values[:, :, :, :prompt_length] = prompt_cache.values.repeat_interleave(samples, 1)
    cache.length = prompt_length

    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    kept = torch.zeros(rows, dtype=torch.long, device=device)
    sampled = []
    for number in range(new_tokens):
        probabilities = scaled(model.head(h), 1.0).softmax(-1)  # (rows, V)
        newest = torch.multinomial(probabilities, 1)  # (rows, 1)
        sampled.append(newest)
        # The log-prob. A trainer would keep it; here it only takes its time.
        probabilities.gather(1, newest).log()

        kept += running
        running &= ~torch.isin(newest[:, 0], stops)
        if not running.any() or number == new_tokens - 1:
            break
        positions = torch.full_like(newest, cache.length)  # (rows, 1)
        h = model.hidden(newest, positions, cache)[:, 0]  # (rows, C)
        cache.length += 1
    return torch.cat(sampled, 1), int(kept.sum())


def learn(model, rollouts, advantages, rows_at_once):
    """Forward and backward of REINFORCE over the Rollouts' completions.

    advantages: P lists of G numbers. So many rows are run at a time, padded to the longest.
    """
    rows = []
    for rollout, group_advantages in zip(rollouts, advantages):
        for completion, advantage in zip(rollout.completions, group_advantages):
            rows.append((rollout.prompt_ids, completion.ids, float(advantage)))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))

    N = sum(len(completion_ids) for _, completion_ids, _ in rows)
    for start in range(0, len(rows), rows_at_once):
        ids, weights = padded(rows[start : start + rows_at_once], model)  # (rows, T), (rows, T - 1)
        logprobs = scaled(model(ids[:, :-1]), 1.0).log_softmax(-1)  # (rows, T - 1, V)
        logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0]  # (rows, T - 1)
        loss = -(logprobs * weights).sum() / N
        loss.backward()


def padded(rows, model):
    """(prompt ids, completion ids, advantage) of some rows -> ids (rows, T), weights (rows, T - 1).

    A weight is what the log-prob of the next token counts: the advantage where that is the
    completion's, else 0.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    ids, weights = [], []
    for prompt, completion, advantage in rows:
        padding = longest - len(prompt) - len(completion)
        ids.append(prompt + completion + [0] * padding)
        of_prompt = [0.0] * (len(prompt) - 1)
        of_completion = [advantage] * len(completion)
        weights.append(of_prompt + of_completion + [0.0] * padding)
    device = next(model.parameters()).device
    return torch.tensor(ids, device=device), torch.tensor(weights, device=device)
