"""Files -> documents and conversations, and the scripts on them.

Nothing is lost, nothing is on two sides, and what is broken is named.
"""

import gzip
import json
import math
import os
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from nanorl.data import corpus
from nanorl.data import tokens as data
from nanorl.data.conversations import messages_of, read_conversations
from nanorl.data.corpus import MAX_BYTES, MIN_BYTES, Corpus, cut, plain_documents
from nanorl.data.packing import pack_rows
from nanorl.data.tokens import read_index
from nanorl.hf import load_model
from nanorl.tasks.files import find_files
from nanorl.tasks.problem import content_hash
from nanorl.tokenizer import Tokenizer
from scripts import assert_same_run, call, rows


def texts_of(patterns, **settings):
    bad, empty = [], []
    return list(Corpus(str(patterns), **settings)._texts(bad, empty)), bad, empty


def write_rows(path, rows):
    """Rows in the kind of file that the name asks for."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
        table = pytest.importorskip("pyarrow").table(columns)
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def paragraphs(n, seed=0, words=60):
    """n different paragraphs of plain words."""
    rng = random.Random(seed)
    return [
        " ".join(
            rng.choice(
                [
                    "the",
                    "cat",
                    "sat",
                    "on",
                    "a",
                    "mat",
                    "müde",
                    "and",
                    "slept",
                    str(rng.randrange(10**6)),
                ]
            )
            for _ in range(words)
        )
        + "."
        for _ in range(n)
    ]


# ---- documents -----------------------------------------------------------------------------------


def test_lines_of_endoftext_end_documents(tmp_path):
    (tmp_path / "a.txt").write_text(
        "one\n\n"
        + "long " * 3000
        + "\n\nstill one\n<|endoftext|>\ntwo <|endoftext|> of it\n"
        + " <|endoftext|> \r\n\n<|endoftext|>\nthree"
    )
    texts, bad, empty = texts_of(tmp_path / "a.txt")
    assert texts == [
        "one\n\n" + "long " * 3000 + "\n\nstill one",
        "two <|endoftext|> of it",
        "three",
    ]
    assert bad == [] and empty == [str(tmp_path / "a.txt")]
    assert Corpus(str(tmp_path / "a.txt")).survey()[1]["notes"] == [
        f"1 empty documents were left out (first: {tmp_path / 'a.txt'})"
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_without_them_a_blank_line_does_once_there_is_enough(tmp_path, newline):
    parts = paragraphs(200)
    (tmp_path / "a.md").write_bytes((2 * newline).join(parts).encode())
    texts = texts_of(tmp_path / "a.md")[0]
    # Nothing is lost but the blank lines between documents.
    assert (2 * newline).join(texts) == (2 * newline).join(parts)
    sizes = [len(text.encode()) for text in texts]
    assert all(MIN_BYTES - 2 <= size < MIN_BYTES + 600 for size in sizes[:-1]) and len(sizes) > 5


def test_a_stretch_without_blank_lines_is_cut_at_white_space(tmp_path):
    lines = paragraphs(1000)
    (tmp_path / "a.txt").write_text("\n".join(lines))
    texts = texts_of(tmp_path / "a.txt")[0]
    assert (
        all(MAX_BYTES - 20 < len(text.encode()) <= MAX_BYTES for text in texts[:-1])
        and len(texts) > 3
    )
    assert "".join(texts) == "\n".join(lines) and all(text[-1].isspace() for text in texts[:-1])


def test_cut_never_splits_a_character():
    for text in ("ü" * 70_000, "a" + "€" * 70_000, "ab" + "🙂" * 40_000, "x " + "é" * 70_000):
        pieces = list(cut(text.encode()))
        assert b"".join(pieces) == text.encode() and all(0 < len(p) <= MAX_BYTES for p in pieces)
        assert "".join(p.decode() for p in pieces) == text
    # There is no character anywhere in this.
    rest = 200_000 - 3 * MAX_BYTES
    assert [len(p) for p in cut(b"\x80" * 200_000)] == [MAX_BYTES] * 3 + [rest]
    assert list(cut(b"")) == [b""]


@pytest.mark.parametrize("text", ["a" * 3_000_000, "so many words " * 220_000, "ü" * 1_500_000])
def test_a_line_of_any_length_in_little_memory(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tracemalloc.start()
    n = sum(len(piece) for piece in plain_documents(str(tmp_path / "a.txt")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n >= len(text.encode()) - 100 and peak < 10 * MAX_BYTES


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_rows_give_their_text_field(tmp_path, name):
    texts = ["first, with a\nline", "", 'µ and "quotes"', "x" * 200_000, "last"]
    path = write_rows(
        tmp_path / name, [{"id": str(i), "body": text} for i, text in enumerate(texts)]
    )
    found, bad, empty = texts_of(path, text_field="body")
    assert (
        found
        == texts[:1]
        + texts[2:3]
        + [texts[3][i : i + MAX_BYTES] for i in range(0, 200_000, MAX_BYTES)]
        + texts[4:]
    )
    assert bad == [] and len(empty) == 1


def test_gz_is_read_like_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    assert texts_of(tmp_path / "b.txt.gz")[0] == texts_of(tmp_path / "a.txt")[0] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Also where files with one were joined."""
    lines = {
        "a.txt": ["<|endoftext|>", "one", "<|endoftext|>", "two"],
        "a.jsonl": ['{"text": "one"}', '{"text": "two"}'],
        "a.csv": ["text,id", "one,1", "two,2"],
    }[name]
    (tmp_path / name).write_text("".join(f"\ufeff{line}\n" for line in lines), encoding="utf-8")
    assert [text for text in texts_of(tmp_path / name)[0] if text] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_bytes_that_are_not_utf8_become_fffd_and_are_counted(tmp_path, name):
    raw = [b"caf\xe9 au lait", "café".encode(), b"cut \xe2\x82", b"plain"]
    if name == "a.txt":
        (tmp_path / name).write_bytes(b"\n<|endoftext|>\n".join(raw))
    elif name == "a.csv":
        (tmp_path / name).write_bytes(b"text\n" + b"\n".join(raw))
    elif name == "a.jsonl":
        (tmp_path / name).write_bytes(b"\n".join(b'{"text": "%s"}' % text for text in raw))
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        # Strings that are not UTF-8, as some writers leave them.
        strings = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, pa.binary()).buffers())
        parquet.write_table(pa.table({"text": strings}), tmp_path / name)
    texts, bad, _ = texts_of(tmp_path / name)
    assert texts == [text.decode(errors="replace") for text in raw] and len(bad) == 2
    notes = Corpus(str(tmp_path / name)).survey()[1]["notes"]
    assert (
        len(notes) == 1
        and "2 documents held bytes that are not UTF-8; they became U+FFFD" in notes[0]
        and name in notes[0]
    )


