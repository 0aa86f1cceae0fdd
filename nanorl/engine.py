"""The sampler: token ids in, token ids and log-probs out; all samples of all prompts decoded together.

Why it is fast. A decode step reads every weight once, however many rows it serves, so a step for 8 rows costs
about what a step for 256 does. Rows are therefore pooled over all prompts, a row that stops leaves at once and
its place is given to a waiting one, and what the samples of a prompt have in common is stored and read once:

    prompt cache   (L, prompts, K, T_prompt, D)   written by `prefill`, once per prompt
    suffix cache   (L, rows,    K, T_new,    D)   written by `decode`, a column per step

A step's attention has a prompt part (one matrix product per prompt and kv head over all its live samples) and a
suffix part (per row); `merge` joins the two into exactly one softmax. On a GPU a step is one replay of a CUDA graph.
"""
import copy
from collections import Counter, namedtuple

import numpy as np
import torch

from nanorl.attention import CausalAttention
from nanorl.gpt import LOGITS_AT_ONCE, all_logprobs
from nanorl.sampling import row_keys, sample, uniforms

# ids include the stop token; logprobs has one float per id; finished is False when max_new_tokens cut it off.
Completion = namedtuple("Completion", "ids logprobs finished")

COLUMNS = 32  # by which the suffix caches grow at least
SAMPLED = 2 ** 20  # logits that are sampled from at once on a CPU: as many as stay in its cache


# ---- attention over the two caches ------------------------------------------------------------------------

