"""Token files, windows and packed rows: everything once, nothing mixed up, and resumable."""
import json
import os
import random

import numpy as np
import pytest
import torch

from nanorl.data import PackedRows, Windows, pack, tokenize


# ---- tokenize -------------------------------------------------------------------------------------------------

TEXTS = [("train", "the cat sat"), ("val", "12 + 34"), ("train", ""), ("train", "µ on the mat"), ("val", "the end")]


def stored(directory, split):
    with open(os.path.join(directory, "tokens.json")) as f:
        return np.fromfile(os.path.join(directory, split + ".bin"), json.load(f)["dtype"]).tolist()


def test_documents_go_to_their_split_each_with_its_boundary(tmp_path, tokenizer):
    info = tokenize(iter(TEXTS), tokenizer, str(tmp_path))
    assert info["dtype"] == "uint16"  # half the disk, as long as the ids fit
    for split in ("train", "val"):
        ids = [i for s, text in TEXTS if s == split for i in tokenizer.encode(text) + [tokenizer.document_end]]
        assert stored(tmp_path, split) == ids and info["tokens"][split] == len(ids)
        assert info["bytes"][split] == sum(len(text.encode()) for s, text in TEXTS if s == split)


def test_documents_are_written_as_they_come(tmp_path, tokenizer):
    written = []

    def documents():  # far more than the file's buffer holds; a list of all would be written only at the end
        for _ in range(300):
            yield "train", "12 + 34 " * 50
            written.append(os.path.getsize(tmp_path / "train.bin"))
    tokenize(documents(), tokenizer, str(tmp_path))
    assert written[150] > 0 and written[-1] > 1.5 * written[150]


def test_a_whole_directory_is_left_as_it_is_and_another_is_made_again(tmp_path, tokenizer):
    def dying():
        yield "train", "the cat"
        raise RuntimeError("the documents are read")
    with pytest.raises(RuntimeError):
        tokenize(dying(), tokenizer, str(tmp_path))
    info = tokenize(TEXTS, tokenizer, str(tmp_path))  # tokens.json was not there: what was left is not trusted
    before = stored(tmp_path, "train")
    assert len(before) == info["tokens"]["train"]
    assert tokenize(dying(), tokenizer, str(tmp_path)) == info  # whole: not even looked at
    assert stored(tmp_path, "train") == before
    os.remove(tmp_path / "tokens.json")
    assert tokenize(TEXTS[:2], tokenizer, str(tmp_path))["tokens"]["train"] == len(stored(tmp_path, "train")) < len(before)


def test_a_vocabulary_beyond_16_bits(tmp_path):
    class Wide:
        n_tokens, document_end = 2 ** 16 + 1, 2 ** 16

        def encode(self, text):
            return [ord(c) for c in text]
    tokenize([("train", "ab"), ("val", "c")], Wide(), str(tmp_path))
    assert stored(tmp_path, "train") == [97, 98, 65536] and stored(tmp_path, "val") == [99, 65536]


# ---- windows --------------------------------------------------------------------------------------------------

T = 8


@pytest.fixture
def corpus(tmp_path):
    """Tokens 0, 1, 2, ...: ten windows of 8 and a rest, so that a window's first token tells which it is."""
    np.arange(10 * T + 4, dtype="uint16").tofile(tmp_path / "train.bin")
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "uint16", "tokens": {"train": 84}, "bytes": {"train": 210}}))
    return str(tmp_path)


def starts(windows, batches):
    """Which windows come, in order; checks that each is a stretch of the text and its targets the next tokens."""
    found = []
    for _ in range(batches):
        inputs, targets = windows.next()
        assert inputs.dtype == torch.int64 and (targets == inputs + 1).all()
        assert (inputs == inputs[:, :1] + torch.arange(T)).all()
        found += inputs[:, 0].tolist()
    return found


def test_every_window_once_an_epoch_in_an_order_of_its_own(corpus):
    seen = starts(Windows(corpus, "train", T, rows=3), 10)  # three epochs; batches straddle them
    epochs = [seen[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(0, 80, T)) for epoch in epochs)
    other = starts(Windows(corpus, "train", T, rows=3, seed=1), 4)[:10]
    assert sorted(other) == sorted(seen[:10])
    assert len({tuple(order) for order in [*epochs, other]}) == 4
    assert starts(Windows(corpus, "train", T, rows=3), 10) == seen
    assert Windows(corpus, "train", T, rows=3).bytes_per_token == 2.5


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_windows_of_all_ranks_are_the_batch_of_one(corpus, world_size):
    whole = Windows(corpus, "train", T, rows=6)
    ranks = [Windows(corpus, "train", T, rows=6, rank=r, world_size=world_size) for r in range(world_size)]
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