def test_a_lone_surrogate_of_json_is_no_crash(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "b\\ud83d\\ude42"}\n')
    texts, bad, _ = texts_of(tmp_path / "a.jsonl")
    assert texts[0].startswith("a\ufffd") and texts[1] == "b🙂" and len(bad) == 1


def test_half_of_a_character_in_a_conversation_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud83d\\ude42"}\n{"prompt": "a\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: it holds .ud83d, half of a character"):
        read_conversations(str(tmp_path / "a.jsonl"), tokenizer, 64)


BROKEN = [
    ("a.jsonl", '{"text": "a"}\n\n{"text": "b\n', "a.jsonl, line 3: not JSON"),
    ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl, line 2: not an object"),
    (
        "a.jsonl",
        '{"text": "a"}\n{"id": 1, "body": "b"}\n',
        "a.jsonl, line 2: no field 'text', only id, body.*--text_field=",
    ),
    ("a.jsonl", '{"text": 5}\n', "a.jsonl, line 1: 'text' is 5, not text.*--text_field="),
    ("a.csv", "id,body\n1,b\n", "a.csv, line 2: no field 'text'"),
    ("a.csv", "id,text\n1,b\n2,a, b\n", "a.csv, line 3: it has not the 2 fields"),
    ("a.csv", "text,id\nb,1\na\n", "a.csv, line 3: it has not the 2 fields"),
    ("a.csv", 'text,id\n"b,1\na,2\n', "a.csv, line 3: not CSV"),
    ("a.csv", "text,text\nb,1\n", "a.csv, line 1: two columns have one name"),
    ("a.parquet", "PAR1 and no more", "a.parquet cannot be read"),
    ("a.txt.gz", "not gzip", "a.txt.gz cannot be read"),
    ("a.txt", "a\0b", "a.txt is not UTF-8 text .it holds zero bytes"),
]


@pytest.mark.parametrize("name,content,words", BROKEN)
def test_what_is_broken_is_named(tmp_path, name, content, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        texts_of(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_cut_gz_and_a_parquet_without_the_field_are_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:3000])
    with pytest.raises(ValueError, match="a.txt.gz cannot be read"):
        texts_of(tmp_path / "a.txt.gz")
    with pytest.raises(ValueError, match="a.parquet, row 1: no field 'text', only id, body"):
        texts_of(write_rows(tmp_path / "a.parquet", [{"id": 1, "body": "b"}]))