def _attend(q, k, v, mask):
    """One part of a softmax. q (N, K, m, D), k and v (N, K, t, D), mask (N, 1, 1, t), added to the scores, or None
    -> (outputs (N, K, m, D), log of the sum of exponentials (N, K, m)). In bf16 the scores are rounded to it, as products of bf16 are."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.size(-1) ** -0.5  # (N, K, m, t)
    scores = scores if mask is None else scores + mask
    top = scores.amax(-1, keepdim=True)
    scores = (scores - top).exp()
    total = scores.sum(-1, keepdim=True)
    return (scores / total).to(v.dtype) @ v, (top + total.log()).squeeze(-1)


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


def _columns(age):
    """Columns of the suffix caches while the oldest row has this age: up in steps of COLUMNS, and from an age of 256 on of an eighth to a quarter of it, so
    that all the copying together is a few times the final size."""
    step = max(COLUMNS, 1 << max(age.bit_length() - 3, 0))
    return -(-age // step) * step


def _bucket(n, most):
    """The least of most/4, most/2, 3/4 most and most that holds n."""
    return next(size for size in (-(-most * i // 4) for i in (1, 2, 3, 4)) if size >= n)


class _Batch:
    """The rows being decoded and their caches. Rows 0 .. n-1 are live, prompts 0 .. n_prompts-1 are in use; a row
    or prompt that leaves has its place taken by one from the end, so leaving costs one copy however many stay.

    fixed_shapes: a step works on one of 16 shapes (4 numbers of rows x 4 lengths), whose further rows and columns change nothing, so that a
    CUDA graph of each can be replayed; else on just what is live."""

    def __init__(self, model, rows, prompts, prompt_len, samples, new_tokens, temperature, stop_ids, fixed_shapes):
        c = model.config
        self.model, self.samples, self.temperature, self.fixed_shapes = model, samples, temperature, fixed_shapes
        self.device = device = next(model.parameters()).device

        def cache(places, length):  # of each layer (places, K, length, D)
            return [torch.zeros(places, c.n_kv_head, length, c.head_dim, dtype=model.compute_dtype, device=device) for _ in range(c.n_layer)]
        self.prompt_k, self.prompt_v = cache(prompts, prompt_len), cache(prompts, prompt_len)
        columns = new_tokens if fixed_shapes else min(COLUMNS, new_tokens)
        self.suffix_k, self.suffix_v = cache(rows, columns), cache(rows, columns)
        # On the device, one entry a place: what a step reads and writes.
        integers = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=device)
        self.ids = integers(rows, new_tokens)  # tokens sampled so far ...
        self.logprobs = torch.zeros(rows, new_tokens, dtype=torch.promote_types(model.compute_dtype, torch.float32), device=device)
        self.keys = integers(rows)  # of the row's random numbers
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)  # has sampled a stop token
        self.ages, self.row_lens = integers(rows), integers(rows)  # tokens sampled so far, and in the prompt
        self.cell, self.row_at = integers(rows), integers(prompts * samples)  # a row's place on the grid of the prompt part, and the row in each
        self.lens = integers(prompts)
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.graphs, self.pool = {}, None
        self.work = {"prefill": Counter(), "decode": Counter()}  # tokens, (query, key) pairs and rows of the head, as they were computed
        self.clear()

    def clear(self):
        # On the host, one entry a live row; scheduling needs no look at the device.
        self.prompt = np.zeros(0, int)  # which prompt place the row reads
        self.age = np.zeros(0, int)  # tokens sampled so far; the newest is not in the cache yet
        self.output = np.zeros(0, int)  # which row of the result it is
        self.prompt_lens = np.zeros(0, int)  # one entry a prompt in use
        for work in self.work.values():
            work.clear()

    @property
    def n(self):
        return len(self.age)

    @property
    def n_prompts(self):
        return len(self.prompt_lens)

    @property
    def places(self):
        return len(self.keys), len(self.lens), self.prompt_k[0].size(2)  # rows, prompts, tokens of a prompt

    # ---- who is decoded

    def add(self, prompts, output, keys):
        """New rows at the end: for each its prompt place, result row and key."""
        self.keys[self.n:self.n + len(output)] = keys
        self.stopped[self.n:self.n + len(output)] = False
        self.prompt = np.append(self.prompt, prompts)
        self.output = np.append(self.output, output)
        self.age = np.append(self.age, np.zeros(len(output), int))
        self._layout()

    def remove(self, gone):
        """Rows leave (bool, n), and prompts that nobody reads any more leave with them. Returns of each that leaves its result row, ids and log-probs."""
        places, = self._on_device(np.flatnonzero(gone))
        left = list(zip(self.output[gone].tolist(), self.ids[places].tolist(), self.logprobs[places].tolist()))
        holes, movers = _fill_holes(~gone)
        if len(holes):
            to, of, t = *self._on_device(holes, movers), self.age[movers].max()
            for cache in (*self.suffix_k, *self.suffix_v):
                cache[to, :, :t] = cache[of, :, :t]
            for per_row in (self.ids, self.logprobs, self.keys, self.stopped):
                per_row[to] = per_row[of]
            for per_row in (self.prompt, self.age, self.output):
                per_row[holes] = per_row[movers]
        n = len(gone) - gone.sum()
        self.prompt, self.age, self.output = self.prompt[:n], self.age[:n], self.output[:n]

        read = np.isin(np.arange(self.n_prompts), self.prompt)
        holes, movers = _fill_holes(read)
        if len(holes):
            to, of = self._on_device(holes, movers)
            for cache in (*self.prompt_k, *self.prompt_v):
                cache[to] = cache[of]
            self.prompt_lens[holes] = self.prompt_lens[movers]
            place = np.arange(len(read))
            place[movers] = holes
            self.prompt = place[self.prompt]
        self.prompt_lens = self.prompt_lens[:read.sum()]
        if self.n:
            self._layout()
        return left

    def _on_device(self, *arrays):
        return [torch.from_numpy(array).to(self.device) for array in arrays]

    def _layout(self):
        """Put each live row on the (prompts x most live samples) grid of the prompt part, and tell the device. Places that are not live get values that
        harm nothing: they read row 0 and are never older than the oldest live row."""
        order = np.argsort(self.prompt, kind="stable")
        count = np.bincount(self.prompt, minlength=self.n_prompts)
        column = np.empty(self.n, int)
        column[order] = np.arange(self.n) - (count.cumsum() - count)[self.prompt[order]]
        self.width = self.samples if self.fixed_shapes else int(count.max())
        cell = self.prompt * self.width + column
        row_at = np.zeros(len(self.row_at), int)
        row_at[cell] = np.arange(self.n)
        for buffer, values, other in ((self.cell, cell, 0), (self.row_at, row_at, 0), (self.lens, self.prompt_lens, 1),
                                      (self.row_lens, self.prompt_lens[self.prompt], 0), (self.ages, self.age, 1)):
            buffer.copy_(torch.from_numpy(np.pad(values, (0, len(buffer) - len(values)), constant_values=other)))

    # ---- a token more for every row

    def take(self, rows, h):
        """Sample a token for the rows `rows` (a slice) from their activations h (n, C), and write it down with its log-prob."""
        ages = self.ages[rows]  # (n,)
        at_once, u, drawn = max(1, LOGITS_AT_ONCE[h.device.type] // self.model.config.n_tokens), uniforms(self.keys[rows], ages), []
        sampled = max(1, SAMPLED // self.model.config.n_tokens) if h.device.type == "cpu" else at_once
        for h, u in zip(h.split(at_once), u.split(at_once)):
            logits = self.model.head(h)  # (at_once, V)
            drawn += [sample(*part, self.temperature) for part in zip(logits.split(sampled), u.split(sampled))]
        ids, logprobs = (torch.cat(parts) for parts in zip(*drawn))  # (n,), (n,)
        self.ids[rows].scatter_(1, ages[:, None], ids[:, None])
        self.logprobs[rows].scatter_(1, ages[:, None], logprobs[:, None])
        self.stopped[rows] |= (ids[:, None] == self.stops).any(-1)
        self.ages[rows] += 1

    def step(self):
        """Feed every live row's newest token and sample the next."""
        if self.fixed_shapes:
            rows, prompts, t_prompt = self.places
            shape = _bucket(self.n, rows), _bucket(self.age.max(), self.ids.size(1))
            shape = *shape, min(shape[0], prompts), t_prompt, True, None
        else:
            t, t_prompt = min(_columns(int(self.age.max())), self.ids.size(1)), self.prompt_lens.max()
            self._grow(t)
            age = int(self.age[0]) if self.age.min() == self.age.max() else None
            shape = self.n, t, self.n_prompts, t_prompt, self.prompt_lens.min() < t_prompt, age
        if self.device.type != "cuda" or shape not in self.graphs:
            self._step(*shape)
            self.graphs[shape] = None  # a first time without a graph warms the kernels up
        else:
            if self.graphs[shape] is None:
                self.pool, graph = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    self._step(*shape)
                self.graphs[shape] = graph
            self.graphs[shape].replay()
        self.age += 1
        n, t, n_prompts, t_prompt = (int(size) for size in shape[:4])
        self.work["decode"].update(tokens=n, attended=n * t + n_prompts * self.width * t_prompt, head_tokens=n)

    def _step(self, n, t, n_prompts, t_prompt, ragged_prompts, age):
        """The step on the first n rows, t columns of their caches, n_prompts prompts and t_prompt columns of theirs, all on the device. age: of all
        rows, where it is the same (until rows are refilled it is), which is quicker to write at."""
        column = self.ages[:n] - 1  # (n,) where this token's key and value go
        write = (torch.arange(n, device=self.device), slice(None), column) if age is None else (slice(n), slice(None), age - 1)
        mask = self._mask(self.ages[:n if age is None else 1], t) if age != t else None  # (n or 1, 1, 1, t)
        prompt_mask = self._mask(self.lens[:n_prompts], t_prompt) if ragged_prompts else None  # (prompts, 1, 1, t_prompt)
        cell, row_at = self.cell[:n], self.row_at[:n_prompts * self.width]

        def attend(layer, q, k, v):  # q (n, 1, H, D), k and v (n, 1, K, D)
            suffix_k, suffix_v, prompt_k, prompt_v = (cache[layer] for cache in (self.suffix_k, self.suffix_v, self.prompt_k, self.prompt_v))
            suffix_k[write], suffix_v[write] = k[:, 0], v[:, 0]
            K, D = k.shape[2:]
            q = q.view(n, K, -1, D)  # (n, K, H/K, D)
            suffix = _attend(q, suffix_k[:n, :, :t], suffix_v[:n, :, :t], mask)

            grid = q[row_at].view(n_prompts, self.width, *q.shape[1:]).transpose(1, 2)  # (prompts, K, width, H/K, D)
            y, lse = _attend(grid.flatten(2, 3), prompt_k[:n_prompts, :, :t_prompt], prompt_v[:n_prompts, :, :t_prompt], prompt_mask)
            y = y.view(grid.shape).transpose(1, 2).flatten(0, 1)[cell]  # (n, K, H/K, D)
            lse = lse.view(grid.shape[:-1]).transpose(1, 2).flatten(0, 1)[cell]  # (n, K, H/K)
            return merge(y, lse, *suffix).reshape(n, 1, -1, D)

        newest = self.ids[:n].gather(1, column[:, None])  # (n, 1)
        h = self.model.hidden(newest, (self.row_lens[:n] + column)[:, None], attend)  # (n, 1, C)
        self.take(slice(0, n), h[:, 0])

    def _grow(self, columns):
        """Room for so many columns in the suffix caches. They are kept as short as the oldest row, because a product over whole, contiguous caches runs at
        memory's speed and one over their first columns at half of it (docs/log.md); and rows that stop early never take the memory."""
        for caches in (self.suffix_k, self.suffix_v):
            for layer, cache in enumerate(caches):
                t = cache.size(2)
                if t < columns:
                    caches[layer] = cache.new_empty(*cache.shape[:2], columns, cache.size(3))
                    caches[layer][:, :, :t], caches[layer][:, :, t:] = cache, 0  # what is masked must be finite

    def _mask(self, lens, t):
        """lens (N,) -> (N, 1, 1, t): 0 for the first lens[i] keys, -inf for the rest."""
        hidden = torch.arange(t, device=self.device) >= lens[:, None]  # (N, t)
        return torch.zeros(hidden.shape, dtype=self.logprobs.dtype, device=self.device).masked_fill(hidden, float("-inf"))[:, None, None]


