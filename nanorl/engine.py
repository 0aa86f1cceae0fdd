"""The sampler: token ids in, token ids and log-probs out; all samples of all prompts decoded together.

Why it is fast. A decode step reads every weight once, however many rows it serves, so a step for 8 rows costs
about what a step for 256 does. Rows are therefore pooled over all prompts, a row that stops leaves at once and
its place is given to a waiting one, and what the samples of a prompt have in common is stored and read once:

    prompt cache   (L, prompts, K, T_prompt, D)   written by `prefill`, once per prompt
    suffix cache   (L, rows,    K, T_new,    D)   written by `decode`, a column per step

A step's attention has a prompt part (one matrix product per prompt and kv head over all its live samples) and a
suffix part (per row); `merge` joins the two into exactly one softmax.

What decides a token. Sampling is inverse-CDF from a uniform that is a pure function of (prompt key, sample,
position). So a sample does not depend on who shared its batch, on row order, refill or world size: exactly so
in fp64; in fp32 and bf16 the logits' last bits change with the batch's shape, and a token may flip.
"""
import copy
from collections import namedtuple

import numpy as np
import torch

from nanorl.gpt import CausalAttention, scaled, token_logprobs

# ids include the stop token; logprobs has one float per id; finished is False when max_new_tokens cut it off.
Completion = namedtuple("Completion", "ids logprobs finished")


# ---- sampling ---------------------------------------------------------------------------------------------

def _mix(x):
    """splitmix64's finaliser on int64 tensors: multiplication wraps, >> is made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64: keeps 0 from being a fixed point


def row_keys(prompt_keys, samples):
    """(prompt key, sample number), int64 tensors of one shape -> one int64 a row."""
    return _mix(_mix(prompt_keys + _GOLDEN) + samples * _GOLDEN)


def uniforms(keys, positions):
    """(row key, position) -> a float64 in [0, 1): 53 bits of a counter-based generator, no state."""
    return ((_mix(keys + (positions + 1) * _GOLDEN) >> 11) & (2 ** 53 - 1)).double() * 2.0 ** -53


def sample(logits, u, temperature):
    """logits (B, V), u (B,) in [0, 1) -> ids (B,): the first token whose cumulative probability passes u times
    the total. A token of probability zero is never chosen. Temperature 0 is the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    # In fp64, because in fp32 the sum's steps of 6e-8 swallow rare tokens: 15% of 32,768 could never be drawn.
    cdf = scaled(logits, temperature).softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    total = cdf[:, -1]
    point = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point[:, None], right=True).squeeze(-1)


# ---- attention over the two caches ------------------------------------------------------------------------

def _attend(q, k, v, mask):
    """One part of a softmax. q (N, K, m, D), k and v (N, K, t, D), mask (N, 1, 1, t), added to the scores, or None
    -> (outputs (N, K, m, D), log of the sum of exponentials (N, K, m))."""
    if q.device.type == "cpu":  # the kernel behind scaled_dot_product_attention, which also tells the log-sum-exp
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    scores = ((q @ k.transpose(-1, -2)) * q.size(-1) ** -0.5).to(torch.promote_types(q.dtype, torch.float32))  # (N, K, m, t)
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def merge(a, a_lse, b, b_lse):
    """Softmax over the union of two sets of keys, from each set's own softmax output (..., D) and
    log-sum-exp (...) (Flash-Attention's rescaling)."""
    share = torch.sigmoid(a_lse - b_lse)[..., None].to(a.dtype)  # e^a / (e^a + e^b)
    return a * share + b * (1 - share)


def _fill_holes(stay):
    """Which places move where when those not in `stay` (bool, n) leave: (holes, movers), equally long; after
    moving movers[i] to holes[i] the places 0 .. stay.sum()-1 are the ones that stay."""
    n = stay.sum()
    return np.flatnonzero(~stay[:n]), n + np.flatnonzero(stay[n:])