def test_patterns_find_files_in_order_and_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("more/deep")
    for name in ("b.txt", "a.txt", "odd[1].txt", "more/c.md", "more/deep/d.md"):
        (tmp_path / name).write_text(name)
    assert find_files("b.txt, *.txt ,more/**/*.md") == [
        "b.txt",
        "a.txt",
        "odd[1].txt",
        "more/c.md",
        "more/deep/d.md",
    ]
    assert find_files("odd[1].txt") == ["odd[1].txt"]
    # A comma in a file's name is none between files.
    for name in ("a,b, c.txt", "d,e.txt"):
        (tmp_path / name).write_text(name)
    assert find_files("d,e.txt,a,b, c.txt,a.txt") == ["d,e.txt", "a,b, c.txt", "a.txt"]
    assert find_files("d?e*") == ["d,e.txt"]
    for patterns, words in [
        ("nothing*.txt", "'nothing\\*.txt' is no file and finds none"),
        ("a.txt,gone.txt", "'gone.txt' is no file"),
        ("more", "name its files, such as more/\\*.txt"),
        ("x,*.md", "'x' is no file .* and \\? stands for one in a name"),
        (" , ", "names no file"),
    ]:
        with pytest.raises(ValueError, match=words):
            find_files(patterns)


# ---- which validate, and the tokenizer's sample --------------------------------------------------


def corpus_of(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return Corpus(str(path))


def sides(source):
    """{text: {splits it is on}}"""
    found = {}
    for split, text in source.documents(source.survey()[1]):
        found.setdefault(text, set()).add(split)
    return found


def test_a_document_that_occurs_twice_is_on_one_side(tmp_path):
    texts = paragraphs(3000, words=8)
    found = sides(corpus_of(tmp_path / "a.txt", texts + texts[::-1]))
    assert all(len(splits) == 1 for splits in found.values())
    share = sum(splits == {"val"} for splits in found.values()) / len(found)
    assert 0.012 < share < 0.03
    alone = sides(corpus_of(tmp_path / "b.txt", texts[1000:2000]))
    # Whatever else is in the corpus.
    assert all(found[text] == splits for text, splits in alone.items())


def test_the_smallest_of_corpora_has_both_sides(tmp_path):
    for seed in range(20):
        found = sides(corpus_of(tmp_path / "a.txt", paragraphs(2, seed)))
        assert sorted(map(sorted, found.values())) == [["train"], ["val"]]
    for texts in (["one"], ["one", "one"]):
        with pytest.raises(
            ValueError,
            match=r"1 different documents in 1 file: there must be two or more.*<\|endoftext\|>",
        ):
            corpus_of(tmp_path / "a.txt", texts).survey()


def test_the_tokenizer_sees_a_bounded_sample_spread_over_the_corpus_and_nothing_that_validates(
    tmp_path, monkeypatch
):
    texts = paragraphs(2000, words=20)
    size = len("".join(texts).encode())
    monkeypatch.setattr(corpus, "SAMPLE_BYTES", size // 10)
    source = corpus_of(tmp_path / "a.txt", texts + texts[:500])
    sample, facts = source.survey()
    drawn = [text for text in sample if text in set(texts)]
    assert 0.9 * size / 10 < len("".join(drawn).encode()) <= size / 10
    assert len(set(drawn)) == len(drawn)
    assert 30 < sum(text in set(texts[:500]) for text in drawn) < 80  # a quarter of about 200
    val = {text for split, text in source.documents(facts) if split == "val"}
    monkeypatch.setattr(corpus, "SAMPLE_BYTES", 10 * size)  # all of it is wanted
    sample, facts = source.survey()
    assert val and set(texts) - set(sample) == val and not val & set(drawn)
    assert sample[-1] == "system\nuser\nassistant\n"  # the words of chat headers
    # A text is not chosen by where it stands.
    backwards = corpus_of(tmp_path / "a.txt", texts[::-1])
    assert sorted(backwards.survey()[0]) == sorted(sample)


def test_words_of_any_length_are_cut_for_the_tokenizer(tmp_path):
    texts = ["short words " * 500, "a" * 5000, "one " + "b" * 5000, "word " * 2000]
    sample, facts = corpus_of(tmp_path / "a.txt", texts).survey()
    documents = corpus_of(tmp_path / "a.txt", texts).documents(facts)
    val = {text for split, text in documents if split == "val"}
    assert max(len(word) for text in sample for word in text.split()) == 1024
    expected = []
    for text in texts:
        if text in val:
            continue
        if "aa" in text or "bb" in text:
            expected += [text[i : i + 1024] for i in range(0, len(text), 1024)]
        else:
            expected.append(text)
    assert sorted(sample[:-500]) == sorted(expected)


# ---- conversations -------------------------------------------------------------------------------

U, A, S = (
    {"role": role, "content": content}
    for role, content in [("user", "Hi?"), ("assistant", "Yes."), ("system", "Be brief.")]
)


@pytest.mark.parametrize(
    "row,messages",
    [
        ({"messages": [S, U, A, U, A], "id": 7}, [S, U, A, U, A]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi?"},
                    {"from": "gpt", "value": "Yes."},
                ]
            },
            [S, U, A],
        ),
        ({"conversations": [U, A]}, [U, A]),
        # Parquet fills what is missing with None.
        (
            {"messages": None, "conversations": [{**U, "from": None}, {**A, "from": None}]},
            [U, A],
        ),
        ({"instruction": "Hi?", "input": "", "output": "Yes."}, [U, A]),
        ({"instruction": "Hi?", "output": "Yes."}, [U, A]),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"prompt": "Hi?", "completion": "Yes."}, [U, A]),
        ({"prompt": "Hi?", "messages": [U, A, U, A]}, [U, A, U, A]),
        ({"messages": [U, A], "system": "Be brief."}, [S, U, A]),
        ({"conversations": [S, U, A], "system": ""}, [S, U, A]),
        ({"messages": [U, A], "system": None, "history": None}, [U, A]),
        (
            {
                "instruction": "Hi?",
                "output": "Yes.",
                "system": "Be brief.",
                "history": [["Hi?", "Yes."]],
            },
            [S, U, A, U, A],
        ),
    ],
)
def test_rows_become_messages(row, messages):
    assert messages_of(row) == messages


