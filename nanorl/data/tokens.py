"""Training tokens of base: documents -> token files -> windows.

Order is a pure function of (seed, epoch), so a cursor, one integer, is all the state there is."""

import itertools
import json
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from nanorl.tokenizer import Tokenizer

SHARD_BYTES = 100_000_000  # of text in a shard
BATCH_BYTES = 1 << 20  # of text encoded at a time
SPLITS = ("train", "val")


def shard_path(directory, split, number):
    return os.path.join(directory, f"{split}_{number:05d}.bin")


def read_index(directory):
    """tokens.json, what token files there are: `whole` when all of them, `made_from` (see tokenize), `facts` about the documents,
    `dtype`, and for each of `shards` and each split its `documents`, `bytes` of text and `tokens`. {} where there is none."""
    path = os.path.join(directory, "tokens.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def _write_index(directory, index):
    path = os.path.join(directory, "tokens.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(index, f)
    os.replace(path + ".tmp", path)


def total(index, name, splits=SPLITS):
    """`documents`, `bytes` or `tokens` of all shards."""
    return sum(shard[split][name] for shard in index["shards"] for split in splits)


def describe(index):
    """The index in words; a line for each note."""
    nbytes, tokens = total(index, "bytes"), total(index, "tokens")
    return (
        f"{index['facts']['name']}, {total(index, 'documents'):,} documents ({total(index, 'documents', ['val']):,} to validate), "
        f"{nbytes / 1e6:,.1f} MB -> {tokens:,} tokens, {nbytes / tokens:.2f} bytes a token"
        + "".join(f"\n        {note}" for note in index["facts"]["notes"])
    )


def tokenize(source, vocab_size, directory):
    """Documents -> `directory`: a tokenizer trained on some of them, and shards train_00000.bin, val_00000.bin, ... of token ids,
    each document followed by the boundary token. Returns the index (read_index), written after every shard: what a
    process that died has left whole is gone on from, and what was made from something else is made again.

    source: survey() -> (texts to train on, facts); documents(facts) yields (split, text), always the same; made_from, a dict."""
    made_from = {**source.made_from, "vocab_size": vocab_size}
    index = read_index(directory)
    if index.get("made_from") != made_from or "shards" not in index:
        texts, facts = source.survey()
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        tokenizer = Tokenizer.train(texts, vocab_size)
        tokenizer.save(directory)
        index = {
            "made_from": made_from,
            "facts": facts,
            "dtype": "uint16" if tokenizer.n_tokens <= 2**16 else "uint32",
            "shards": [],
            "whole": False,
        }
        _write_index(directory, index)
    if not index["whole"]:
        tokenizer = Tokenizer.from_pretrained(directory)
        documents = itertools.islice(
            source.documents(index["facts"]), total(index, "documents"), None
        )
        with tqdm(
            desc="tokenizing",
            initial=total(index, "bytes"),
            total=index["facts"].get("bytes"),
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar:
            while not index["whole"]:
                shard = _write_shard(
                    documents, tokenizer, directory, len(index["shards"]), index["dtype"], bar
                )
                index["shards"].append(shard)
                index["whole"] = (
                    shard["train"]["bytes"] + shard["val"]["bytes"] < SHARD_BYTES
                )  # the documents have run out
                _write_index(directory, index)
    return index


def _write_shard(documents, tokenizer, directory, number, dtype, bar):
    """Write one shard of the next (split, text) `documents`, until they hold SHARD_BYTES or run out. Returns its counts."""
    counts = {split: dict(documents=0, bytes=0, tokens=0) for split in SPLITS}
    with (
        open(shard_path(directory, "train", number), "wb") as train,
        open(shard_path(directory, "val", number), "wb") as val,
    ):
        files = {"train": train, "val": val}
        while sum(c["bytes"] for c in counts.values()) < SHARD_BYTES and (
            batch := _take(documents, BATCH_BYTES)
        ):
            for (split, nbytes, _), ids in zip(
                batch, tokenizer.encode_many([text for _, _, text in batch])
            ):
                ids.append(tokenizer.document_end)
                files[split].write(np.array(ids, dtype).tobytes())
                for name, n in zip(counts[split], (1, nbytes, len(ids))):
                    counts[split][name] += n
                bar.update(nbytes)
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    return counts


def _take(documents, size):
    """The next (split, text) documents that together hold `size` bytes or more, as (split, bytes, text)."""
    batch, total = [], 0
    while total < size and (document := next(documents, None)):
        split, text = document
        batch.append((split, len(text.encode()), text))
        total += batch[-1][1]
    return batch


class Windows:
    """Batches of (inputs, targets), both (rows, T), from token files: every epoch visits each window of T + 1 tokens, none of
    which reaches into a second shard, once, in an order given by (seed, epoch). A global batch is the same whatever the
    number of ranks; each rank takes its share of it."""

    def __init__(self, directory, split, seq_len, rows, seed=0, rank=0, world_size=1):
        index = read_index(directory)
        if not index.get("whole"):
            raise ValueError(
                f"the token files in {directory} are not whole: train_base.py makes them"
            )
        self.n_tokens = total(index, "tokens", [split])
        self.bytes_per_token = total(index, "bytes", [split]) / max(1, self.n_tokens)
        windows = [max(0, shard[split]["tokens"] - 1) // seq_len for shard in index["shards"]]
        self.ends = np.cumsum(windows)  # of the shards' windows, when all are numbered through
        self.n = int(self.ends[-1])
        if self.n < rows:
            raise ValueError(
                f"the {split} split has {self.n} windows of {seq_len} tokens, fewer than the {rows} of one "
                f"batch: lower --batch_tokens or --seq_len, or give more text"
            )
        self.shards = [
            np.memmap(shard_path(directory, split, i), index["dtype"], "r") if n else None
            for i, n in enumerate(windows)
        ]
        self.T, self.rows, self.seed, self.rank, self.world_size = (
            seq_len,
            rows,
            seed,
            rank,
            world_size,
        )
        self.cursor = 0  # windows handed out so far
        self.epoch = None

    def state_dict(self):
        return {"cursor": self.cursor, "n": self.n}

    def load_state_dict(self, state):
        check_same_data(state, self.n)
        self.cursor = state["cursor"]

    def _window(self, position):
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(self.n),
            )
        window = self.order[i]
        shard = np.searchsorted(self.ends, window, side="right")
        start = (window - self.ends[shard - 1] if shard else window) * self.T
        return self.shards[shard][start : start + self.T + 1].astype(np.int64)

    def next(self):
        rows = [self._window(self.cursor + i) for i in range(self.rank, self.rows, self.world_size)]
        self.cursor += self.rows
        both = torch.from_numpy(np.array(rows, np.int64).reshape(-1, self.T + 1))  # (rows, T + 1)
        return both[:, :-1], both[:, 1:]


def check_same_data(state, n):
    """A cursor means something only in the data it comes from."""
    if state["n"] != n:
        raise ValueError(
            f"the data has changed: {n:,} windows or examples, {state['n']:,} when the run was saved; put it back, or start another --run_name"
        )