class _Batch:
    """The rows being decoded and their caches. Rows 0 .. n-1 are live, prompts 0 .. n_prompts-1 are in use; a row
    or prompt that leaves has its place taken by one from the end, so leaving costs one copy however many stay."""

    def __init__(self, model, max_rows, max_prompts, prompt_len, new_tokens):
        c = model.config
        self.device = device = next(model.parameters()).device

        def cache(places, length):  # (L, places, K, length, D)
            return torch.zeros(c.n_layer, places, c.n_kv_head, length, c.head_dim, dtype=model.compute_dtype, device=device)
        self.prompt_k, self.prompt_v = cache(max_prompts, prompt_len), cache(max_prompts, prompt_len)
        self.suffix_k, self.suffix_v = cache(max_rows, new_tokens), cache(max_rows, new_tokens)
        # On the host, one entry a live row; scheduling needs no look at the device.
        self.prompt = np.zeros(0, int)  # which prompt place the row reads
        self.age = np.zeros(0, int)  # tokens sampled so far; the newest is not in the cache yet
        self.output = np.zeros(0, int)  # which row of the result it writes
        self.prompt_lens = np.zeros(0, int)  # one entry a prompt in use
        # On the device, one entry a place.
        self.last = torch.zeros(max_rows, dtype=torch.long, device=device)  # newest token
        self.keys = torch.zeros(max_rows, dtype=torch.long, device=device)  # of the row's random numbers
        self.stopped = torch.zeros(max_rows, dtype=torch.bool, device=device)  # has sampled a stop token

    @property
    def n(self):
        return len(self.age)

    @property
    def n_prompts(self):
        return len(self.prompt_lens)

    def add(self, prompts, output, keys):
        """New rows at the end: for each its prompt place, result row and key."""
        self.keys[self.n:self.n + len(output)] = keys
        self.stopped[self.n:self.n + len(output)] = False
        self.prompt = np.append(self.prompt, prompts)
        self.output = np.append(self.output, output)
        self.age = np.append(self.age, np.zeros(len(output), int))
        self._layout()

    def remove(self, gone):
        """Rows leave (bool, n), and prompts that nobody reads any more leave with them."""
        holes, movers = _fill_holes(~gone)
        if len(holes):
            t = self.age[movers].max()
            for cache in (self.suffix_k, self.suffix_v):
                cache[:, holes, :, :t] = cache[:, movers, :, :t]
            for per_row in (self.last, self.keys, self.stopped, self.prompt, self.age, self.output):
                per_row[holes] = per_row[movers]
        n = len(gone) - gone.sum()
        self.prompt, self.age, self.output = self.prompt[:n], self.age[:n], self.output[:n]

        read = np.isin(np.arange(self.n_prompts), self.prompt)
        holes, movers = _fill_holes(read)
        if len(holes):
            for cache in (self.prompt_k, self.prompt_v):
                cache[:, holes] = cache[:, movers]
            self.prompt_lens[holes] = self.prompt_lens[movers]
            place = np.arange(len(read))
            place[movers] = holes
            self.prompt = place[self.prompt]
        self.prompt_lens = self.prompt_lens[:read.sum()]
        if self.n:
            self._layout()

    def _layout(self):
        """Where each live row sits on the (prompts x most live samples) grid of the prompt part, and device copies
        of what the next steps index with."""
        order = np.argsort(self.prompt, kind="stable")
        count = np.bincount(self.prompt, minlength=self.n_prompts)
        column = np.empty(self.n, int)
        column[order] = np.arange(self.n) - (count.cumsum() - count)[self.prompt[order]]
        self.width = int(count.max())
        on_device = lambda values: torch.as_tensor(values, device=self.device)
        self.cell = on_device(self.prompt * self.width + column)  # (n,)
        self.row_lens = on_device(self.prompt_lens[self.prompt])  # (n,)
        self.ages, self.outputs = on_device(self.age.copy()), on_device(self.output)  # (n,)
        self.t_prompt = int(self.prompt_lens.max())
        self.prompt_mask = self._mask(on_device(self.prompt_lens), self.t_prompt) if self.prompt_lens.min() < self.t_prompt else None

    def _mask(self, lens, t):
        """lens (N,) -> (N, 1, 1, t): 0 for the first lens[i] keys, -inf for the rest."""
        hidden = torch.arange(t, device=self.device) >= lens[:, None]  # (N, t)
        return torch.zeros(hidden.shape, dtype=self.suffix_k.dtype, device=self.device).masked_fill(hidden, float("-inf"))[:, None, None]

    def sampled(self, rows, ids, stops):
        """The live rows `rows` (a slice) have sampled one more token each, ids (n,)."""
        self.last[rows] = ids
        self.stopped[rows] |= torch.isin(ids, stops)
        self.ages[rows] += 1
        self.age[rows] += 1

    def step(self, model):
        """Feed every live row's newest token. Returns logits (n, V)."""
        n, n_prompts, t = self.n, self.n_prompts, int(self.age.max())
        column = self.ages - 1  # (n,) where this token's key and value go
        rows = torch.arange(n, device=self.device)
        mask = self._mask(self.ages, t) if self.age.min() < t else None  # (n, 1, 1, t)

        def attend(layer, q, k, v):  # q (n, 1, H, D), k and v (n, 1, K, D)
            self.suffix_k[layer][rows, :, column] = k[:, 0]
            self.suffix_v[layer][rows, :, column] = v[:, 0]
            K, D = k.shape[2:]
            q = q.view(n, K, -1, D)  # (n, K, H/K, D)
            suffix = _attend(q, self.suffix_k[layer, :n, :, :t], self.suffix_v[layer, :n, :, :t], mask)

            grid = q.new_zeros(n_prompts * self.width, *q.shape[1:])
            grid[self.cell] = q
            grid = grid.view(n_prompts, self.width, *q.shape[1:]).transpose(1, 2)  # (prompts, K, width, H/K, D)
            y, lse = _attend(grid.flatten(2, 3), self.prompt_k[layer, :n_prompts, :, :self.t_prompt],
                             self.prompt_v[layer, :n_prompts, :, :self.t_prompt], self.prompt_mask)
            y = y.view(grid.shape).transpose(1, 2).flatten(0, 1)[self.cell]  # (n, K, H/K, D)
            lse = lse.view(grid.shape[:-1]).transpose(1, 2).flatten(0, 1)[self.cell]  # (n, K, H/K)
            return merge(y, lse, *suffix).reshape(n, 1, -1, D)

        h = model.hidden(self.last[:n, None], (self.row_lens + column)[:, None], attend)  # (n, 1, C)
        return model.head(h[:, 0])