@pytest.mark.parametrize(
    "row,words",
    [
        (
            {"text": "a", "id": 1},
            "no messages, conversations, instruction or prompt in it, only text, id",
        ),
        ({"messages": "Hi"}, "not a list"),
        ({"messages": ["Hi"]}, "not a list of objects"),
        ({"messages": []}, "its messages are empty"),
        ({"id": 1, "conversations": []}, "its conversations are empty"),
        ({"messages": [U, {"role": "assistant"}]}, "message 2: no 'content' or 'value'"),
        (
            {"messages": [U, {"role": "assistant", "content": [{"text": "Yes."}]}]},
            r"message 2: 'content' is \[.*not a string",
        ),
        ({"messages": [{"content": "Hi"}, A]}, "message 1: no 'role' or 'from'"),
        (
            {"messages": [U, {"role": "tool", "content": "5"}, A]},
            "message 2: role 'tool' is none of system, user, assistant",
        ),
        ({"messages": [U, A, U]}, "the last message is the user's"),
        ({"instruction": "a"}, "no 'output'"),
        ({"instruction": 5, "output": "a"}, "'instruction' is 5, not a string"),
        ({"instruction": "a", "input": 5, "output": "a"}, "'input' is 5, not a string"),
        ({"prompt": "a", "completion": None}, "no 'completion'"),
        ({"messages": [S, U, A], "system": "Be kind."}, "begin with another: keep one"),
        ({"messages": [U, A], "history": [["a", "b"]]}, "both messages and history"),
        ({"prompt": "a", "completion": "b", "history": "a"}, "'history' is not a list of"),
        ({"prompt": "a", "completion": "b", "history": [["a"]]}, "'history' is not a list of"),
        ({"prompt": "a", "completion": "b", "system": 5}, "'system' is 5, not a string"),
    ],
)
def test_rows_that_are_no_conversation_are_named(row, words, tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{words}") as raised:
        read_conversations(str(path), tokenizer, 64)
    assert "\n" not in str(raised.value)


def test_columns_that_are_not_read_are_said_and_all_broken_rows_counted(tmp_path, tokenizer):
    rows_of_text = [
        {"prompt": "a", "completion": "b", "context": "c", "id": 3, "empty": ""},
        {"prompt": "b", "completion": "b", "context": "c"},
        {"messages": [U, {**A, "weight": 0}], "prompt": "Hi?"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows_of_text)
    _, _, note = read_conversations(str(path), tokenizer, 64)
    assert note == "not read: context (2 rows), messages.weight (1 rows), prompt (1 rows)"
    path = write_rows(tmp_path / "b.jsonl", [*rows_of_text, {"text": "a"}, {"messages": [U]}])
    with pytest.raises(ValueError, match="b.jsonl, line 4: no messages.*; 2 rows are no conv"):
        read_conversations(str(path), tokenizer, 64)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_conversations_of_every_kind_of_file(tmp_path, tokenizer, name):
    sums = [{"prompt": f"{i} + 1?", "completion": str(i + 1)} for i in range(300)]
    path = write_rows(tmp_path / name, sums)
    train, val, note = read_conversations(str(path), tokenizer, 64)
    assert len(train) + len(val) == 300 and 1 <= len(val) < 20 and note == ""
    rendered = []
    for i in range(300):
        question = {"role": "user", "content": f"{i} + 1?"}
        answer = {"role": "assistant", "content": str(i + 1)}
        rendered.append(tokenizer.render_chat([question, answer]))
    found = [(ids.tolist(), mask.astype(int).tolist()) for ids, mask in train]
    assert found == [example for example in rendered if example in found]  # in the file's order
    held_out = [(ids.tolist(), mask.astype(int).tolist()) for ids, mask in val]
    assert sorted(found + held_out) == sorted(rendered)
    # A conversation that occurs twice is on one side.
    second = write_rows(tmp_path / "again.jsonl", sums)
    again = read_conversations(f"{path},{second}", tokenizer, 64)
    assert [len(part) for part in again[:2]] == [2 * len(train), 2 * len(val)]
    assert again[2] == "300 of 600 conversations are copies of others"


def test_held_out_questions_that_are_trained_on_are_said(tmp_path, tokenizer):
    """A conversation that comes twice is on one side, but a question may have two answers."""
    system = {"system": "the cat"}
    answered = [{"prompt": f"{i}?", "completion": "5"} for i in range(200)]
    others = [{**row, "completion": "7"} for row in answered]
    path = write_rows(tmp_path / "a.jsonl", [*answered, *others])
    _, val, note = read_conversations(str(path), tokenizer, 64)
    assert note.startswith(f"WARNING: {len(val)} of the {len(val)} held-out conversations differ")

    # Others are asked after other words of the system.
    different = [{**row, **system} for row in others]
    path = write_rows(tmp_path / "b.jsonl", [*answered, *different])
    assert read_conversations(str(path), tokenizer, 64)[2] == ""


def test_every_turn_of_the_assistant_is_in_the_loss(tmp_path, tokenizer):
    turns = [
        S,
        U,
        {"role": "assistant", "content": "12 + 34"},
        U,
        {"role": "assistant", "content": "the cat"},
    ]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": [U, A]}])
    train, val, _ = read_conversations(str(path), tokenizer, 128)
    ((ids, mask),) = [example for example in train + val if len(example[0]) > 30]
    assert tokenizer.decode(ids[mask].tolist()) == "12 + 34<|im_end|>the cat<|im_end|>"


def test_conversations_that_fit_no_row_are_left_out_and_counted(tmp_path, tokenizer):
    def words(n):
        return {"prompt": "the", "completion": "cat" * n}

    longest = len(tokenizer.render_chat(messages_of(words(90)))[0])
    # A row has one token more than inputs.
    fits = len(tokenizer.render_chat(messages_of(words(9)))[0]) - 1
    path = write_rows(tmp_path / "a.jsonl", [words(n) for n in (1, 9, 10, 90, 2)])
    train, val, note = read_conversations(str(path), tokenizer, fits)
    assert len(train) + len(val) == 3 and max(len(ids) for ids, _ in train + val) == fits + 1
    assert note.splitlines()[0] == (
        f"2 of 5 conversations are longer than --seq_len={fits} tokens and are left out; "
        f"the longest has {longest}"
    )
    with pytest.raises(
        ValueError,
        match="5 of 5 conversations are longer than --seq_len=4 .*two or more must be left",
    ):
        read_conversations(str(path), tokenizer, 4)
    with pytest.raises(ValueError, match="1 different conversations: two or more"):
        read_conversations(str(write_rows(tmp_path / "b.jsonl", [words(1)] * 3)), tokenizer, 64)


# ---- the scripts ---------------------------------------------------------------------------------

SMALL = [
    "--depth=1",
    "--device=cpu",
    "--dtype=fp64",
    "--steps=4",
    "--batch_tokens=128",
    "--seq_len=64",
]
BASE = [*SMALL, "--vocab_size=300", "--sample_tokens=8", "--eval_tokens=1024"]
SFT = [*SMALL, "--run_name=a"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An out/ folder with a base model of a corpus of two files, and the corpus."""
    folder = tmp_path_factory.mktemp("out")
    os.environ["NANORL_OUT"] = str(folder)
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(paragraphs(150)), encoding="utf-8")
    write_rows(folder / "b.jsonl", [{"text": text} for text in paragraphs(150, seed=1)])
    write_rows(
        folder / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": f"{i} cats"},
                ]
            }
            for i in range(300)
        ]
        + [{"prompt": "a", "completion": "mat " * 200}],
    )
    assert (
        call(
            "train_base.py",
            *BASE,
            f"--data={folder}/a.txt,{folder}/*b.jsonl",
            "--run_name=a",
            "--eval_every=2",
            "--eval_tokens=65536",
            "--save_every=2",
        )
        is None
    )
    yield folder
    del os.environ["NANORL_OUT"]


def test_base_learns_from_files_and_says_what_it_made_of_them(out, capsys):
    assert (
        call(
            "train_base.py",
            *BASE,
            f"--data={out}/a.txt,{out}/*b.jsonl",
            "--run_name=said",
            "--steps=1",
        )
        is None
    )
    said = capsys.readouterr().out
    index = read_index(out / "said" / "base" / "tokens")
    (shard,) = index["shards"]
    total = {
        name: shard["train"][name] + shard["val"][name] for name in ("documents", "bytes", "tokens")
    }
    size = sum(len(text.encode()) for seed in (0, 1) for text in paragraphs(150, seed))
    assert (
        total["documents"] == 300 and total["bytes"] == size and 0 < shard["val"]["documents"] < 20
    )
    assert (
        f"corpus  2 files, 300 documents ({shard['val']['documents']} to validate), "
        f"0.1 MB -> {total['tokens']:,} tokens, {size / total['tokens']:.2f} bytes a token"
    ) in said
    val = [
        text
        for seed in (0, 1)
        for text in paragraphs(150, seed)
        if content_hash(text) < index["facts"]["val_bound"]
    ]
    shown = [line.strip() for line in said.splitlines() if "▸" in line]
    assert len(shown) == min(3, len(val)) and all(
        text.startswith(line.partition(" ▸")[0]) for line, text in zip(shown, val)
    )


def test_bits_per_byte_equal_a_slow_reference(out):
    index = read_index(out / "a" / "base" / "tokens")
    model = load_model(out / "a" / "base" / "step_000004", torch.float64)
    model.compute_dtype = torch.float64
    tokenizer = Tokenizer.from_pretrained(out / "a" / "base" / "tokens")
    val = [
        text
        for seed in (0, 1)
        for text in paragraphs(150, seed)
        if content_hash(text) < index["facts"]["val_bound"]
    ]
    ids = torch.tensor(
        [i for text in val for i in tokenizer.encode(text) + [tokenizer.document_end]]
    )
    n = (len(ids) - 1) // 64
    with torch.no_grad():
        logp = torch.cat(
            [
                model.head(model.hidden(ids[None, 64 * i : 64 * i + 64]))[0].log_softmax(-1)
                for i in range(n)
            ]
        )
    nats = -logp[torch.arange(64 * n), ids[1 : 64 * n + 1]].mean()
    bytes_per_token = sum(len(text.encode()) for text in val) / len(ids)
    last = rows(out / "a" / "base")[-1]
    assert last["val/bits_per_byte"] == pytest.approx(
        float(nats) / math.log(2) / bytes_per_token, rel=1e-9
    )
    assert ["val/bits_per_byte" in r for r in rows(out / "a" / "base")] == [False, True] * 2


def test_tokenizing_in_shards_goes_on_where_it_was_killed(out, monkeypatch):
    arguments = [*BASE, f"--data={out}/a.txt,{out}/b.jsonl", "--sample_tokens=0"]
    monkeypatch.setattr(data, "SHARD_BYTES", 15_000)
    monkeypatch.setattr(data, "BATCH_BYTES", 3_000)
    assert call("train_base.py", *arguments, "--run_name=shards") is None
    encode_many, calls = Tokenizer.encode_many, []

    def dying(self, texts, threads):
        calls.append(texts)
        if len(calls) == 15:
            raise RuntimeError("killed")
        return encode_many(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_many", dying)
    with pytest.raises(RuntimeError, match="killed"):
        call("train_base.py", *arguments, "--run_name=killed")
    assert len(read_index(out / "killed" / "base" / "tokens")["shards"]) == 2
    assert call("train_base.py", *arguments, "--run_name=killed") is None
    assert len(read_index(out / "killed" / "base" / "tokens")["shards"]) > 5
    for name in os.listdir(out / "shards" / "base" / "tokens"):
        assert (out / "shards" / "base" / "tokens" / name).read_bytes() == (
            out / "killed" / "base" / "tokens" / name
        ).read_bytes(), name
    assert_same_run(out / "shards" / "base", out / "killed" / "base", "step_000004")


def test_base_resumes_with_the_text_it_began_with(out):
    """It resumes also when its files are gone.

    When its token files are gone, it resumes from the same files, and not from others.
    """
    source = out / "gone.txt"
    shutil.copy(out / "a.txt", source)
    arguments = [*BASE, f"--data={source}", "--run_name=r", "--save_every=2"]
    assert call("train_base.py", *arguments) is None
    shutil.copytree(out / "r", out / "r_before")

    def back():
        shutil.rmtree(out / "r" / "base" / "step_000004")

    back()
    os.remove(source)
    assert call("train_base.py", *arguments, "--resume=must") is None
    assert_same_run(out / "r_before" / "base", out / "r" / "base", "step_000004")
    back()
    shutil.copy(out / "a.txt", source)
    shutil.rmtree(out / "r" / "base" / "tokens")
    assert call("train_base.py", *arguments, "--resume=must") is None
    assert_same_run(out / "r_before" / "base", out / "r" / "base", "step_000004")
    # The same documents in another order give the same tokenizer and as many windows.
    back()
    reordered = paragraphs(150)[::-1]
    source.write_text("\n<|endoftext|>\n".join(reordered), encoding="utf-8")
    shutil.rmtree(out / "r" / "base" / "tokens")
    message = call("train_base.py", *arguments, "--resume=must")
    assert "the data has changed" in message and "\n" not in message
    source.write_text("\n<|endoftext|>\n".join(paragraphs(150, seed=5)), encoding="utf-8")
    shutil.rmtree(out / "r" / "base" / "tokens")
    message = call("train_base.py", *arguments, "--resume=must")
    assert (
        "it gives another tokenizer than" in message
        and "another --run_name" in message
        and "\n" not in message
    )


def test_token_files_of_changed_files_are_made_again(out, tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one\n<|endoftext|>\ntwo")
    b.write_text("three")

    def made_from(patterns, field="text"):
        return Corpus(patterns, field).made_from

    first = made_from(str(a))
    assert made_from(str(a)) == first == json.loads(json.dumps(first))
    assert (
        made_from(str(a), "body") != first
        and made_from(f"{a},{b}") != first
        and made_from(f"{a},{b}") != made_from(f"{b},{a}")
    )
    os.utime(a, ns=(1, 1))
    assert made_from(str(a)) != first
    a.write_text("one\n<|endoftext|>\ntwos")
    os.utime(a, ns=(first["files"][0][2],) * 2)
    assert made_from(str(a)) != first


def test_sft_learns_from_conversations_and_validates_on_others(out, capsys):
    assert (
        call(
            "train_sft.py",
            *SFT,
            f"--data={out}/chats.jsonl",
            "--stage=chat",
            "--eval_every=2",
            "--save_every=2",
            "--matrix_lr=0.05",
        )
        is None
    )
    said = capsys.readouterr().out
    assert (
        "1 of 301 conversations are longer than --seq_len=64 tokens and are left out; "
        "the longest has"
    ) in said
    found = rows(out / "a" / "chat")
    assert [r["step"] for r in found if "val/loss" in r] == [0, 2, 4]
    assert [r["step"] for r in found] == list(range(5))
    tokenizer = Tokenizer.from_pretrained(out / "a" / "base" / "tokens")
    train, val, _ = read_conversations(f"{out}/chats.jsonl", tokenizer, 64)
    assert f"{len(train)} conversations" in said and f"{len(val)} held out" in said
    for step, name in [(0, "base/step_000004"), (2, "chat/step_000002"), (4, "chat/step_000004")]:
        model = load_model(out / "a" / name, torch.float64)
        model.compute_dtype = torch.float64
        nats, n = 0.0, 0
        for example, mask in val:  # one by one
            ids = torch.tensor(example.astype(np.int64))
            with torch.no_grad():
                logp = model.head(model.hidden(ids[None, :-1]))[0].log_softmax(-1)
            said_at = np.flatnonzero(mask[1:])
            nats -= float(logp[said_at, ids[1:][said_at]].sum())
            n += len(said_at)
        row = next(r for r in found if r["step"] == step)
        assert row["val/loss"] == pytest.approx(nats / n, rel=1e-9)
    assert found[-1]["val/loss"] < found[0]["val/loss"]


def test_sft_on_conversations_killed_and_resumed_equals_the_uninterrupted_run(out):
    arguments = [*SFT, f"--data={out}/chats.jsonl", "--stage=again", "--save_every=2"]
    assert call("train_sft.py", *arguments) is None
    shutil.copytree(out / "a" / "again", out / "before" / "again")
    shutil.rmtree(out / "a" / "again" / "step_000004")
    assert call("train_sft.py", *arguments, "--resume=must") is None
    assert_same_run(out / "before" / "again", out / "a" / "again", "step_000004")
    shutil.copy(out / "chats.jsonl", out / "more.jsonl")
    arguments = [*SFT, f"--data={out}/more*.jsonl", "--stage=more"]
    assert call("train_sft.py", *arguments, "--steps=2") is None
    shutil.copy(out / "chats.jsonl", out / "more2.jsonl")
    message = call("train_sft.py", *arguments)
    assert "the data has changed" in message and "\n" not in message

    # The same conversations in another order are as many, and not the same ones at the cursor.
    os.remove(out / "more2.jsonl")
    before = (out / "more.jsonl").read_text()
    (out / "more.jsonl").write_text("\n".join(before.splitlines()[::-1]))
    message = call("train_sft.py", *arguments, "--resume=must")
    assert "the data has changed" in message and "\n" not in message
    (out / "more.jsonl").write_text(before)
    assert call("train_sft.py", *arguments, "--resume=must") is None


MISTAKES = [
    ("train_base.py", "--data={out}/nothing*.txt", "is no file and finds none"),
    ("train_base.py", "--data={out}", "name its files"),
    ("train_base.py", "--data={out}/empty.txt", "0 different documents in 1 file"),
    ("train_base.py", "--data={out}/one.txt", "1 different documents in 1 file"),
    ("train_base.py", "--data={out}/short.txt", "windows of 64 tokens"),
    (
        "train_base.py",
        "--data={out}/chats.jsonl",
        "chats.jsonl, line 1: no field 'text', only messages",
    ),
    ("train_base.py", "--sample_tokens=5000", "--sample_tokens=5000"),
    ("train_base.py", "--sample_tokens=-1", "--sample_tokens=-1"),
    ("train_sft.py", "--data={out}/nothing*.jsonl", "is no file and finds none"),
    (
        "train_sft.py",
        "--data={out}/a.txt",
        "a.txt is not a file of rows: convert it to one of .jsonl",
    ),
    (
        "train_sft.py",
        "--data={out}/b.jsonl",
        "b.jsonl, line 1: no messages, conversations, instruction or prompt in it, only text",
    ),
    ("train_sft.py", "--data={out}/empty.jsonl", "0 different conversations"),
    ("train_sft.py", "--data={out}/latin.jsonl", "latin.jsonl, line 1: not UTF-8"),
    ("train_sft.py", "--eval_every=-1", "--eval_every=-1"),
]


@pytest.mark.parametrize("script,mistake,words", MISTAKES, ids=[f"{s} {m}" for s, m, _ in MISTAKES])
def test_a_mistake_with_files_gets_one_line(out, script, mistake, words):
    for name, content in [
        ("empty.txt", b""),
        ("empty.jsonl", b"\n"),
        ("one.txt", b"just one"),
        ("short.txt", b"a\n<|endoftext|>\nb"),
        ("latin.jsonl", b'{"prompt": "caf\xe9", "completion": "b"}'),
    ]:
        (out / name).write_bytes(content)
    run = [f"--run_name=m{abs(hash(mistake))}", f"--model={out}/a/base"][
        : 2 if script == "train_sft.py" else 1
    ]
    message = call(
        script, *(BASE if script == "train_base.py" else SFT), *run, mistake.format(out=out)
    )
    assert isinstance(message, str) and words in message and "\n" not in message


# ---- real files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brown", "tinystories", "tinyshakespeare"])
def test_the_documents_of_a_real_text_hold_all_of_it(real_data, name):
    path = os.path.join(real_data, "text", name + ".txt")
    found = list(plain_documents(path))
    with open(path, "rb") as f:
        lines = [line.strip() for line in f if line.strip() and line.strip() != b"<|endoftext|>"]
    assert [line.strip() for text in found for line in text.split(b"\n") if line.strip()] == lines
    assert len(found) > 50 and max(map(len, found)) <= MAX_BYTES


def test_real_conversations(real_data):
    tokenizer = Tokenizer.from_pretrained(os.path.join(real_data, "tokenizers", "qwen3"))
    train, held_out, note = read_conversations(
        os.path.join(real_data, "alpaca", "train.jsonl"), tokenizer, 512
    )
    assert note and 4900 < len(train) + len(held_out) < 5000 and 60 < len(held_out) < 150
    packed = pack_rows(train, 513)
    assert sum(len(ids) for row in packed for ids, _ in row) / (513 * len(packed)) > 0.95
