"""Token files, windows and packed rows: everything once, nothing mixed up, and resumable."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from nanorl.data import tokens as data
from nanorl.data.packing import PackedRows, pack_rows
from nanorl.data.tokens import Windows, read_index, shard_path, tokenize
from nanorl.tokenizer import Tokenizer

# ---- tokenize ------------------------------------------------------------------------------------

TEXTS = [
    ("train", "the cat sat"),
    ("val", "12 + 34"),
    ("train", ""),
    ("train", "µ on the mat"),
    ("val", "the end"),
]


class Source:
    """Documents for tokenize(). It counts what it is asked for.

    dies: the number of the document before which it dies, as a process does.
    """

    def __init__(self, documents, dies=None, **made_from):
        self.pairs = documents
        self.dies = dies
        self.made_from = made_from
        self.surveys = 0
        self.given = 0

    def survey(self):
        self.surveys += 1
        return sorted({text for _, text in self.pairs}), {"name": "texts", "notes": []}

    def documents(self, facts):
        for i, pair in enumerate(self.pairs):
            if i == self.dies:
                raise RuntimeError("killed")
            self.given += 1
            yield pair


def stored(directory, split):
    """The split's ids, in the order of the shards."""
    index = read_index(directory)
    return [
        i
        for number in range(len(index["shards"]))
        for i in np.fromfile(shard_path(directory, split, number), index["dtype"]).tolist()
    ]


def files_in(directory):
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