class Engine:
    """`max_rows`: most rows decoded at once, 0 for no limit. `stats` of the last call: `row_steps` (rows times
    decode steps executed), `steps`, `prompt_tokens` prefilled, `new_tokens` kept, `attended` (query, key) pairs,
    `cached` keys read by decode steps, a prompt's once for all its rows."""

    def __init__(self, model, max_rows=0):
        self.learner, self.max_rows, self.stats = model, max_rows, {}
        master = next(model.parameters()).dtype
        self.model = model if model.compute_dtype == master else copy.deepcopy(model).to(model.compute_dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Copy the learner's weights into the sampler's narrower copy; call it after every update."""
        if self.model is not self.learner:
            for mine, theirs in zip(self.model.parameters(), self.learner.parameters()):
                mine.copy_(theirs)

    def bytes_decoded(self):
        """Bytes that the last call's decode steps had to read: every weight once a step, a prompt's cache once a step for all its rows, and each
        row's own. What memory bandwidth bounds, however many rows there are."""
        c, size = self.learner.config, self.learner.compute_dtype.itemsize
        cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * self.stats["cached"]
        return size * (self.stats["steps"] * c.n_params()[1] + cached)

    def bytes_per_row(self, new_tokens):
        """Memory that one more row takes while it is decoded: its suffix cache, as much again for its prompt (which
        rows of a group share), and some fp32 copies of its logits."""
        c = self.learner.config
        token = 2 * c.n_layer * c.n_kv_head * c.head_dim * self.learner.compute_dtype.itemsize
        return 2 * new_tokens * token + 5 * 4 * c.n_tokens

    def _prefill(self, batch, prompts):
        """Prompts (lists of ids) into the next free places of the prompt cache -> logits after each, (p, V)."""
        first, lens = batch.n_prompts, [len(p) for p in prompts]
        ids = torch.tensor([p + [0] * (max(lens) - len(p)) for p in prompts], device=batch.device)  # (p, T)
        causal = CausalAttention()

        def attend(layer, q, k, v):
            places = (layer, slice(first, first + len(prompts)), slice(None), slice(max(lens)))
            batch.prompt_k[places], batch.prompt_v[places] = k.transpose(1, 2), v.transpose(1, 2)
            return causal(layer, q, k, v)
        h = self.model.hidden(ids, attend=attend)  # (p, T, C)
        batch.prompt_lens = np.append(batch.prompt_lens, lens)
        self.stats["prompt_tokens"] += sum(lens)
        self.stats["attended"] += sum(n * (n + 1) // 2 for n in lens)
        last = torch.tensor(lens, device=batch.device) - 1
        return self.model.head(h[torch.arange(len(lens), device=batch.device), last])

    @torch.inference_mode()
    def generate(self, prompts, samples_per_prompt=1, max_new_tokens=256, temperature=1.0, stop_ids=(), keys=None,
                 prefill_tokens=16384, progress=None):
        """Sample G completions for each of P prompts (lists of ids, any lengths). Returns P lists of G Completions.

        keys: one integer a prompt (default 0 .. P-1), which with the sample number and the position fixes the
        random numbers. Prefill runs over at most `prefill_tokens` padded tokens at a time. progress: called with
        the number of completions done since its last call. Raises ValueError for an empty prompt, one too long
        for the context, or fewer places than samples."""
        P, G, N = len(prompts), samples_per_prompt, max_new_tokens
        self._check(prompts, G, N)
        self.stats = dict(row_steps=0, steps=0, prompt_tokens=0, new_tokens=0, attended=0, cached=0)
        if P == 0:
            return []
        device = next(self.model.parameters()).device
        keys = torch.tensor(list(range(P) if keys is None else keys), dtype=torch.long, device=device)  # (P,)
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        look_every = 1 if device.type == "cpu" else 8  # each look for stopped rows makes the host wait for the GPU
        precision = torch.float64 if self.model.compute_dtype == torch.float64 else torch.float32
        out_ids = torch.zeros(P * G, N, dtype=torch.long, device=device)  # (P*G, N), as out_logprobs
        out_logprobs = torch.zeros(P * G, N, dtype=precision, device=device)
        places = min(P * G, self.max_rows or P * G)
        # Stragglers keep their prompt's cache, so there are places for twice the prompts that fill the rows.
        prompt_places = min(P, places // G * (1 if G == 1 else 2))
        batch = _Batch(self.model, places, prompt_places, max(map(len, prompts)), N)

        def take(rows, logits):
            """One more token for the live rows `rows` (a slice) from their logits (n, V), written down with its log-prob."""
            ages, outputs = batch.ages[rows], batch.outputs[rows]
            ids = sample(logits, uniforms(batch.keys[rows], ages), temperature)  # (n,)
            out_ids[outputs, ages] = ids
            out_logprobs[outputs, ages] = token_logprobs(logits, ids, temperature or 1.0)
            batch.sampled(rows, ids, stops)

        started = 0  # prompts 0 .. started-1 have been given places
        while started < P or batch.n:
            free = min((places - batch.n) // G, prompt_places - batch.n_prompts)  # groups that fit
            # Waiting groups come in when an eighth of the places is free: one by one, each would cost a prefill.
            if started < P and free and (batch.n == 0 or 8 * free * G >= places):
                come = prompts[started:started + free]
                come = come[:max(1, prefill_tokens // max(map(len, come)))]
                old_rows, old_prompts = batch.n, batch.n_prompts
                logits = self._prefill(batch, come)  # (p, V)
                output = np.arange(started * G, (started + len(come)) * G)
                prompt, number = np.divmod(output, G)
                batch.add(old_prompts + prompt - started, output,
                          row_keys(keys[prompt], torch.as_tensor(number, device=device)))
                take(slice(old_rows, batch.n), logits.repeat_interleave(G, dim=0))
                started += len(come)
            else:
                logits = batch.step(self.model)  # (n, V)
                self.stats["steps"] += 1
                self.stats["row_steps"] += batch.n
                self.stats["attended"] += int(batch.age.sum() + batch.prompt_lens[batch.prompt].sum())
                self.stats["cached"] += int(batch.age.sum() + batch.prompt_lens.sum())
                take(slice(0, batch.n), logits)
            gone = batch.age >= N  # (n,) bool
            if self.stats["steps"] % look_every == 0:
                gone |= batch.stopped[:batch.n].cpu().numpy()
            if gone.any():
                batch.remove(gone)
                if progress:
                    progress(int(gone.sum()))
        return self._collect(out_ids.tolist(), out_logprobs.tolist(), P, G, set(stop_ids))

    def _check(self, prompts, G, N):
        if G < 1 or N < 1:
            raise ValueError(f"samples_per_prompt is {G} and max_new_tokens is {N}: both must be at least 1")
        if self.max_rows and self.max_rows < G:
            raise ValueError(f"device_rows is {self.max_rows}: it must hold one group, samples_per_prompt = {G}")
        for p in prompts:
            if not p:
                raise ValueError("a prompt has no tokens")
            if len(p) + N > self.model.config.context:
                raise ValueError(f"a prompt of {len(p)} tokens and max_new_tokens = {N} do not fit the model's context of "
                                 f"{self.model.config.context}: lower --max_new_tokens or shorten the prompt")

    def _collect(self, ids, logprobs, P, G, stops):
        result = []
        for row_ids, row_logprobs in zip(ids, logprobs):
            end = next((i + 1 for i, id in enumerate(row_ids) if id in stops), None)  # the stop token is kept
            n = end or len(row_ids)
            self.stats["new_tokens"] += n
            result.append(Completion(row_ids[:n], row_logprobs[:n], end is not None))
        return [result[p * G:(p + 1) * G] for p in range(P)]
