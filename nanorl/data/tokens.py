"""Training tokens of base: documents -> token files -> windows.

Order is a pure function of (seed, epoch), so a cursor, one integer, is all the state there is.
"""

import hashlib
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from nanorl.tasks.cores import cpus
from nanorl.tokenizer import Tokenizer

SHARD_BYTES = 100_000_000  # of text in a shard
BATCH_BYTES = 1 << 20  # of text encoded at a time
SPLITS = ("train", "val")


# ---- the index -----------------------------------------------------------------------------------


def shard_path(directory, split, number):
    return os.path.join(directory, f"{split}_{number:05d}.bin")


def read_index(directory):
    """tokens.json, which says what token files there are, or {} where there is no such file.

    whole: whether all of them are written. made_from, enough: see tokenize. facts: what the source
    says about its documents. dtype: of the ids. shards: a list with, for each split, its
    `documents`, `bytes` of text and `tokens`, and besides a hash of its `content` and the source's
    `position` after it.
    """
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


def content_of_shards(index):
    """A hash of all the token files, or "" where the index was written before it had one."""
    hashes = [shard.get("content", "") for shard in index["shards"]]
    if not all(hashes):
        return ""
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def describe(index):
    """The index in words, with a line for each note."""
    facts = index["facts"]
    documents = total(index, "documents")
    validating = total(index, "documents", ["val"])
    nbytes = total(index, "bytes")
    tokens = total(index, "tokens")
    summary = (
        f"{facts['name']}, {documents:,} documents ({validating:,} to validate), "
        f"{nbytes / 1e6:,.1f} MB -> {tokens:,} tokens, {nbytes / tokens:.2f} bytes a token"
    )
    enough = index.get("enough", 0)
    if total(index, "tokens", ["train"]) < enough:
        summary += f"; there is no more, though {enough:,} to train on are wanted"
    return "\n        ".join([summary, *facts["notes"]])


# ---- documents -> token files --------------------------------------------------------------------


def tokenize(source, vocab_size, directory, enough=0):
    """Write a source's documents into `directory`, as token files. Returns the index (read_index).

    The directory gets a tokenizer that is trained on some of the documents, and shards of token
    ids, train_00000.bin, val_00000.bin and so on. Each document is followed by the boundary token.
    The index is written after every shard. When a process has died, the next one goes on after
    the shards that are whole. What was made from something else is made again.

    enough: the last shard is the one with which the training tokens are so many (0: all documents
    are written). The shards for a larger number begin with those for a smaller one, and those that
    are there already are kept.

    source has
        survey()          -> (texts to train the tokenizer on, facts)
        documents(facts)  yields (split, text), always the same
        made_from         a dict of what the documents depend on
        position          if it has one: of the document that was yielded last;
                          documents(facts, position) yields those after it
    """
    index = read_index(directory)
    if index.get("made_from") != _made_from(source, vocab_size) or "shards" not in index:
        index = train_tokenizer(source, vocab_size, directory)

    # As many of the shards that are there as are wanted.
    shards = index["shards"]
    index["shards"] = []
    index["enough"] = enough
    index["whole"] = False
    for shard in shards:
        if not index["whole"]:
            _add_shard(index, shard)
    _write_index(directory, index)

    if not index["whole"]:
        _write_shards(source, directory, index)
    return index


def _add_shard(index, shard):
    """Append a shard to an index, and note whether it is the last."""
    index["shards"].append(shard)
    # A shard that is not full is the last: the documents have run out.
    ended = _text_bytes(shard) < SHARD_BYTES
    enough = index["enough"]
    index["whole"] = ended or 0 < enough <= total(index, "tokens", ["train"])


def _made_from(source, vocab_size):
    return {**source.made_from, "vocab_size": vocab_size}


def train_tokenizer(source, vocab_size, directory):
    """Make the directory anew, with a tokenizer and an index of no shards. Returns the index."""
    texts, facts = source.survey()
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(directory)
    index = {
        "made_from": _made_from(source, vocab_size),
        "facts": facts,
        "dtype": "uint16" if tokenizer.n_tokens <= 2**16 else "uint32",
        "shards": [],
        "whole": False,
    }
    _write_index(directory, index)
    return index


def _write_shards(source, directory, index):
    """Write the shards that are missing, and the index after each."""
    tokenizer = Tokenizer.from_pretrained(directory)
    batches = _batches(source, index)
    with _progress(index) as bar:
        while not index["whole"]:
            shard = _write_shard(batches, tokenizer, directory, index, bar)
            _add_shard(index, shard)
            _write_index(directory, index)
    batches.close()


def _progress(index):
    """A bar over the tokens that are wanted, else over the bytes of text that there are."""
    unit = _unit(index)
    return tqdm(
        desc="tokenizing",
        initial=total(index, unit),
        total=index["enough"] or index["facts"].get("bytes"),
        unit=unit,
        unit_scale=True,
        disable=None,
    )


def _unit(index):
    return "tokens" if index["enough"] else "bytes"