@pytest.mark.parametrize("shard_bytes", [10**8, 8])
def test_documents_go_to_their_split_each_with_its_boundary(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(data, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(data, "BATCH_BYTES", 4)
    index = tokenize(Source(TEXTS), 280, tmp_path)
    # uint16 takes half the disk, as long as the ids fit.
    assert index == read_index(tmp_path) and index["whole"] and index["dtype"] == "uint16"
    assert (len(index["shards"]) == 1) == (shard_bytes > 8)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for split in ("train", "val"):
        texts = [text for s, text in TEXTS if s == split]
        ids = [i for text in texts for i in tokenizer.encode(text) + [tokenizer.document_end]]
        total = {
            name: data.total(index, name, [split]) for name in ("documents", "bytes", "tokens")
        }
        assert stored(tmp_path, split) == ids and total["tokens"] == len(ids)
        size = sum(len(text.encode()) for text in texts)
        assert total["bytes"] == size and total["documents"] == len(texts)


def test_documents_are_written_as_they_come(tmp_path, monkeypatch):
    written = []

    class Watching(Source):
        # Far more than a batch and the file's buffer hold. A list of all would be written only at
        # the end.
        def documents(self, facts):
            for pair in super().documents(facts):
                yield pair
                written.append(os.path.getsize(tmp_path / "train_00000.bin"))

    monkeypatch.setattr(data, "BATCH_BYTES", 10_000)
    tokenize(Watching([("train", "12 + 34 " * 500)] * 100), 280, tmp_path)
    assert written[50] > 0 and written[-1] > 1.5 * written[50]


def test_killed_and_started_again_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 400)
    monkeypatch.setattr(data, "BATCH_BYTES", 60)
    rng = random.Random(0)
    documents = [
        (rng.choice(["train", "train", "val"]), "the cat sat " * rng.randrange(1, 6))
        for _ in range(100)
    ]
    tokenize(Source(documents), 280, tmp_path / "whole")
    expected = files_in(tmp_path / "whole")
    assert len(read_index(tmp_path / "whole")["shards"]) > 8
    for dies in (0, 31, 62, 99):
        killed = Source(documents, dies)
        with pytest.raises(RuntimeError):
            tokenize(killed, 280, tmp_path / "killed")
        assert not read_index(tmp_path / "killed")["whole"]
        before = {
            name: os.stat(tmp_path / "killed" / name).st_mtime_ns
            for name in os.listdir(tmp_path / "killed")
        }
        whole_shards = len(read_index(tmp_path / "killed")["shards"])
        again = Source(documents)
        tokenize(again, 280, tmp_path / "killed")
        # No second survey: the tokenizer was there.
        assert files_in(tmp_path / "killed") == expected and again.surveys == 0
        kept = ["tokenizer.json"] + [
            f"{split}_{i:05d}.bin" for split in ("train", "val") for i in range(whole_shards)
        ]
        assert all(os.stat(tmp_path / "killed" / name).st_mtime_ns == before[name] for name in kept)
        shutil.rmtree(tmp_path / "killed")


def test_what_is_whole_is_left_and_what_was_made_from_something_else_is_made_again(tmp_path):
    index = tokenize(Source(TEXTS, text="a"), 280, tmp_path)
    same = Source(TEXTS, text="a")
    assert tokenize(same, 280, tmp_path) == index and same.surveys == same.given == 0
    for documents, vocab_size, made_from in [(TEXTS, 280, "b"), (TEXTS[:2], 270, "b")]:
        other = Source(documents, text=made_from)
        (tmp_path / "train_00007.bin").write_text("of another time")
        assert tokenize(other, vocab_size, tmp_path)["made_from"] == {
            "text": made_from,
            "vocab_size": vocab_size,
        }
        assert (
            other.surveys == 1
            and other.given == len(documents)
            and not (tmp_path / "train_00007.bin").exists()
        )
    # The index of an earlier nanorl.
    earlier = {"made_from": {"text": "b", "vocab_size": 270}, "tokens": {}}
    (tmp_path / "tokens.json").write_text(json.dumps(earlier))
    older = Source(TEXTS[:2], text="b")
    assert tokenize(older, 270, tmp_path)["whole"] and older.given == 2


def test_a_vocabulary_beyond_16_bits(tmp_path, monkeypatch):
    class Wide:
        n_tokens, document_end = 2**16 + 1, 2**16
        train = classmethod(lambda cls, texts, vocab_size: cls())
        from_pretrained = classmethod(lambda cls, path: cls())

        def save(self, path):
            pass

        def encode_many(self, texts, threads):
            return [[ord(c) for c in text] for text in texts]

    monkeypatch.setattr(data, "Tokenizer", Wide)
    tokenize(Source([("train", "ab"), ("val", "c")]), 10**5, tmp_path)
    assert stored(tmp_path, "train") == [97, 98, 65536] and stored(tmp_path, "val") == [99, 65536]


# ---- windows -------------------------------------------------------------------------------------

T = 8


def shards_of(directory, *counts):
    """Token files of `counts` tokens, with 2.5 bytes a token.

    The first holds 0, 1, 2, ..., the second 1000, 1001, ..., and so on.
    """
    for i, n in enumerate(counts):
        np.arange(1000 * i, 1000 * i + n, dtype="uint16").tofile(shard_path(directory, "train", i))
    index = {
        "dtype": "uint16",
        "whole": True,
        "shards": [{"train": {"tokens": n, "bytes": 2.5 * n}} for n in counts],
    }
    (directory / "tokens.json").write_text(json.dumps(index))
    return str(directory)


@pytest.fixture
def corpus(tmp_path):
    """Tokens 0, 1, 2, ...: ten windows of 8 and a rest. A window's first token tells its number."""
    return shards_of(tmp_path, 10 * T + 4)


def starts(windows, batches):
    """The first tokens of the windows that come, in order.

    It checks that each window is a stretch of the text and that its targets are the next tokens.
    """
    found = []
    for _ in range(batches):
        inputs, targets = windows.next()
        assert inputs.dtype == torch.int64 and (targets == inputs + 1).all()
        assert (inputs == inputs[:, :1] + torch.arange(T)).all()
        found += inputs[:, 0].tolist()
    return found


def test_every_window_once_an_epoch_in_an_order_of_its_own(corpus):
    seen = starts(Windows(corpus, "train", T, rows=3), 10)  # three epochs; batches straddle them
    epochs = [seen[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(0, 80, T)) for epoch in epochs)
    other = starts(Windows(corpus, "train", T, rows=3, seed=1), 4)[:10]
    assert sorted(other) == sorted(seen[:10])
    assert len({tuple(order) for order in [*epochs, other]}) == 4
    assert starts(Windows(corpus, "train", T, rows=3), 10) == seen
    assert Windows(corpus, "train", T, rows=3).bytes_per_token == 2.5


def test_windows_over_shards_each_once_and_none_in_two(tmp_path):
    # 3 windows, none (T tokens lack a target), none, 4 and 1.
    corpus = shards_of(tmp_path, 3 * T + 1, T, 0, 4 * T + T, T + 1)
    expected = [*range(0, 3 * T, T), *range(3000, 3000 + 4 * T, T), 4000]
    windows = Windows(corpus, "train", T, rows=2)
    assert (
        windows.n == len(expected) == 8
        and windows.n_tokens == 10 * T + 2
        and windows.bytes_per_token == 2.5
    )
    seen = starts(windows, 12)  # starts() checks that a window's tokens follow each other
    assert all(sorted(seen[i : i + 8]) == expected for i in (0, 8, 16)) and seen[:8] != seen[8:16]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_windows_of_all_ranks_are_the_batch_of_one(corpus, world_size):
    whole = Windows(corpus, "train", T, rows=6)
    ranks = [Windows(corpus, "train", T, rows=6, ranks=(r, world_size)) for r in range(world_size)]
    for _ in range(5):
        assert sorted(sum((starts(r, 1) for r in ranks), [])) == sorted(starts(whole, 1))


def test_windows_resume(corpus):
    windows = Windows(corpus, "train", T, rows=3)
    for _ in range(12):
        state = json.loads(json.dumps(windows.state_dict()))
        again = Windows(corpus, "train", T, rows=3)
        starts(again, 2)  # wherever it stood
        again.load_state_dict(state)
        expected = starts(windows, 1)
        assert starts(again, 1) == expected


def test_a_cursor_of_other_data_is_refused(corpus, tmp_path):
    state = Windows(corpus, "train", T, rows=3).state_dict()
    os.makedirs(tmp_path / "b")
    with pytest.raises(
        ValueError, match="the data has changed: 11 windows or examples, 10 when the run was saved"
    ):
        Windows(shards_of(tmp_path / "b", 11 * T + 4), "train", T, rows=3).load_state_dict(state)
    with pytest.raises(ValueError, match="the data has changed: 50 .* 49 "):
        make_rows().load_state_dict({"position": 0, "offset": 0, "n": N - 1})


def test_token_files_that_are_not_whole_are_refused(corpus, tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps({**read_index(corpus), "whole": False}))
    with pytest.raises(ValueError, match="not whole"):
        Windows(corpus, "train", T, rows=1)


def test_too_small_a_corpus_is_refused(corpus):
    assert len(starts(Windows(corpus, "train", T, rows=10), 1)) == 10
    with pytest.raises(
        ValueError,
        match="has 10 windows of 8 tokens, fewer than the 11 of one batch: lower --batch_tokens",
    ):
        Windows(corpus, "train", T, rows=11)


# ---- packing -------------------------------------------------------------------------------------


def test_packing_keeps_examples_whole_and_fills_rows():
    rng = random.Random(0)
    examples = [
        ([i] * n, [0] * n) for i, n in enumerate(rng.randrange(20, 61) for _ in range(1000))
    ]
    rows = pack_rows(examples, 256)
    used = [sum(len(ids) for ids, _ in row) for row in rows]
    assert max(used) <= 256
    assert sorted((e for row in rows for e in row), key=lambda e: e[0][0]) == examples
    assert sum(used) / (256 * len(rows)) > 0.95
    assert pack_rows(examples, 256) == rows


def test_an_example_must_fit_a_row():
    assert pack_rows([([1] * 8, [0] * 8)], 8) == [[([1] * 8, [0] * 8)]]
    with pytest.raises(
        ValueError, match="an example of 9 tokens does not fit a row of 8: raise --seq_len"
    ):
        pack_rows([([1] * 9, [0] * 9)], 8)


N, WIDTH, PAD = 50, 63, 9


def example(i):
    """Ids that tell the example and the position in it, and a mask with holes.

    A conversation of several turns has such a mask.
    """
    n = random.Random(i).randrange(5, 31)
    return [100 * (i + 1) + k for k in range(n)], [int(k > 1 and (k + i) % 4 > 0) for k in range(n)]


def make_rows(**settings):
    return PackedRows(example, N, WIDTH, **{**dict(rows=2, chunk=16, pad=PAD), **settings})


def examples_in(batch):
    """Takes rows apart again, and checks every entry. Returns the examples' numbers, row by row."""
    found = []
    for inputs, targets, mask, document, positions in zip(*(t.tolist() for t in batch)):
        assert len(inputs) == len(targets) == len(mask) == len(document) == WIDTH
        tokens = inputs + targets[-1:]
        expected_mask, expected_document, expected_positions = [], [], []
        at, row = 0, []
        while at < len(tokens) and tokens[at] != PAD:
            i = tokens[at] // 100 - 1
            ids, m = example(i)
            assert tokens[at : at + len(ids)] == ids
            row.append(i)
            expected_mask += m
            expected_document += [len(row)] * len(ids)
            expected_positions += range(len(ids))
            at += len(ids)
        rest = WIDTH + 1 - at
        assert tokens[at:] == [PAD] * rest and targets == tokens[1:]
        assert mask == (expected_mask + [0] * rest)[1:]  # of the target in each slot
        assert document == (expected_document + [0] * rest)[:-1]  # of the input
        assert positions == (expected_positions + list(range(rest)))[:-1]
        found.append(row)
    return found


def test_rows_hold_examples_mask_and_document_aligned():
    source, seen = make_rows(), []
    while len(seen) < 3 * N:
        for row in examples_in(source.next()):
            assert row
            seen += row
    epochs = [seen[i : i + N] for i in (0, N, 2 * N)]
    assert (
        all(sorted(epoch) == list(range(N)) for epoch in epochs)
        and len({tuple(e) for e in epochs}) == 3
    )
    source, other = make_rows(seed=1), []
    for _ in range(9):
        for row in examples_in(source.next()):
            other += row
    # What is packed together differs, and not only its order.
    chunks = [set(order[:16]) for order in [*epochs, other]]
    assert all(a != b for i, a in enumerate(chunks) for b in chunks[:i])


def test_packed_rows_resume_in_a_chunk_and_across_an_epoch():
    source = make_rows()
    positions = set()
    for _ in range(25):
        state = json.loads(json.dumps(source.state_dict()))
        positions.add((state["position"] // N, state["position"] % N > 0, state["offset"] > 0))
        again = make_rows()
        again.next()  # wherever it stood
        again.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(source.next(), again.next(), strict=True))
    # It was tried where it is hard.
    assert {(0, True, True), (1, False, True), (1, True, True)} <= positions


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_packed_rows_of_all_ranks_are_the_batch_of_one(world_size):
    whole = make_rows(rows=6)
    ranks = [make_rows(rows=6, ranks=(r, world_size)) for r in range(world_size)]
    for _ in range(6):
        shares = [examples_in(r.next()) for r in ranks]
        assert sorted(sum(shares, [])) == sorted(examples_in(whole.next()))


def test_a_row_holds_one_token_more_than_the_model_reads():
    def one(n):
        return PackedRows(lambda i: (list(range(n)), [1] * n), 1, 8, rows=1).next()

    inputs, targets, mask, document, _ = one(9)
    assert (
        inputs.tolist() == [list(range(8))]
        and targets.tolist() == [list(range(1, 9))]
        and mask.all()
        and document.all()
    )
    with pytest.raises(ValueError, match="does not fit"):
        one(10)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="no training examples"):
        PackedRows(example, 0, WIDTH, rows=2)
