"""Training tokens: documents -> token files -> windows (base); conversations -> packed rows (SFT).

Order is a pure function of (seed, epoch), so a cursor, one integer, is all the state there is."""
import json
import os

import numpy as np
import torch


def tokenized_from(directory):
    """What the whole token files in `directory` were made from (see tokenize), else None."""
    done = os.path.join(directory, "tokens.json")
    if not os.path.exists(done):
        return None
    with open(done) as f:
        return json.load(f)["made_from"]


def tokenize(documents, tokenizer, directory, made_from=None):
    """Write (split, text) documents to `directory`/train.bin and val.bin as token ids, each document followed by the
    boundary token, streaming. tokens.json, written last, holds the counts and `made_from`, the settings behind them.
    Returns its content; files that are whole and made from the same are left as they are."""
    done = os.path.join(directory, "tokens.json")
    if not os.path.exists(done) or tokenized_from(directory) != made_from:
        os.makedirs(directory, exist_ok=True)
        if os.path.exists(done):
            os.remove(done)
        dtype = "uint16" if tokenizer.n_tokens <= 2 ** 16 else "uint32"
        counts, nbytes = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        files = {split: open(os.path.join(directory, split + ".bin"), "wb") for split in counts}
        for split, text in documents:
            ids = tokenizer.encode(text) + [tokenizer.document_end]
            files[split].write(np.array(ids, dtype).tobytes())
            counts[split] += len(ids)
            nbytes[split] += len(text.encode("utf-8"))
        for f in files.values():
            f.close()
        with open(done + ".tmp", "w") as f:
            json.dump({"dtype": dtype, "tokens": counts, "bytes": nbytes, "made_from": made_from}, f)
        os.replace(done + ".tmp", done)
    with open(done) as f:
        return json.load(f)


class Windows:
    """Batches of (inputs, targets), both (rows, T), from a token file: every epoch visits each window of T + 1 tokens
    once, in an order given by (seed, epoch). A global batch is the same whatever the number of ranks; each rank takes
    its share of it."""

    def __init__(self, directory, split, seq_len, rows, seed=0, rank=0, world_size=1):
        with open(os.path.join(directory, "tokens.json")) as f:
            info = json.load(f)
        self.tokens = np.memmap(os.path.join(directory, split + ".bin"), info["dtype"], "r")
        self.bytes_per_token = info["bytes"][split] / max(1, info["tokens"][split])
        self.n = (len(self.tokens) - 1) // seq_len
        if self.n < rows:
            raise ValueError(f"the {split} split has {self.n} windows of {seq_len} tokens, fewer than the {rows} of one "
                             f"batch: lower --batch_tokens or --seq_len, or give more text")
        self.T, self.rows, self.seed, self.rank, self.world_size = seq_len, rows, seed, rank, world_size
        self.cursor = 0  # windows handed out so far
        self.epoch = None

    def state_dict(self):
        return {"cursor": self.cursor}

    def load_state_dict(self, state):
        self.cursor = state["cursor"]

    def _window(self, position):
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        start = self.order[i] * self.T
        return self.tokens[start:start + self.T + 1].astype(np.int64)

    def next(self):
        rows = [self._window(self.cursor + i) for i in range(self.rank, self.rows, self.world_size)]
        self.cursor += self.rows
        both = torch.from_numpy(np.array(rows, np.int64).reshape(-1, self.T + 1))  # (rows, T + 1)
        return both[:, :-1], both[:, 1:]


def pack(examples, seq_len):
    """Put examples, lists of (ids, mask), whole into rows of at most `seq_len` tokens: longest first, each into the
    fullest row that still holds it. Returns a list of rows, each a list of examples. Raises ValueError for one that
    is longer than a row."""
    rows, room = [], {}  # room: free tokens -> rows with that much
    for example in sorted(examples, key=lambda e: -len(e[0])):  # stable, so the order is fixed
        n = len(example[0])
        if n > seq_len:
            raise ValueError(f"an example of {n} tokens does not fit a row of {seq_len}: raise --seq_len")
        free = next((f for f in range(n, seq_len) if room.get(f)), None)
        if free is None:
            rows.append([])
            row, free = rows[-1], seq_len
        else:
            row = room[free].pop()
        row.append(example)
        room.setdefault(free - n, []).append(row)
    return rows


class PackedRows:
    """Batches from conversations: example(i) -> (ids, mask) for i < n_examples. Each epoch reshuffles the examples by
    (seed, epoch), packs them `chunk` at a time and shuffles the rows.

    next() gives (inputs, targets, mask, document), all (rows, T): mask is 1 where the target is the assistant's,
    document numbers the examples of a row from 1, 0 is padding."""

    def __init__(self, example, n_examples, seq_len, rows, seed=0, rank=0, world_size=1, chunk=4096, pad=0):
        if n_examples < 1:
            raise ValueError("there are no training examples")
        self.example, self.n, self.T, self.rows, self.seed, self.chunk, self.pad = example, n_examples, seq_len, rows, seed, chunk, pad
        self.rank, self.world_size = rank, world_size
        self.position, self.offset = 0, 0  # examples consumed before the current chunk; rows handed out of it
        self.packed = None

    def state_dict(self):
        return {"position": self.position, "offset": self.offset}

    def load_state_dict(self, state):
        self.position, self.offset, self.packed = state["position"], state["offset"], None

    def _fill(self):
        epoch, start = divmod(self.position, self.n)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)[start:start + self.chunk]
        rows = pack([self.example(int(i)) for i in order], self.T + 1)
        shuffle = np.random.default_rng([self.seed, epoch, start]).permutation(len(rows))
        self.packed, self.in_chunk = [rows[i] for i in shuffle], len(order)

    def _row(self):
        if self.packed is None:
            self._fill()
        if self.offset == len(self.packed):
            self.position, self.offset = self.position + self.in_chunk, 0
            self._fill()
        self.offset += 1
        return self.packed[self.offset - 1]

    def next(self):
        rows = [self._row() for _ in range(self.rows)][self.rank::self.world_size]
        shape = (len(rows), self.T + 1)
        ids, mask, document = np.full(shape, self.pad), np.zeros(shape, int), np.zeros(shape, int)
        for i, row in enumerate(rows):
            at = 0
            for number, (example_ids, example_mask) in enumerate(row, 1):
                place = slice(at, at + len(example_ids))
                ids[i, place], mask[i, place], document[i, place] = example_ids, example_mask, number
                at = place.stop
        ids, mask, document = map(torch.from_numpy, (ids, mask, document))
        return ids[:, :-1], ids[:, 1:], mask[:, 1:], document[:, :-1]
