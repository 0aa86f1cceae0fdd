"""SFT's training rows: conversations packed whole into rows.

Order is a pure function of (seed, epoch), so a cursor is all the state there is.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from nanorl.data.tokens import check_same_data


class Rows(NamedTuple):
    """Rows of packed conversations, all (rows, T)."""

    inputs: torch.Tensor  # ids
    targets: torch.Tensor  # ids, each the one after its input
    mask: torch.Tensor  # 1 where the target is the assistant's
    document: torch.Tensor  # the number of the conversation in its row, from 1; 0: padding
    positions: torch.Tensor  # of the input in its conversation

    def first(self, n):
        """The first n rows."""
        return Rows(*(part[:n] for part in self))

    def split(self, rows_at_once, device):
        """-> micro-batches of at most so many rows (at least one), on the device."""
        if len(self.inputs) == 0:
            return []
        parts = (part.to(device).split(max(1, rows_at_once)) for part in self)
        return [Rows(*some) for some in zip(*parts)]

    def work(self, totals):
        """-> (tokens, pairs) as they are computed, and (tokens, pairs) that are needed.

        Pairs of a query and a key. Computed are padding and whole squares of attention; needed is
        what a token may see. totals: runtime.dist's, so that the numbers are over all ranks.
        """
        real = self.document > 0
        counts = totals(
            {
                "slots": self.inputs.numel(),
                "real": real.sum(),
                "pairs": (self.positions[real] + 1).sum(),
            }
        )
        slots, real, pairs = (int(counts[name]) for name in ("slots", "real", "pairs"))
        return (slots, slots * self.inputs.size(1)), (real, pairs)


def content_of(examples):
    """A hash of (ids, mask) of all the examples, in order."""
    content = hashlib.blake2b(digest_size=16)
    for ids, mask in examples:
        content.update(np.array([len(ids), *ids], np.int64).tobytes())
        content.update(np.array(mask, bool).tobytes())
    return content.hexdigest()


def pack_rows(examples, seq_len):
    """Put examples, lists of (ids, mask), whole into rows of at most `seq_len` tokens.

    The longest come first, each into the fullest row that still holds it. Returns a list of rows,
    each a list of examples. Raises ValueError for one that is longer than a row.
    """
    rows = []
    with_room = {}  # {free tokens: the rows that have so many}
    for example in sorted(examples, key=lambda e: -len(e[0])):  # stable, so the order is fixed
        n = len(example[0])
        if n > seq_len:
            raise ValueError(
                f"an example of {n} tokens does not fit a row of {seq_len}: raise --seq_len"
            )
        free = next((f for f in range(n, seq_len) if with_room.get(f)), None)
        if free is None:
            row, free = [], seq_len
            rows.append(row)
        else:
            row = with_room[free].pop()
        row.append(example)
        with_room.setdefault(free - n, []).append(row)
    return rows


def collate(rows, seq_len, pad):
    """Rows of examples (see pack_rows) of at most seq_len + 1 tokens -> Rows of seq_len inputs."""
    shape = (len(rows), seq_len + 1)
    ids = np.full(shape, pad)
    mask, document, positions = (np.zeros(shape, int) for _ in range(3))
    for i, row in enumerate(rows):
        start = 0
        for number, (example_ids, example_mask) in enumerate(row, 1):
            slots = slice(start, start + len(example_ids))
            ids[i, slots] = example_ids
            mask[i, slots] = example_mask
            document[i, slots] = number
            positions[i, slots] = np.arange(len(example_ids))
            start = slots.stop
        positions[i, start:] = np.arange(seq_len + 1 - start)  # padding is a document of its own
    ids, mask, document, positions = map(torch.from_numpy, (ids, mask, document, positions))
    return Rows(ids[:, :-1], ids[:, 1:], mask[:, 1:], document[:, :-1], positions[:, :-1])


class PackedRows:
    """Batches of a step, from conversations: example(i) -> (ids, mask), for i < n_examples.

    Each epoch shuffles the examples by (seed, epoch), packs them `chunk` at a time and shuffles the
    rows. A step has `rows` of them, of which every rank takes its share. ranks: this one's number,
    and how many there are.
    """

    def __init__(self, example, n_examples, seq_len, rows, seed=0, ranks=(0, 1), chunk=4096, pad=0):
        if n_examples < 1:
            raise ValueError("there are no training examples")
        self.example, self.n, self.seq_len, self.rows = example, n_examples, seq_len, rows
        self.seed, self.chunk, self.pad = seed, chunk, pad
        self.rank, self.world_size = ranks
        self.position = 0  # examples that were consumed before the current chunk
        self.offset = 0  # rows that were handed out of it
        self.packed = None  # its rows

    def state_dict(self):
        return {"position": self.position, "offset": self.offset, "n": self.n}

    def load_state_dict(self, state):
        check_same_data(state, self.n)
        self.position, self.offset, self.packed = state["position"], state["offset"], None

    def next(self):
        """-> Rows, this rank's share of the step's."""
        rows = [self._row() for _ in range(self.rows)]
        return collate(rows[self.rank :: self.world_size], self.seq_len, self.pad)

    def _row(self):
        if self.packed is None:
            self._fill()
        if self.offset == len(self.packed):
            self.position += self.in_chunk
            self.offset = 0
            self._fill()
        self.offset += 1
        return self.packed[self.offset - 1]

    def _fill(self):
        """Pack the chunk that begins at `position`."""
        epoch, start = divmod(self.position, self.n)
        chosen = self._choose(epoch, start)
        rows = pack_rows([self.example(int(i)) for i in chosen], self.seq_len + 1)
        shuffle = np.random.default_rng([self.seed, epoch, start]).permutation(len(rows))
        self.packed = [rows[i] for i in shuffle]
        self.in_chunk = len(chosen)

    def _choose(self, epoch, start):
        """The examples of a chunk that begins at `start` of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return order[start : start + self.chunk]


class OrderedRows(PackedRows):
    """Of examples that have an order of their own and no end, as a parts.Mixture gives them."""

    def _choose(self, _epoch, _start):
        return range(self.position, self.position + self.chunk)