def _write_shard(batches, tokenizer, directory, index, bar):
    """Write the next shard of an index. Returns its counts, its content and its position.

    It ends when its documents hold SHARD_BYTES or run out.
    """
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    content = hashlib.blake2b(digest_size=16)
    position = None
    number, dtype, unit = len(index["shards"]), index["dtype"], _unit(index)
    with (
        open(shard_path(directory, "train", number), "wb") as train,
        open(shard_path(directory, "val", number), "wb") as val,
    ):
        files = {"train": train, "val": val}
        while _text_bytes(counts) < SHARD_BYTES:
            batch, position = next(batches)
            if not batch:
                break
            encoded = tokenizer.encode_many([text for _, _, text in batch], cpus())
            for (split, nbytes, _), ids in zip(batch, encoded):
                ids.append(tokenizer.document_end)
                data = np.array(ids, dtype).tobytes()
                files[split].write(data)
                content.update(data)
                added = {"documents": 1, "bytes": nbytes, "tokens": len(ids)}
                for name, count in added.items():
                    counts[split][name] += count
                bar.update(added[unit])
        # The shard is on disk before the index names it.
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    return {**counts, "content": content.hexdigest(), "position": position}


def _text_bytes(shard):
    """Bytes of text in a shard, of both splits."""
    return shard["train"]["bytes"] + shard["val"]["bytes"]


def _batches(source, index):
    """Yield (batch, position) of the documents that no shard holds yet; at their end, no batch.

    A batch is a list of (split, bytes, text) that holds BATCH_BYTES or more. The next one is read,
    by a thread, while the last is encoded.
    """
    position = index["shards"][-1].get("position") if index["shards"] else None
    if position:
        documents = source.documents(index["facts"], position)
    else:
        done = total(index, "documents")
        documents = itertools.islice(source.documents(index["facts"]), done, None)

    def take():
        batch = _take(documents, BATCH_BYTES)
        return batch, getattr(source, "position", None)

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(take)
        while True:
            taken = coming.result()
            coming = reader.submit(take)
            yield taken


def _take(documents, size):
    """The next documents that together hold `size` bytes or more, as (split, bytes, text)."""
    batch = []
    taken = 0
    while taken < size:
        document = next(documents, None)
        if document is None:
            break
        split, text = document
        nbytes = len(text.encode())
        batch.append((split, nbytes, text))
        taken += nbytes
    return batch


# ---- token files -> windows ----------------------------------------------------------------------


class Windows:
    """Batches of (inputs, targets), both (rows, T), from token files.

    A window is T + 1 tokens of one shard. Every epoch visits each window once, in an order given
    by (seed, epoch). A global batch has `rows` windows and is the same for any number of ranks.
    Each rank takes its share of it. ranks: this one's number, and how many there are. Raises
    ValueError where the token files are not whole, or too few for one batch.
    """

    def __init__(self, directory, split, seq_len, rows, seed=0, ranks=(0, 1)):
        index = read_index(directory)
        if not index.get("whole"):
            raise ValueError(
                f"the token files in {directory} are not whole: train_base.py makes them"
            )
        self.n_tokens = total(index, "tokens", [split])
        self.bytes_per_token = total(index, "bytes", [split]) / max(1, self.n_tokens)

        # Windows are numbered through all shards. Every input needs a target, so a shard's last
        # token is in no window's inputs.
        counts = [max(0, shard[split]["tokens"] - 1) // seq_len for shard in index["shards"]]
        self.ends = np.cumsum(counts)  # for each shard, the number after its last window
        self.starts = self.ends - counts  # and the number of its first
        self.n = int(self.ends[-1])  # windows of an epoch
        if self.n < rows:
            raise ValueError(
                f"the {split} split has {self.n} windows of {seq_len} tokens, fewer than "
                f"the {rows} of one batch: lower --batch_tokens or --seq_len, or give more text"
            )
        self.shards = []  # ids (tokens,), or None where there is no window
        for number, count in enumerate(counts):
            path = shard_path(directory, split, number)
            self.shards.append(np.memmap(path, index["dtype"], "r") if count else None)

        self.T = seq_len
        self.rows = rows
        self.seed = seed
        self.rank, self.world_size = ranks
        self.cursor = 0  # windows handed out so far
        self.epoch = None  # the one that self.order belongs to

    def state_dict(self):
        return {"cursor": self.cursor, "n": self.n}

    def load_state_dict(self, state):
        check_same_data(state, self.n)
        self.cursor = state["cursor"]

    def next(self):
        """-> inputs, targets, this rank's share of the batch."""
        end = self.cursor + self.rows
        positions = range(self.cursor + self.rank, end, self.world_size)
        windows = [self._window(position) for position in positions]
        self.cursor = end
        # A rank that has no share gets (0, T).
        ids = torch.from_numpy(np.array(windows, np.int64).reshape(-1, self.T + 1))  # (rows, T + 1)
        return ids[:, :-1], ids[:, 1:]

    def _window(self, position):
        """The window at a position of the cursor, ids (T + 1,)."""
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        window = self.order[i]
        shard = np.searchsorted(self.ends, window, side="right")
        start = (window - self.starts[shard]) * self.T
        return self.shards[shard][start : start + self.T + 1].astype(np.int64)


def check_same_data(state, n):
    """Refuse a saved cursor of other data, where it means nothing. Raises ValueError."""
    if state["n"] != n:
        raise ValueError(
            f"the data has changed: {n:,} windows or examples, {state['n']:,} when the run was "
            "saved; put it back, or start another --run_name"
        )


def check_same_content(state, content):
    """Refuse to go on with data that was edited. Raises ValueError.

    state: a run's, whose hash `content` is missing or "" where none was taken.
    """
    if content and state.get("content", "") not in ("", content):
        raise ValueError(
            "the data has changed: there are as many texts as when the run was saved, but other "
            "ones; put them back, or start another --run_name"
        )