class Engine:
    """`max_rows`: most rows decoded at once, 0 for no limit. `stats` of the last call: `live`, rows decoded in each step, `places` there were, and the `work` done; and
    what its completions needed, however it was scheduled: `rows`, `prompt_tokens` prefilled, `new_tokens` kept, `row_steps` (tokens fed to decode steps),
    `attended` (query, key) pairs, `cached` keys for decode steps to read, a prompt's once for all its rows."""

    def __init__(self, model, max_rows=0):
        self.learner, self.max_rows, self.stats = model, max_rows, {}
        master = next(model.parameters()).dtype
        self.model = model if model.compute_dtype == master else copy.deepcopy(model).to(model.compute_dtype)
        self.fixed_shapes = next(model.parameters()).device.type == "cuda"
        self.batch = None  # on a GPU caches and graphs are kept until a call with other settings, such as an evaluation; elsewhere the learner gets the memory
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Copy the learner's weights into the sampler's narrower copy; call it after every update."""
        if self.model is not self.learner:
            for mine, theirs in zip(self.model.parameters(), self.learner.parameters()):
                mine.copy_(theirs)

    def bytes_decoded(self):
        """Bytes that the last call's decode steps had to read: every weight once a step, a prompt's cache once a step for all its rows, and each
        row's own as long as it ran. What memory bandwidth bounds, however many rows there are."""
        c, size = self.learner.config, self.learner.compute_dtype.itemsize
        cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * self.stats["cached"]
        return size * (len(self.stats["live"]) * c.n_params()[1] + cached)

    def flops(self):
        """-> {prefill, decode}, FLOPs of the last call as it ran: whole squares of attention, caches as wide as they were, padding and all."""
        return {part: self.learner.config.flops(w["tokens"], w["attended"], w["head_tokens"]) for part, w in self.stats["work"].items()}

    def causal_flops(self):
        """FLOPs that the last call's completions needed: no padding, and of attention only what a token may see."""
        s = self.stats
        return self.learner.config.flops(s["prompt_tokens"] + s["row_steps"], s["attended"], s["rows"] + s["row_steps"])

    def bytes_per_row(self, new_tokens):
        """Memory that one more row takes while it is decoded: its suffix cache, and as much again for its prompt (which
        rows of a group share)."""
        c = self.learner.config
        return 4 * new_tokens * c.n_layer * c.n_kv_head * c.head_dim * self.learner.compute_dtype.itemsize

    def _places(self, prompts, G, *settings):
        """A batch with room for these prompts' rows, or as many as max_rows allows."""
        rows = min(len(prompts) * G, self.max_rows or len(prompts) * G)
        # Stragglers keep their prompt's cache, so there are places for twice the prompts that fill the rows.
        need = rows, min(len(prompts), rows // G * (1 if G == 1 else 2)), max(map(len, prompts))
        if self.fixed_shapes:
            need = *need[:2], -(-need[2] // 64) * 64
            if self.batch and self.settings == (G, *settings):
                if all(a <= b for a, b in zip(need, self.batch.places)):
                    self.batch.clear()
                    return self.batch
                need = tuple(map(max, need, self.batch.places))
        self.batch = None  # its memory, before more is taken
        batch = _Batch(self.model, *need, G, *settings, self.fixed_shapes)
        if self.fixed_shapes:
            self.batch, self.settings = batch, (G, *settings)
        return batch

    def _prefill(self, batch, prompts):
        """Prompts (lists of ids) into the next free places of the prompt cache -> activations at the end of each, (p, C)."""
        first, lens = batch.n_prompts, [len(p) for p in prompts]
        ids = torch.tensor([p + [0] * (max(lens) - len(p)) for p in prompts], device=batch.device)  # (p, T)
        causal = CausalAttention()

        def attend(layer, q, k, v):
            places = (slice(first, first + len(prompts)), slice(None), slice(max(lens)))
            batch.prompt_k[layer][places], batch.prompt_v[layer][places] = k.transpose(1, 2), v.transpose(1, 2)
            return causal(layer, q, k, v)
        h = self.model.hidden(ids, attend=attend)  # (p, T, C)
        batch.prompt_lens = np.append(batch.prompt_lens, lens)
        batch.work["prefill"].update(tokens=ids.numel(), attended=ids.numel() * ids.size(1), head_tokens=len(prompts) * batch.samples)
        last = torch.tensor(lens, device=batch.device) - 1
        return h[torch.arange(len(lens), device=batch.device), last]

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
        if P == 0:
            self.stats = dict(live=[], places=0, work={}, **_needed([], []))
            return []
        stop_ids = frozenset(stop_ids)
        batch = self._places(prompts, G, N, temperature, stop_ids)
        places, prompt_places, _ = batch.places
        live = []  # rows decoded in each step
        keys = torch.tensor(list(range(P) if keys is None else keys), dtype=torch.long, device=batch.device)  # (P,)
        look_every = 8 if self.fixed_shapes else 1  # on a GPU each look for stopped rows makes the host wait for the GPU
        done = [None] * (P * G)

        started = 0  # prompts 0 .. started-1 have been given places
        while started < P or batch.n:
            free = min((places - batch.n) // G, prompt_places - batch.n_prompts)  # groups that fit
            # Waiting groups come in when an eighth of the places is free: one by one, each would cost a prefill.
            if started < P and free and (batch.n == 0 or 8 * free * G >= places):
                come = prompts[started:started + free]
                come = come[:max(1, prefill_tokens // max(map(len, come)))]
                old_rows, old_prompts = batch.n, batch.n_prompts
                h = self._prefill(batch, come)  # (p, C)
                output = np.arange(started * G, (started + len(come)) * G)
                prompt, number = np.divmod(output, G)
                batch.add(old_prompts + prompt - started, output, row_keys(keys[prompt], torch.as_tensor(number, device=batch.device)))
                batch.take(slice(old_rows, batch.n), h.repeat_interleave(G, dim=0))
                batch.age[old_rows:] += 1
                started += len(come)
            else:
                batch.step()
                live.append(batch.n)
            gone = batch.age >= N  # (n,) bool
            if len(live) % look_every == 0:
                gone |= batch.stopped[:batch.n].cpu().numpy()
            if gone.any():
                for row, *sampled in batch.remove(gone):
                    done[row] = _completion(*sampled, stop_ids)
                if progress:
                    progress(int(gone.sum()))
        groups = [done[p * G:(p + 1) * G] for p in range(P)]
        self.stats = dict(live=live, places=places, work=batch.work, **_needed(prompts, groups))
        return groups

    @torch.inference_mode()
    def next_logprobs(self, prompts, candidates, batch_tokens=16384, progress=None):
        """Log-probs of the token after each prompt: of candidates[i], a few ids, after prompts[i], a list of ids -> lists of floats. One forward pass for
        all candidates; prompts of like length together, at most `batch_tokens` padded tokens at a time (or one prompt)."""
        order, found, device = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), [None] * len(prompts), next(self.model.parameters()).device
        work, start = Counter(), 0
        while start < len(order):
            longest = len(prompts[order[start]])
            some = order[start:start + max(1, batch_tokens // longest)]
            ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in some], device=device)  # (p, T): a token only looks to its left
            last = torch.tensor([len(prompts[i]) - 1 for i in some], device=device)
            h = self.model.hidden(ids)[torch.arange(len(some), device=device), last]  # (p, C)
            parts = h.split(max(1, LOGITS_AT_ONCE[device.type] // self.model.config.n_tokens))
            for i, logprobs in zip(some, (row for part in parts for row in all_logprobs(self.model.head(part)))):  # (V,)
                found[i] = logprobs[torch.tensor(candidates[i], device=device)].tolist()
            work.update(tokens=ids.numel(), attended=ids.numel() * longest, head_tokens=len(some))
            start += len(some)
            if progress:
                progress(len(some))
        self.stats = dict(live=[], places=0, work={"prefill": work}, **{**_needed(prompts, [[]] * len(prompts)), "rows": len(prompts)})
        return found

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


def _completion(ids, logprobs, stop_ids):
    end = next((i + 1 for i, id in enumerate(ids) if id in stop_ids), None)  # the stop token is kept
    n = end or len(ids)
    return Completion(ids[:n], logprobs[:n], end is not None)


def _needed(prompts, groups):
    """What it takes to sample these completions of these prompts (Engine.stats). A completion's last token is never fed."""
    stats = Counter(rows=0, prompt_tokens=0, new_tokens=0, row_steps=0, attended=0, cached=0)
    for p, fed in ((len(prompt), [len(c.ids) - 1 for c in group]) for prompt, group in zip(prompts, groups)):
        own = sum(n * (n + 1) // 2 for n in fed)  # the n-th token attends to n of its row
        stats.update(rows=len(fed), prompt_tokens=p, new_tokens=sum(fed) + len(fed), row_steps=sum(fed),
                     attended=p * (p + 1) // 2 + p * sum(fed) + own, cached=p * max(fed, default=0) + own)
    return stats
