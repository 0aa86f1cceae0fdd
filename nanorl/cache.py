"""The rows that are being decoded: their caches, and one decode step for all of them.

sampler.py, the plain form, keeps a copy of the prompt's keys and values for each of its rows. Here
what the rows of a prompt have in common is stored once, and read once a step. So there are two
caches, each of a pair of tensors a layer:

    prompt cache   (prompt slots, K, columns, D)   a column a token; written by `prefill`
    own cache      (row slots, K, columns, D)      a column a sampled token; written by `step`

A slot is a prompt's or a row's place in its cache. A decode step attends to the two parts one by
one, and `merge` joins the results into exactly one softmax. engine.py decides which rows there are.
The letters are gpt.py's.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanorl.attention import CausalAttention
from nanorl.gpt import LOGITS_AT_ONCE, round_up
from nanorl.sampling import sample, uniforms

COLUMNS = 32  # the own cache grows by at least so many
SAMPLED_AT_ONCE = 2**20  # logits that are sampled from at once on a CPU: they stay in its cache


class Settings(NamedTuple):
    """What a call of Engine.generate asks for, but for its prompts."""

    samples: int  # G
    new_tokens: int  # at most, a row
    temperature: float
    stop_ids: frozenset


class Capacity(NamedTuple):
    """How much the caches can hold."""

    row_slots: int
    prompt_slots: int
    prompt_columns: int


class Shape(NamedTuple):
    """The part of the caches that a decode step works on. Each shape has its own CUDA graph."""

    rows: int  # row slots 0 .. rows-1
    columns: int  # of the own cache: 0 .. columns-1
    prompts: int  # prompt slots 0 .. prompts-1
    prompt_columns: int  # of the prompt cache
    width: int  # of the grid (see Layout): no prompt has more rows


@dataclass
class Row:
    """A row that is being decoded, as the host knows it. Its slot is its index in `rows`."""

    number: int  # in the call: sample g of prompt p is row p * G + g
    prompt_slot: int  # where its prompt is
    age: int = 0  # tokens sampled so far. The newest is in no cache yet: the next step feeds it


class DecodeBatch:
    """The rows that are decoded together, and the prompts that they read.

    n live rows have the row slots 0 .. n-1, and the prompts that they read the first prompt slots.
    When one leaves, the last one takes its slot. That is one copy, however many stay.

    fixed_shapes: a step does not work on just what is live, but on one of 16 shapes (4 numbers of
    rows x 4 numbers of columns) that has room for it. What it computes beyond changes nothing. A
    CUDA graph needs this: it replays a step at fixed sizes and addresses.
    attention: DecodeAttention, or what takes its place (gpu.py).
    """

    def __init__(self, model, capacity, settings, fixed_shapes, attention=None):
        self.model, self.capacity, self.settings = model, capacity, settings
        self.fixed_shapes = fixed_shapes
        self.attention = attention or DecodeAttention
        self.device = next(model.parameters()).device

        # On the host: who is decoded. So scheduling does not have to wait for the device.
        self.rows = []  # of Row
        self.prompt_lengths = []  # tokens of the prompt in each prompt slot that is in use

        # On the device: the caches, and where in them each row stands.
        columns = settings.new_tokens if fixed_shapes else min(COLUMNS, settings.new_tokens)
        self.prompt_cache = Cache(model, capacity.prompt_slots, capacity.prompt_columns)
        self.own_cache = Cache(model, capacity.row_slots, columns)
        self.layout = Layout(capacity, settings.samples, self.device)

        # Also on the device, an entry a row slot: what was sampled, and what sampling needs.
        shape = (capacity.row_slots, settings.new_tokens)
        self.float_dtype = torch.promote_types(model.compute_dtype, torch.float32)
        self.ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, dtype=self.float_dtype, device=self.device)
        self.random_keys = torch.zeros(capacity.row_slots, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(capacity.row_slots, dtype=torch.bool, device=self.device)
        self.stop_ids = torch.tensor(
            sorted(settings.stop_ids), dtype=torch.long, device=self.device
        )

        # CUDA graphs, by Shape (None: has run once, is not captured yet); the memory they share.
        self.graphs = {}
        self.uses_graphs = fixed_shapes and self.device.type == "cuda"
        self.graph_memory = torch.cuda.graph_pool_handle() if self.uses_graphs else None

        # The work that was done, padding and all, in the terms of report/cost.py.
        self.work = {"prefill": Counter(), "decode": Counter()}

    def clear(self):
        """No rows, no prompts. What the caches hold is left there: nobody reads it."""
        self.rows, self.prompt_lengths = [], []
        for work in self.work.values():
            work.clear()

    # ---- rows come

    def prefill(self, prompts):
        """Run each prompt (a list of ids, p of them) once, and keep its keys and values.

        They go into the next free prompt slots. Returns the last token's activations, (p, C).
        """
        in_use = len(self.prompt_lengths)
        slots = slice(in_use, in_use + len(prompts))
        ids, lengths = pad(prompts, self.device)  # (p, T), (p,)
        longest = ids.size(1)
        causal = CausalAttention()

        def attend(layer, q, k, v):
            # The caches have the heads before the time: (p, K, T, D).
            self.prompt_cache.keys[layer][slots, :, :longest] = k.transpose(1, 2)
            self.prompt_cache.values[layer][slots, :, :longest] = v.transpose(1, 2)
            return causal(layer, q, k, v)

        h = self.model.hidden(ids, attend=attend)  # (p, T, C)
        self.prompt_lengths += [len(prompt) for prompt in prompts]
        self.work["prefill"].update(
            tokens=ids.numel(),
            pairs=ids.numel() * longest,
            head_tokens=len(prompts) * self.settings.samples,
        )
        return h[torch.arange(len(prompts), device=self.device), lengths - 1]

    def add(self, rows, random_keys, h):
        """New rows (r of them, of age 0) take the next free row slots and sample their first token.

        random_keys: (r,), by sampling.row_keys. h: their prompts' last activations, (r, C).
        """
        in_use = len(self.rows)
        slots = slice(in_use, in_use + len(rows))
        self.rows += rows
        self.random_keys[slots] = random_keys
        self.stopped[slots] = False
        self._update_layout()
        self._sample(slots, h)
        for row in rows:
            row.age += 1

    # ---- rows leave

    def remove(self, gone):
        """Rows leave (gone: a bool a row), and with them the prompts that no row reads any more.

        Returns (number, ids, logprobs) of each row that leaves, lists of new_tokens entries. What
        follows a stop token means nothing.
        """
        slots = [slot for slot, leaves in enumerate(gone) if leaves]
        numbers = [self.rows[slot].number for slot in slots]
        index = self._index(slots)
        left = list(zip(numbers, self.ids[index].tolist(), self.logprobs[index].tolist()))

        self._fill_row_holes(gone)
        self._fill_prompt_holes()
        if self.rows:
            self._update_layout()
        return left

    def _fill_row_holes(self, gone):
        """The last rows take the slots of those that leave."""
        holes, movers = fill_holes([not leaves for leaves in gone])
        if holes:
            to, of = self._index(holes), self._index(movers)
            oldest = max(self.rows[slot].age for slot in movers)
            self.own_cache.copy(to, of, oldest)
            for tensor in (self.ids, self.logprobs, self.random_keys, self.stopped):
                tensor[to] = tensor[of]
            for hole, mover in zip(holes, movers):
                self.rows[hole] = self.rows[mover]
        del self.rows[len(gone) - sum(gone) :]

    def _fill_prompt_holes(self):
        """The last prompts take the slots of those that nobody reads. Their rows follow them."""
        read = {row.prompt_slot for row in self.rows}
        n_prompts = len(self.prompt_lengths)
        holes, movers = fill_holes([slot in read for slot in range(n_prompts)])
        if holes:
            to, of = self._index(holes), self._index(movers)
            self.prompt_cache.copy(to, of, self.capacity.prompt_columns)
            for hole, mover in zip(holes, movers):
                self.prompt_lengths[hole] = self.prompt_lengths[mover]
            new_slot = dict(zip(movers, holes))
            for row in self.rows:
                row.prompt_slot = new_slot.get(row.prompt_slot, row.prompt_slot)
        del self.prompt_lengths[len(read) :]

    def _index(self, slots):
        return torch.tensor(slots, dtype=torch.long, device=self.device)

    def _update_layout(self):
        """After rows came or left: tell the device who stands where."""
        if self.fixed_shapes:
            width = self.settings.samples
        else:
            width = max(Counter(row.prompt_slot for row in self.rows).values())
        self.layout.update(self.rows, self.prompt_lengths, width)

    # ---- a token more for every row

    def step(self):
        """Feed every live row's newest token, and sample the next."""
        if self.fixed_shapes:
            shape = self._fixed_shape()
        else:
            shape = self._exact_shape()
            self.own_cache.grow(shape.columns)

        if self.uses_graphs:
            self._replay(shape)
        else:
            self._decode(shape)

        for row in self.rows:
            row.age += 1
        own_pairs = shape.rows * shape.columns
        prompt_pairs = shape.prompts * shape.width * shape.prompt_columns
        self.work["decode"].update(
            tokens=shape.rows, pairs=own_pairs + prompt_pairs, head_tokens=shape.rows
        )

    def _oldest(self):
        return max(row.age for row in self.rows)

    def _exact_shape(self):
        """Just what is live, but for a few columns more: see `columns_for`."""
        return Shape(
            rows=len(self.rows),
            columns=min(columns_for(self._oldest()), self.settings.new_tokens),
            prompts=len(self.prompt_lengths),
            prompt_columns=max(self.prompt_lengths),
            width=self.layout.width,
        )

    def _fixed_shape(self):
        """The smallest of the 16 shapes that holds what is live."""
        rows = bucket(len(self.rows), self.capacity.row_slots)
        return Shape(
            rows=rows,
            columns=bucket(self._oldest(), self.settings.new_tokens),
            prompts=min(rows, self.capacity.prompt_slots),
            prompt_columns=self.capacity.prompt_columns,
            width=self.layout.width,
        )

    def _replay(self, shape):
        """The step as one CUDA graph: one launch in place of hundreds."""
        # A shape's first step runs as it is. It loads the kernels, which a capture must not do.
        if shape not in self.graphs:
            self._decode(shape)
            self.graphs[shape] = None
            return

        # Its second step is captured: the kernels are recorded and not executed. Then it is
        # replayed, like all that follow.
        if self.graphs[shape] is None:
            graph = torch.cuda.CUDAGraph()
            # Another thread, such as NCCL's, may call CUDA meanwhile.
            options = dict(pool=self.graph_memory, capture_error_mode="thread_local")
            with torch.cuda.graph(graph, **options):
                self._decode(shape)
            self.graphs[shape] = graph
        self.graphs[shape].replay()

    def _decode(self, shape):
        """The step itself, all of it on the device.

        A graph replays the kernels and not the Python between them. So with fixed shapes nothing in
        here may depend on `rows` or `prompt_lengths`: only on tensors and on the shape.
        """
        # The newest token was sampled with number age-1. So that is its column in the own cache.
        slots = slice(0, shape.rows)
        column = self.layout.ages[slots] - 1  # (rows,)
        newest = self.ids[slots].gather(1, column[:, None])  # (rows, 1)
        positions = self.layout.starts[slots] + column  # (rows,)
        attend = self.attention(self, shape, column)
        h = self.model.hidden(newest, positions[:, None], attend)  # (rows, 1, C)
        self._sample(slots, h[:, 0])

    def _sample(self, slots, h):
        """Sample a token for each row in `slots` (a slice, of r) from h (r, C); write it down."""
        ages = self.layout.ages[slots]  # (r,)
        randoms = uniforms(self.random_keys[slots], ages)  # (r,) in [0, 1)
        ids, logprobs = self._draw(h, randoms)  # (r,), (r,)
        self.ids[slots].scatter_(1, ages[:, None], ids[:, None])
        self.logprobs[slots].scatter_(1, ages[:, None], logprobs[:, None])
        self.stopped[slots] |= (ids[:, None] == self.stop_ids).any(-1)
        self.layout.ages[slots] += 1

    def _draw(self, h, randoms):
        """h (r, C), randoms (r,) -> ids (r,) and their log-probs (r,)."""
        # The head runs over as many rows at a time as keep the logits in a bounded buffer. On a CPU
        # they are sampled from in smaller parts still, which stay in its cache.
        vocabulary = self.model.config.n_tokens
        head_rows = max(1, LOGITS_AT_ONCE[self.device.type] // vocabulary)
        draw_rows = head_rows
        if self.device.type == "cpu":
            draw_rows = max(1, SAMPLED_AT_ONCE // vocabulary)

        ids, logprobs = [], []
        for some_h, some_randoms in zip(h.split(head_rows), randoms.split(head_rows)):
            logits = self.model.head(some_h)  # (head_rows, V)
            for z, u in zip(logits.split(draw_rows), some_randoms.split(draw_rows)):
                some_ids, some_logprobs = sample(z, u, self.settings.temperature)
                ids.append(some_ids)
                logprobs.append(some_logprobs)
        return torch.cat(ids), torch.cat(logprobs)


class Layout:
    """Where each row and prompt stands, on the device.

    The attention to the prompts is one matrix product a prompt and kv head, over the queries of all
    the prompt's rows. So queries are laid out on a grid: a line a prompt, a cell a row. An example:
    prompt A is in prompt slot 0, B in slot 1, and there are three live rows. Rows 0 and 2 read A,
    row 1 reads B.

        row slot     0  1  2             the grid     0th     1st
        prompt slot  0  1  0             A            row 0   row 2
        nth          0  0  1             B            row 1   -
        cell         0  2  1

        cell         0  1  2  3
        row_at       0  2  1  0

    nth: it is its prompt's nth row.
    cell: prompt slot * width + nth. The grid is `width` (here 2) wide, and counted line by line.
    row_at: the row slot in each cell. An empty cell repeats row 0, and nobody reads what comes out.

    queries[row_at] goes from rows to cells, and outputs[cell] back: row_at[cell] is 0 1 2.
    """

    def __init__(self, capacity, samples, device):
        # All of it is one tensor, so that an update is one copy to the device.
        row_slots, prompt_slots = capacity.row_slots, capacity.prompt_slots
        sizes = [row_slots, row_slots, row_slots, prompt_slots * samples, prompt_slots]
        self.numbers = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        parts = self.numbers.split(sizes)

        # An entry a row slot. ages: tokens sampled so far, as Row.age (a step adds one to both).
        # starts: position of the first of these tokens, which is the prompt's length.
        self.ages, self.starts, self.cell = parts[:3]
        # An entry a cell, and an entry a prompt slot.
        self.row_at, self.prompt_lengths = parts[3:]
        self.width = samples

    def update(self, rows, prompt_lengths, width):
        """rows, prompt_lengths: DecodeBatch's, in the order of their slots. width: of the grid."""
        self.width = width
        cells = []
        row_at = [0] * (len(prompt_lengths) * width)
        placed = [0] * len(prompt_lengths)  # rows of each prompt that have a cell
        for slot, row in enumerate(rows):
            nth = placed[row.prompt_slot]
            cell = row.prompt_slot * width + nth
            row_at[cell] = slot
            cells.append(cell)
            placed[row.prompt_slot] += 1

        # A fixed shape takes in slots that are not in use. What they hold harms nothing: such a row
        # sees one key, since a softmax over none is not a number, and its age is 1, so that it is
        # never older than the oldest row.
        parts = [
            filled(self.ages, [row.age for row in rows], rest=1),
            filled(self.starts, [prompt_lengths[row.prompt_slot] for row in rows], rest=0),
            filled(self.cell, cells, rest=0),
            filled(self.row_at, row_at, rest=0),
            filled(self.prompt_lengths, prompt_lengths, rest=1),
        ]
        self.numbers.copy_(torch.from_numpy(np.concatenate(parts)))


class DecodeAttention:
    """What GPT.hidden calls in a decode step: a token sees its prompt and its row's own tokens."""

    def __init__(self, batch, shape, column, mask_dtype=None):
        """column (rows,): where each row's newest token goes in the own cache."""
        self.shape = shape
        self.prompt_cache, self.own_cache = batch.prompt_cache, batch.own_cache
        layout, dtype = batch.layout, mask_dtype or batch.float_dtype
        self.cell = layout.cell[: shape.rows]  # (rows,)
        self.row_at = layout.row_at[: shape.prompts * shape.width]  # (prompts * width,)

        # Rows differ in age, and prompts in length: hide the columns beyond. An age counts the
        # newest token, and that sees itself.
        ages = layout.ages[: shape.rows]  # (rows,)
        lengths = layout.prompt_lengths[: shape.prompts]  # (prompts,)
        self.own_mask = length_mask(ages, shape.columns, dtype)
        self.prompt_mask = length_mask(lengths, shape.prompt_columns, dtype)

        # Where in the own cache's (row slots, K, columns, D) the newest tokens go.
        self.newest = (torch.arange(shape.rows, device=batch.device), slice(None), column)

        # Two shortcuts where no graph is captured. Rows of one age, as all are until the first
        # refill, write one slice, which is quicker. Prompts of one length need no mask.
        if not batch.fixed_shapes:
            different_ages = {row.age for row in batch.rows}
            if len(different_ages) == 1:
                self.newest = (slice(shape.rows), slice(None), different_ages.pop() - 1)
            if len(set(batch.prompt_lengths)) == 1:
                self.prompt_mask = None

    def __call__(self, layer, q, k, v):
        """One new token a row: q (rows, 1, H, D), k and v (rows, 1, K, D) -> (rows, 1, H, D)."""
        # Keep the token's key and value: it, and those that follow, see them.
        self.own_cache.keys[layer][self.newest] = k[:, 0]
        self.own_cache.values[layer][self.newest] = v[:, 0]

        # H/K query heads share a kv head.
        rows, _, K, D = k.shape
        q = q.view(rows, K, -1, D)  # (rows, K, H/K, D)
        own_y, own_lse = self._own_part(layer, q)
        prompt_y, prompt_lse = self._prompt_part(layer, q)
        y = merge(prompt_y, prompt_lse, own_y, own_lse)  # (rows, K, H/K, D)
        return y.reshape(rows, 1, -1, D)

    def _own_part(self, layer, q):
        """Each row over its own tokens: q (rows, K, H/K, D) -> y like q, lse (rows, K, H/K)."""
        rows, columns = self.shape.rows, self.shape.columns
        keys = self.own_cache.keys[layer][:rows, :, :columns]
        values = self.own_cache.values[layer][:rows, :, :columns]
        return attend_part(q, keys, values, self.own_mask)

    def _prompt_part(self, layer, q):
        """Each row over its prompt's tokens, the same shapes."""
        prompts, columns = self.shape.prompts, self.shape.prompt_columns
        keys = self.prompt_cache.keys[layer][:prompts, :, :columns]
        values = self.prompt_cache.values[layer][:prompts, :, :columns]

        # Lay the queries out on the grid. All those that meet the same keys stand side by side.
        q = q[self.row_at].unflatten(0, (prompts, -1))  # (prompts, width, K, H/K, D)
        q = q.transpose(1, 2).flatten(2, 3)  # (prompts, K, width * H/K, D)

        y, lse = attend_part(q, keys, values, self.prompt_mask)

        # Go back from cells to rows.
        y = y.unflatten(2, (self.shape.width, -1)).transpose(1, 2)  # (prompts, width, K, H/K, D)
        lse = lse.unflatten(2, (self.shape.width, -1)).transpose(1, 2)  # (prompts, width, K, H/K)
        return y.flatten(0, 1)[self.cell], lse.flatten(0, 1)[self.cell]


class Cache:
    """Keys and values, (slots, K, length, D) a layer."""

    def __init__(self, model, slots, length):
        config, device = model.config, next(model.parameters()).device
        shape = (slots, config.n_kv_head, length, config.head_dim)

        def zeros():
            return torch.zeros(shape, dtype=model.compute_dtype, device=device)

        self.length = length
        self.keys = [zeros() for _ in range(config.n_layer)]
        self.values = [zeros() for _ in range(config.n_layer)]

    def copy(self, to, of, length):
        """Slots `to` get the first `length` columns of slots `of` (index tensors)."""
        for cache in (*self.keys, *self.values):
            cache[to, :, :length] = cache[of, :, :length]

    def grow(self, length):
        """Make room for `length` columns.

        The own cache is no longer than the oldest row needs. A product over a whole, contiguous
        cache runs at memory's speed, and one over its first columns at half of it (docs/log.md).
        And rows that stop early never take the memory.
        """
        if length <= self.length:
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                slots, K, _, D = old.shape
                new = old.new_empty(slots, K, length, D)
                new[:, :, : self.length] = old
                new[:, :, self.length :] = 0  # hidden, but 0 * inf is not a number
                tensors[layer] = new
        self.length = length


def attend_part(q, k, v, mask):
    """Attention over one part of the keys, with what `merge` needs to join it with another.

    q (n, K, m, D): m queries that meet the same t keys. k and v (n, K, t, D). mask (n, 1, 1, t),
    added to the scores, or None. Returns outputs (n, K, m, D) and lse (n, K, m), the log of the sum
    of the scores' exponentials. The softmax is in fp32 or better; scores in bf16 are rounded before
    it, as all products in bf16 are.
    """
    scores = q @ k.transpose(-1, -2)  # (n, K, m, t)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * q.size(-1) ** -0.5
    if mask is not None:
        scores = scores + mask
    top = scores.amax(-1, keepdim=True)  # (n, K, m, 1)
    exponentials = (scores - top).exp()
    total = exponentials.sum(-1, keepdim=True)  # (n, K, m, 1)
    y = (exponentials / total).to(v.dtype) @ v  # (n, K, m, D)
    lse = top + total.log()  # (n, K, m, 1)
    return y, lse.squeeze(-1)


def merge(a, a_lse, b, b_lse):
    """Softmax over the union of two sets of keys, from each set's output (..., D) and lse (...).

    An output is a mean of its set's values, and the set weighs e^lse (Flash-Attention's rescaling).
    """
    share = torch.sigmoid(a_lse - b_lse)[..., None].to(a.dtype)  # e^a / (e^a + e^b)
    return a * share + b * (1 - share)


def length_mask(lengths, columns, dtype):
    """lengths (n,) -> (n, 1, 1, columns): 0 in the first lengths[i] columns, -inf in the others.

    Its rows are a multiple of 8 apart, as a GPU's kernels want them.
    """
    n, padded = len(lengths), round_up(columns, 8)
    beyond = torch.arange(padded, device=lengths.device) >= lengths[:, None]  # (n, padded)
    zeros = torch.zeros(n, padded, dtype=dtype, device=lengths.device)
    return zeros.masked_fill(beyond, float("-inf"))[:, None, None, :columns]


def pad(prompts, device):
    """Lists of ids, p of them -> one rectangle, padded on the right, (p, T), and lengths (p,)."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    rectangle = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    # The lengths come as the first column, so that one copy takes all to the device.
    together = [[length, *row] for length, row in zip(lengths, rectangle)]
    together = torch.tensor(together, device=device)  # (p, 1 + T)
    return together[:, 1:], together[:, 0]


def filled(buffer, values, rest):
    """What a buffer is to hold: a list of values, and `rest` behind them."""
    behind = len(buffer) - len(values)
    return np.array(values + [rest] * behind)  # reads a list 5 times faster than torch.tensor


def fill_holes(stay):
    """Which slots move where, so that those that stay (a bool a slot) have the first slots.

    Returns holes and movers, lists of slots: movers[i] moves to holes[i]. For stay = 1 0 0 1 1 that
    is holes 1, 2 and movers 3, 4: no more is moved than must be.
    """
    n = sum(stay)
    holes = [slot for slot in range(n) if not stay[slot]]
    movers = [slot for slot in range(n, len(stay)) if stay[slot]]
    return holes, movers


def columns_for(age):
    """How many columns the own cache has while the oldest row has this age.

    They go up in steps of COLUMNS, and from an age of 256 on in steps of an eighth to a quarter of
    the age. So all the copying together is a few times the final size.
    """
    power_of_two = 1 << age.bit_length()  # above the age, at most twice of it
    step = max(COLUMNS, power_of_two // 8)
    return round_up(age, step)


def bucket(n, most):
    """The least of most/4, most/2, 3/4 most and most, each rounded up, that holds n."""
    for quarters in (1, 2, 3):
        size = -(-most * quarters // 4)
        if n <= size:
            return size
    return most
