"""The sampler: token ids in, token ids and log-probs out; all samples of all prompts together.

sampler.py is the same, plainly, and the text to read first. Why this one is faster: a decode step
reads every weight once, however many rows it serves, so a step for 8 rows costs about what one for
256 does. Rows of all prompts are decoded together, a row that stops leaves at once, and a prompt
that waits gets the slots that are free. And a prompt's cache is read once a step for all its rows.

This file decides who is decoded when. What a step does is cache.py's, and how a token is drawn
sampling.py's.
"""

import copy
from collections import Counter

import torch

from nanorl import sampler
from nanorl.cache import Capacity, DecodeAttention, DecodeBatch, Row, Settings, pad
from nanorl.gpt import LOGITS_AT_ONCE, all_logprobs, round_up
from nanorl.gpu import KernelAttention, kernels_serve, put_together
from nanorl.sampling import completion, row_keys

# So many batches, each with its caches and graphs, are kept on a GPU: training's and evaluation's.
KEPT = 2


class Engine:
    """Samples completions from a model.

    model: the learner. Where it computes in a narrower type than its weights have, the engine
    decodes from a copy in that type, and `refresh` brings the copy up to date.
    max_rows: most rows decoded at once, 0 for no limit.

    stats, of the last call: what its completions needed, however it was done (see `needed`), and
        live     rows decoded in each step
        row_slots    how many rows fit
        work     {prefill, decode}: what was computed, in the terms of report/cost.py
    """

    def __init__(self, model, max_rows=0):
        self.learner, self.max_rows, self.stats = model, max_rows, {}
        self.model = model
        if model.compute_dtype != next(model.parameters()).dtype:
            self.model = copy.deepcopy(model).to(model.compute_dtype)
        self.device = next(model.parameters()).device
        self.fixed_shapes = self.device.type == "cuda"

        # On a GPU the same is done in fewer kernels (gpu.py).
        self.attention = DecodeAttention
        if kernels_serve(self.device, model.compute_dtype):
            self.attention = KernelAttention
            if self.model is not self.learner:
                put_together(self.model)

        # On a GPU caches and graphs are kept for calls with the same settings: {settings: batch},
        # the least recently used first. Elsewhere a call gives its memory back, for the learner.
        self.batches = {}
        self.kept = KEPT if self.fixed_shapes else 1
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Copy the learner's weights into the narrower copy. Call it after every update."""
        if self.model is not self.learner:
            for mine, theirs in zip(self.model.parameters(), self.learner.parameters()):
                mine.copy_(theirs)

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        samples_per_prompt=1,
        max_new_tokens=256,
        temperature=1.0,
        stop_ids=(),
        keys=None,
        prefill_tokens=16384,
        progress=None,
    ):
        """Sample G completions for each of P prompts (lists of ids, of any lengths).

        keys: one integer a prompt (default 0 .. P-1). With the sample's number and the position it
        fixes the random numbers.
        prefill_tokens: most prompt tokens, padding and all, that are run at once.
        progress: called with the number of completions done since its last call.

        Returns P lists of G Completions. Raises ValueError for an empty prompt, one that is too
        long for the context, or a max_rows below G.
        """
        P, G = len(prompts), samples_per_prompt
        settings = Settings(G, max_new_tokens, temperature, frozenset(stop_ids))
        self._check(prompts, settings)
        if P == 0:
            self.stats = dict(live=[], row_slots=0, work={}, **needed([], []))
            return []
        batch = self._batch_for(prompts, settings)
        keys = list(range(P) if keys is None else keys)
        keys = torch.tensor(keys, dtype=torch.long, device=self.device)  # (P,)

        completions = [None] * (P * G)
        started = 0  # prompts 0 .. started-1 have been admitted
        live = []
        while started < P or batch.rows:
            # Prompts that wait come in as soon as there is room. Else each row gets a token more.
            room = self._room(batch)
            if started < P and room:
                coming = prompts[started : started + room]
                coming = coming[: max(1, prefill_tokens // max(map(len, coming)))]
                self._admit(batch, coming, started, keys)
                started += len(coming)
            else:
                batch.step()
                live.append(len(batch.rows))

            # Rows that are done leave. Their slots are free for those that wait.
            gone = self._gone(batch, len(live))
            if any(gone):
                for row, ids, logprobs in batch.remove(gone):
                    completions[row] = completion(ids, logprobs, settings.stop_ids)
                if progress:
                    progress(sum(gone))

        groups = [completions[p * G : (p + 1) * G] for p in range(P)]
        done = dict(live=live, row_slots=batch.capacity.row_slots, work=batch.work)
        self.stats = {**done, **needed(prompts, groups)}
        return groups

    def _check(self, prompts, settings):
        """Raise ValueError, in the user's words, for what cannot be sampled."""
        G, new_tokens = settings.samples, settings.new_tokens
        if G < 1 or new_tokens < 1:
            raise ValueError(
                f"samples_per_prompt is {G} and max_new_tokens is {new_tokens}: "
                f"both must be at least 1"
            )
        if self.max_rows and self.max_rows < G:
            raise ValueError(
                f"device_rows is {self.max_rows}: it must hold one group, samples_per_prompt = {G}"
            )
        context = self.model.config.context
        for prompt in prompts:
            if not prompt:
                raise ValueError("a prompt has no tokens")
            if len(prompt) + new_tokens > context:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and max_new_tokens = {new_tokens} do not "
                    f"fit the model's context of {context}: lower --max_new_tokens or shorten "
                    f"the prompt"
                )

    def _batch_for(self, prompts, settings):
        """An empty batch, with slots for as many of these prompts' rows as max_rows allows."""
        G = settings.samples
        row_slots = len(prompts) * G
        if self.max_rows:
            row_slots = min(row_slots, self.max_rows)

        # A prompt keeps its slot until the last of its rows has left. So that others need not wait
        # for the last, there are slots for twice the prompts that fill the row slots.
        prompt_slots = row_slots // G
        if G > 1:
            prompt_slots *= 2
        need = Capacity(row_slots, min(len(prompts), prompt_slots), max(map(len, prompts)))
        if not self.fixed_shapes:
            return DecodeBatch(self.model, need, settings, fixed_shapes=False)

        # The kept one serves again if it is large enough. If not, one as large as both takes over.
        need = need._replace(prompt_columns=round_up(need.prompt_columns, 64))
        kept = self.batches.pop(settings, None)
        if kept:
            need = Capacity(*map(max, need, kept.capacity))
        if kept is None or need != kept.capacity:
            # Give memory back before more is taken.
            kept = None
            while len(self.batches) >= self.kept:
                del self.batches[next(iter(self.batches))]
            kept = DecodeBatch(self.model, need, settings, True, self.attention)
        self.batches[settings] = kept
        kept.clear()
        return kept

    def _room(self, batch):
        """How many prompts can come in now, with all their rows."""
        G, capacity = batch.settings.samples, batch.capacity
        free_rows = capacity.row_slots - len(batch.rows)
        free_prompts = capacity.prompt_slots - len(batch.prompt_lengths)
        room = min(free_rows // G, free_prompts)
        # One by one, each would cost a prefill. They wait until an eighth of the row slots is free.
        if batch.rows and 8 * room * G < capacity.row_slots:
            return 0
        return room

    def _admit(self, batch, prompts, first, keys):
        """Prefill prompts first .. first+p-1 of the call (lists of ids); start G rows of each."""
        p, G = len(prompts), batch.settings.samples
        first_slot = len(batch.prompt_lengths)
        h = batch.prefill(prompts)  # (p, C)

        # The G rows of a prompt start from the same activations, with other random numbers.
        rows = [Row((first + i) * G + g, first_slot + i) for i in range(p) for g in range(G)]
        prompt_keys = keys[first : first + p].repeat_interleave(G)  # (p * G,)
        sample_numbers = torch.arange(G, device=self.device).repeat(p)  # (p * G,)
        random_keys = row_keys(prompt_keys, sample_numbers)
        batch.add(rows, random_keys, h.repeat_interleave(G, dim=0))

    def _gone(self, batch, steps):
        """A bool a row: has it as many tokens as it may have, or a stop token?"""
        full = [row.age >= batch.settings.new_tokens for row in batch.rows]

        # Whether a row has stopped is known on the device. To ask a GPU is to wait for it, so it is
        # asked now and then, and what a stopped row samples in between is thrown away.
        ask_every = 8 if self.fixed_shapes else 1
        if steps % ask_every != 0:
            return full
        stopped = batch.stopped[: len(batch.rows)].tolist()
        return [is_full or has_stopped for is_full, has_stopped in zip(full, stopped)]

    @torch.inference_mode()
    def next_logprobs(self, prompts, candidates, batch_tokens=16384, progress=None):
        """Log-probs of the token after each prompt, for a few tokens that it might be.

        candidates[i]: the ids to look at after prompts[i], a list of ids. Returns as many lists of
        floats. Each prompt takes one forward pass, however many its candidates, and at most
        `batch_tokens` padded tokens (or one prompt) are run at once.
        """
        # Prompts of like length share a rectangle.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found = [None] * len(prompts)
        work = Counter()
        start = 0
        while start < len(order):
            longest = len(prompts[order[start]])
            some = order[start : start + max(1, batch_tokens // longest)]
            start += len(some)

            # A prompt needs no mask for its padding: a token only looks to its left.
            ids, lengths = pad([prompts[i] for i in some], self.device)  # (p, T), (p,)
            h = self.model.hidden(ids)  # (p, T, C)
            h = h[torch.arange(len(some), device=self.device), lengths - 1]  # (p, C)
            wanted, _ = pad([candidates[i] for i in some], self.device)  # (p, most candidates)
            for i, logprobs in zip(some, self._logprobs_of(wanted, h).tolist()):
                found[i] = logprobs[: len(candidates[i])]

            work.update(tokens=ids.numel(), pairs=ids.numel() * longest, head_tokens=len(some))
            if progress:
                progress(len(some))

        no_completions = [[] for _ in prompts]
        self.stats = dict(live=[], row_slots=0, work={"prefill": work})
        self.stats.update(needed(prompts, no_completions))
        self.stats["rows"] = len(prompts)  # the head ran for each
        return found

    def _logprobs_of(self, ids, h):
        """ids (p, n), h (p, C) -> (p, n), some at a time: not all of (p, V) exist at once."""
        rows_at_once = max(1, LOGITS_AT_ONCE[self.device.type] // self.model.config.n_tokens)
        found = []
        for some_ids, some_h in zip(ids.split(rows_at_once), h.split(rows_at_once)):
            logprobs = all_logprobs(self.model.head(some_h))  # (rows_at_once, V)
            found.append(logprobs.gather(1, some_ids))
        return torch.cat(found)


class PlainEngine:
    """sampler.py under the Engine's interface: for `train_rl.py --sampler=plain`.

    It samples from the learner itself, so that there is nothing to refresh. What there is to see of
    a sampler is in sampler.generate.
    """

    def __init__(self, model, max_rows=0):
        self.learner, self.model, self.max_rows, self.stats = model, model, max_rows, {}
        self.kept = 1

    def refresh(self):
        pass

    def generate(self, prompts, samples_per_prompt=1, max_new_tokens=256, **settings):
        """As Engine.generate. Where not all rows fit, the prompts come one part after the other."""
        P, G = len(prompts), samples_per_prompt
        keys = settings.pop("keys", None) or range(P)
        progress = settings.pop("progress", None)
        at_once = max(1, self.max_rows // G) if self.max_rows else P
        groups, live = [], []
        work = {"prefill": Counter(), "decode": Counter()}
        for start in range(0, P, at_once):
            some = prompts[start : start + at_once]
            found = sampler.generate(
                self.model,
                some,
                samples_per_prompt=G,
                max_new_tokens=max_new_tokens,
                keys=keys[start : start + at_once],
                **settings,
            )
            groups += found

            # What that took: every prompt as long as the longest, every row until the last is done.
            p, rows, longest = len(some), len(some) * G, max(map(len, some))
            steps = max(len(completion.ids) for group in found for completion in group) - 1
            pairs = rows * (longest + max_new_tokens) * steps
            work["prefill"].update(tokens=p * longest, pairs=p * longest**2, head_tokens=rows)
            work["decode"].update(tokens=rows * steps, pairs=pairs, head_tokens=rows * steps)
            live += [rows] * steps
            if progress:
                progress(rows)
        self.stats = dict(live=live, row_slots=max(live, default=0), work=work)
        self.stats.update(needed(prompts, groups))
        return groups


# train_rl.py's --sampler
SAMPLERS = {"engine": Engine, "plain": PlainEngine}


def needed(prompts, groups):
    """What it takes to sample these completions of these prompts, however it is scheduled.

    rows            completions
    prompt_tokens   that are prefilled
    new_tokens      that were sampled and kept
    row_steps       tokens that were fed to decode steps: a completion's last token never is
    pairs        (query, key) pairs
    cached          keys that decode steps read: a prompt's once a step for all its rows
    """
    stats = dict(rows=0, prompt_tokens=0, new_tokens=0, row_steps=0, pairs=0, cached=0)
    for prompt, group in zip(prompts, groups):
        length = len(prompt)
        fed = [len(c.ids) - 1 for c in group]  # to decode steps, a number a completion
        # The n-th token that is fed sees the prompt, and n tokens of its row.
        own = sum(n * (n + 1) // 2 for n in fed)
        stats["rows"] += len(group)
        stats["prompt_tokens"] += length
        stats["new_tokens"] += sum(fed) + len(group)
        stats["row_steps"] += sum(fed)
        stats["pairs"] += length * (length + 1) // 2 + length * sum(fed) + own
        stats["cached"] += length * max(fed, default=0) + own
    return stats