def test_too_small_a_corpus_is_refused(corpus):
    assert len(starts(Windows(corpus, "train", T, rows=10), 1)) == 10
    with pytest.raises(ValueError, match="has 10 windows of 8 tokens, fewer than the 11 of one batch: lower --batch_tokens"):
        Windows(corpus, "train", T, rows=11)


# ---- packing --------------------------------------------------------------------------------------------------

def test_packing_keeps_examples_whole_and_fills_rows():
    rng = random.Random(0)
    examples = [([i] * n, [0] * n) for i, n in enumerate(rng.randrange(20, 61) for _ in range(1000))]
    rows = pack(examples, 256)
    used = [sum(len(ids) for ids, _ in row) for row in rows]
    assert max(used) <= 256
    assert sorted((e for row in rows for e in row), key=lambda e: e[0][0]) == examples
    assert sum(used) / (256 * len(rows)) > 0.95
    assert pack(examples, 256) == rows


def test_an_example_must_fit_a_row():
    assert pack([([1] * 8, [0] * 8)], 8) == [[([1] * 8, [0] * 8)]]
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit a row of 8: raise --seq_len"):
        pack([([1] * 9, [0] * 9)], 8)


N, WIDTH, PAD = 50, 63, 9


def example(i):
    """Ids that tell the example and the place in it; a mask with holes, like a conversation of several turns."""
    n = random.Random(i).randrange(5, 31)
    return [100 * (i + 1) + k for k in range(n)], [int(k > 1 and (k + i) % 4 > 0) for k in range(n)]


def make_rows(**settings):
    return PackedRows(example, N, WIDTH, **{**dict(rows=2, chunk=16, pad=PAD), **settings})


def examples_in(batch):
    """Takes rows apart again, and checks every entry of them. Returns the examples' numbers, row by row."""
    found = []
    for inputs, targets, mask, document in zip(*(t.tolist() for t in batch)):
        assert len(inputs) == len(targets) == len(mask) == len(document) == WIDTH
        tokens = inputs + targets[-1:]
        at, expected_mask, expected_document, row = 0, [], [], []
        while at < len(tokens) and tokens[at] != PAD:
            i = tokens[at] // 100 - 1
            ids, m = example(i)
            assert tokens[at:at + len(ids)] == ids
            row.append(i)
            expected_mask += m
            expected_document += [len(row)] * len(ids)
            at += len(ids)
        rest = WIDTH + 1 - at
        assert tokens[at:] == [PAD] * rest and targets == tokens[1:]
        assert mask == (expected_mask + [0] * rest)[1:]  # of the target at each place
        assert document == (expected_document + [0] * rest)[:-1]  # of the input
        found.append(row)
    return found


def test_rows_hold_examples_mask_and_document_aligned():
    source, seen = make_rows(), []
    while len(seen) < 3 * N:
        for row in examples_in(source.next()):
            assert row
            seen += row
    epochs = [seen[i:i + N] for i in (0, N, 2 * N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    other = sum((examples_in(source.next()) for source in [make_rows(seed=1)] for _ in range(9)), [])
    chunks = [set(order[:16]) for order in [*epochs, sum(other, [])]]  # what is packed together differs, not only its order
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
    assert {(0, True, True), (1, False, True), (1, True, True)} <= positions  # it was tried where it is hard


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_packed_rows_of_all_ranks_are_the_batch_of_one(world_size):
    whole = make_rows(rows=6)
    ranks = [make_rows(rows=6, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(6):
        shares = [examples_in(r.next()) for r in ranks]
        assert sorted(sum(shares, [])) == sorted(examples_in(whole.next()))


def test_a_row_holds_one_token_more_than_the_model_reads():
    def one(n):
        return PackedRows(lambda i: (list(range(n)), [1] * n), 1, 8, rows=1).next()
    inputs, targets, mask, document = one(9)
    assert inputs.tolist() == [list(range(8))] and targets.tolist() == [list(range(1, 9))] and mask.all() and document.all()
    with pytest.raises(ValueError, match="does not fit"):
        one(10)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="no training examples"):
        PackedRows(example, 0, WIDTH, rows=2)
