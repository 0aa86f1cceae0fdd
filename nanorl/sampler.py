"""The sampler, plainly: every sample of every prompt is decoded together, one token a step.

engine.py does the same, faster. It stores a prompt's keys and values once for all its samples, lets
rows that have stopped leave, and takes waiting prompts in. This file is the text to read first, and
the reference that the engine is tested against: in fp64 both give the same ids.

The letters are gpt.py's: P prompts, G samples of each, B = P*G rows, K key/value heads, D head dim.
"""

import torch
import torch.nn.functional as F

from nanorl.sampling import completion, row_keys, sample, uniforms


@torch.inference_mode()
def generate(
    model,
    prompts,
    samples_per_prompt=1,
    max_new_tokens=256,
    temperature=1.0,
    stop_ids=(),
    keys=None,
):
    """Sample G completions for each of P prompts (lists of ids, of any lengths).

    keys: one integer a prompt. With the sample's number and the position it fixes the random
    numbers. Returns P lists of G Completions (ids with the stop token, their log-probs, finished).
    """
    P, G = len(prompts), samples_per_prompt
    device = model.cos.device
    keys = torch.tensor(range(P) if keys is None else keys, device=device)  # (P,)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)

    # Put the prompts into one rectangle, padded on the right.
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (P,)
    longest = int(lengths.max())
    ids = torch.zeros(P, longest, dtype=torch.long, device=device)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt, device=device)

    # Prefill: run each prompt once, and keep the keys and values of its tokens.
    cache = Cache(longest + max_new_tokens)
    h = model.hidden(ids, attend=cache.prefill)  # (P, longest, C)
    h = h[torch.arange(P, device=device), lengths - 1]  # (P, C), of each prompt's last token

    # From here on there are G rows a prompt.
    h, lengths = h.repeat_interleave(G, dim=0), lengths.repeat_interleave(G)  # (B, C), (B,)
    cache.repeat(G)
    sample_number = torch.arange(G, device=device).repeat(P)  # (B,)
    row_key = row_keys(keys.repeat_interleave(G), sample_number)  # (B,)

    tokens = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(P * G, max_new_tokens, dtype=torch.float64, device=device)
    stopped = torch.zeros(P * G, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        # Draw a token for every row from the softmax of its logits.
        u = uniforms(row_key, torch.full_like(row_key, t))  # (B,) in [0, 1)
        tokens[:, t], logprobs[:, t] = sample(model.head(h), u, temperature)
        stopped |= torch.isin(tokens[:, t], stops)
        if stopped.all() or t == max_new_tokens - 1:
            break

        # Feed it back. It stands right after its row's prompt and earlier tokens.
        cache.see(lengths, longest, t)
        positions = lengths + t  # (B,)
        newest = tokens[:, t : t + 1]  # (B, 1)
        h = model.hidden(newest, positions[:, None], cache.decode)[:, 0]  # (B, C)

    token_rows = tokens[:, : t + 1].tolist()
    logprob_rows = logprobs[:, : t + 1].tolist()
    completions = [completion(*row, stop_ids) for row in zip(token_rows, logprob_rows)]
    return [completions[p * G : (p + 1) * G] for p in range(P)]


class Cache:
    """Keys and values of all tokens so far, (B, length, K, D) a layer: prompts, then new tokens.

    prefill and decode are what GPT.hidden calls for its attention.
    """

    def __init__(self, length):
        self.length, self.keys, self.values = length, [], []

    def prefill(self, _layer, q, k, v):
        """Causal attention over the prompts, (P, longest, heads, D). No token sees the padding."""
        room = (0, 0, 0, 0, 0, self.length - k.size(1))  # zeros after the last token
        self.keys.append(F.pad(k, room))
        self.values.append(F.pad(v, room))
        return attention(q, k, v, is_causal=True)

    def repeat(self, G):
        """From one row a prompt to G."""
        self.keys = [k.repeat_interleave(G, dim=0) for k in self.keys]
        self.values = [v.repeat_interleave(G, dim=0) for v in self.values]

    def see(self, lengths, longest, t):
        """Say what the token t that is fed next may see, (B, 1, 1, length), and where it goes."""
        slot = torch.arange(self.length, device=lengths.device)
        in_prompt = slot < lengths[:, None]  # (B, length)
        new = (slot >= longest) & (slot <= longest + t)  # (length,), itself included
        self.visible = (in_prompt | new)[:, None, None]
        self.column = longest + t

    def decode(self, layer, q, k, v):
        """One new token a row, (B, 1, heads, D): keep it, then look at all that is visible."""
        self.keys[layer][:, self.column] = k[:, 0]
        self.values[layer][:, self.column] = v[:, 0]
        return attention(q, self.keys[layer], self.values[layer], attn_mask=self.visible)


def attention(q, k, v, **mask):
    """softmax(q k / sqrt(D)) v; torch wants the heads before the time."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)
