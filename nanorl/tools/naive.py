"""The obvious way to sample and to learn, for the benchmark to measure against: every row has its own copy of its prompt's cache, no row leaves
before the last is done, the learner runs each completion with its whole prompt and computes the logits of every position."""

from collections import namedtuple

import torch
import torch.nn.functional as F

from nanorl.gpt import scaled

Sampled = namedtuple("Sampled", "ids")  # as much of a Completion as learning needs


class _Cache:
    """Keys and values of all rows so far, (rows, K, T, D) a layer; an `attend` for GPT.hidden."""

    def __init__(self, model, rows, length):
        c, device = model.config, next(model.parameters()).device
        self.k, self.v = (
            torch.zeros(
                c.n_layer,
                rows,
                c.n_kv_head,
                length,
                c.head_dim,
                dtype=model.compute_dtype,
                device=device,
            )
            for _ in "kv"
        )
        self.length = 0

    def __call__(self, layer, q, k, v):
        end = self.length + k.size(1)
        self.k[layer, :, :, self.length : end], self.v[layer, :, :, self.length : end] = (
            k.transpose(1, 2),
            v.transpose(1, 2),
        )
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            self.k[layer, :, :, :end],
            self.v[layer, :, :, :end],
            is_causal=self.length == 0,
            enable_gqa=q.size(2) != k.size(2),
        ).transpose(1, 2)


@torch.inference_mode()
def generate(model, prompts, samples, new_tokens, stop_ids=()):
    """Prompts of one length (P lists of ids) -> sampled ids (P * samples, <= new_tokens) and how many tokens up to each row's stop token these are."""
    device = next(model.parameters()).device
    first, cache = (
        _Cache(model, len(prompts), len(prompts[0])),
        _Cache(model, len(prompts) * samples, len(prompts[0]) + new_tokens),
    )
    h = model.hidden(torch.tensor(prompts, device=device), attend=first)[:, -1].repeat_interleave(
        samples, 0
    )  # (rows, C)
    for whole, prompt in ((cache.k, first.k), (cache.v, first.v)):
        whole[:, :, :, : first.k.size(3)] = prompt.repeat_interleave(samples, 1)
    cache.length = len(prompts[0])
    stops, ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device), []
    running, kept = (
        torch.ones(len(h), dtype=torch.bool, device=device),
        torch.zeros(len(h), dtype=torch.long, device=device),
    )
    for number in range(new_tokens):
        probabilities = scaled(model.head(h), 1.0).softmax(-1)  # (rows, V)
        ids.append(torch.multinomial(probabilities, 1))  # (rows, 1)
        probabilities.gather(1, ids[-1]).log()  # the log-prob
        kept += running
        running &= ~torch.isin(ids[-1][:, 0], stops)
        if not running.any() or number == new_tokens - 1:
            break
        at = torch.full_like(ids[-1], cache.length)
        h = model.hidden(ids[-1], at, cache)[:, 0]
        cache.length += 1
    return torch.cat(ids, 1), int(kept.sum())


def learn(model, rollouts, advantages, rows_at_once):
    """Forward and backward of REINFORCE over the Rollouts' completions, so many rows at a time, padded to the longest."""
    rows = [
        (r.prompt_ids, c.ids, float(a))
        for r, group in zip(rollouts, advantages)
        for c, a in zip(r.completions, group)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    total, device = sum(len(ids) for _, ids, _ in rows), next(model.parameters()).device
    for some in (rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)):
        length = max(len(prompt) + len(ids) for prompt, ids, _ in some)
        ids = torch.tensor(
            [prompt + ids + [0] * (length - len(prompt) - len(ids)) for prompt, ids, _ in some],
            device=device,
        )  # (rows, T)
        weights = torch.tensor(
            [
                [0.0] * (len(p) - 1) + [a] * len(x) + [0.0] * (length - len(p) - len(x))
                for p, x, a in some
            ],
            device=device,
        )  # (rows, T - 1)
        logprobs = scaled(model(ids[:, :-1]), 1.0).log_softmax(-1)  # (rows, T - 1, V)
        (-(logprobs.gather(-1, ids[:, 1:, None])[..., 0] * weights).sum() / total).backward()
