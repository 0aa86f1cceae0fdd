"""Data sets by name, streamed by `datasets` itself from folders of files."""

import json
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import nanorl.data.tokens as data
import train_base
from nanorl.data import stream
from nanorl.data.corpus import Corpus
from nanorl.data.stream import Stream
from nanorl.data.tokens import read_index, tokenize, total
from nanorl.tasks.problem import content_hash
from scripts import ROOT, call, environment

datasets = pytest.importorskip("datasets")
WORDS = "the a cat dog runs over hill and sees red blue house while rain falls on old stones"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three parquet files of 200 rows, some of them long, empty or null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("set")
    rng = random.Random(0)
    for number in range(3):
        texts = [" ".join(rng.choices(WORDS.split(), k=40)) for _ in range(200)]
        texts[55:59] = ["long " * 30_000, "", None, texts[0]]
        table = pa.table({"id": list(range(200)), "text": texts})
        pq.write_table(table, path / f"{number}.parquet", row_group_size=50)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(data, "BATCH_BYTES", 1_500)
    # After a stream of several `datasets` would wait for threads that none of these have.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setenv("NANORL_OUT", str(tmp_path / "out"))


def files_in(directory):
    """{name: bytes} of the token files, and the index but for how `datasets` writes positions."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    index = read_index(directory)
    for shard in index["shards"]:
        del shard["position"]
    return {**found, "tokens.json": index}


def documents_of(source):
    _, facts = source.survey()
    return list(source.documents(facts))


def test_a_folder_gives_the_documents_of_its_files(folder):
    streamed = documents_of(Stream(f"hf:{folder}"))
    from_files = documents_of(Corpus(f"{folder}/*.parquet"))
    assert [text for _, text in streamed] == [text for _, text in from_files]
    assert len(streamed) == 3 * (200 - 3 + 3)  # less the long, the empty and null; the long in 3
    # All of it was surveyed, so the same documents validate.
    assert streamed == from_files and {split for split, _ in streamed} == {"train", "val"}


def test_only_the_surveyed_validate_and_their_copies(folder, monkeypatch):
    monkeypatch.setattr(stream, "SURVEY_BYTES", 300_000)  # the first file, and a part of the second
    documents = documents_of(Stream(f"hf:{folder}"))
    val = {text for split, text in documents if split == "val"}
    assert 0 < len(val) < 12
    assert val.isdisjoint(text for split, text in documents if split == "train")
    low = [text for _, text in documents if content_hash(text) < 2**63 // stream.VAL_ONE_IN]
    assert len(val) < len(set(low))


def test_of_the_smallest_data_set_one_document_validates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    splits = [split for split, _ in documents_of(Stream(f"hf:{tmp_path}"))]
    assert sorted(splits) == ["train", "val"]


def test_data_sets_of_other_columns_take_turns_until_all_have_run_out(tmp_path):
    names = []
    for name, ids in (("a", [1, 2, 3]), ("b", ["x"])):
        (tmp_path / name).mkdir()
        rows = [{"id": i, "text": f"{name} {i}"} for i in ids]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "rows.jsonl").write_text(lines)
        names.append(f"hf:{tmp_path / name}")
    texts = [text for _, text in documents_of(Stream(", ".join(names)))]
    assert texts == ["a 1", "b x", "a 2", "a 3"]


@pytest.mark.parametrize("sets", [1, 2])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch, sets):
    names = ",".join([f"hf:{folder}"] * sets)
    tokenize(Stream(names), 300, tmp_path / "whole")
    expected = files_in(tmp_path / "whole")
    shards = read_index(tmp_path / "whole")["shards"]
    n = len(shards)
    # A start goes on from the position and does not read the documents before it again.
    assert all(shard["position"] for shard in shards)
    assert n > 10
    take, dies = data._take, []

    def dying(documents, size):
        dies[0] -= 1
        if dies[0] == 0:
            raise RuntimeError("killed")
        return take(documents, size)

    monkeypatch.setattr(data, "_take", dying)
    # Each start gets a few shards further; some of the shards end inside a long row.
    for batches in (1, 20, 25, 10):
        dies[:] = [batches]
        with pytest.raises(RuntimeError, match="killed"):
            tokenize(Stream(names), 300, tmp_path / "killed")
    done = len(read_index(tmp_path / "killed")["shards"])
    assert 2 < done < n, (done, n)
    dies[:] = [10**6]
    tokenize(Stream(names), 300, tmp_path / "killed")
    assert files_in(tmp_path / "killed") == expected


KILL = """
import os, signal, sys
import nanorl.data.tokens as data
from nanorl.data.stream import Stream
from nanorl.tokenizer import Tokenizer

data.SHARD_BYTES, data.BATCH_BYTES = 20_000, 1_500
encode_many, calls = Tokenizer.encode_many, []

def dying(self, texts, threads):
    calls.append(texts)
    if len(calls) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_many(self, texts, threads)

Tokenizer.encode_many = dying
data.tokenize(Stream(sys.argv[1]), 300, sys.argv[2])
"""


def test_kill_9_loses_and_doubles_no_document(folder, tmp_path):
    command = [sys.executable, "-c", KILL, f"hf:{folder}", str(tmp_path / "killed")]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert 0 < len(read_index(tmp_path / "killed")["shards"])
    assert not read_index(tmp_path / "killed")["whole"]
    for name in ("killed", "whole"):
        tokenize(Stream(f"hf:{folder}"), 300, tmp_path / name)
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("source", [lambda f: Stream(f"hf:{f}"), lambda f: Corpus(f"{f}/*")])
def test_enough_tokens_end_the_files_and_more_go_on_from_them(folder, tmp_path, source):
    made = tmp_path / "made"
    few = tokenize(source(folder), 300, made, enough=20_000)
    tokens = [shard["train"]["tokens"] for shard in few["shards"]]
    assert few["whole"] and sum(tokens[:-1]) < 20_000 <= sum(tokens)
    first = os.stat(made / "train_00000.bin").st_mtime_ns

    # More: the same as if made at once, and the first shards are kept.
    more = tokenize(source(folder), 300, made, enough=60_000)
    assert len(more["shards"]) > len(few["shards"])
    assert os.stat(made / "train_00000.bin").st_mtime_ns == first
    tokenize(source(folder), 300, tmp_path / "at_once", enough=60_000)
    assert files_in(made) == files_in(tmp_path / "at_once")

    # Fewer: the first shards alone. All: the rest too.
    assert tokenize(source(folder), 300, made, enough=20_000) == few == read_index(made)
    everything = tokenize(source(folder), 300, made)
    assert everything["whole"] and total(everything, "documents") == 600
    wanted = tokenize(source(folder), 300, made, enough=10**9)
    assert wanted["whole"] and "there is no more, though 1,000,000,000" in data.describe(wanted)


def test_of_the_hub_the_commit_is_kept_with_which_a_start_after_a_kill_goes_on(
    folder, tmp_path, monkeypatch
):
    import huggingface_hub

    asked, commits = [], ["c1"]
    load_dataset = datasets.load_dataset

    def load(name, config, **options):
        asked.append((name, config, options))
        return load_dataset(str(folder), split="train", streaming=True)

    def info(_api, name):
        return SimpleNamespace(sha=commits[0])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    tokenize(Stream("hf:owner/name:10BT:test"), 300, tmp_path / "made", enough=20_000)
    commits[0] = "c2"
    tokenize(Stream("hf:owner/name:10BT:test"), 300, tmp_path / "made", enough=60_000)
    same = {"split": "test", "revision": "c1", "streaming": True}
    assert asked == [("owner/name", "10BT", same)] * 3  # the survey, and twice the documents
    tokenize(Stream("hf:owner/name"), 300, tmp_path / "made", enough=20_000)
    assert asked[-1] == ("owner/name", None, {**same, "split": "train", "revision": "c2"})


BASE = ["--depth=1", "--device=cpu", "--batch_tokens=128", "--seq_len=64", "--vocab_size=300"]
BASE += ["--sample_tokens=0", "--steps=2"]


def test_base_reads_as_much_of_a_data_set_as_the_run_takes(folder, tmp_path, capsys):
    assert call("train_base.py", *BASE, f"--data=hf:{folder}", "--run_name=a", "--steps=10") is None
    index = read_index(tmp_path / "out" / "a" / "base" / "tokens")
    tokens = [shard["train"]["tokens"] for shard in index["shards"]]
    assert sum(tokens[:-1]) < 10 * 128 <= sum(tokens) and total(index, "documents") < 600
    assert "reading until the run's 1,280 tokens are made" in capsys.readouterr().out


def test_how_many_tokens_are_made(folder, monkeypatch):
    files, stream = Corpus(f"{folder}/*"), Stream(f"hf:{folder}")
    assert train_base.tokens_wanted(files) == 0  # all
    monkeypatch.setattr(train_base, "steps", 7)
    assert train_base.tokens_wanted(stream) == 7 * train_base.batch_tokens
    monkeypatch.setattr(train_base, "data_tokens", 5)
    assert train_base.tokens_wanted(files) == train_base.tokens_wanted(stream) == 5


def test_what_cannot_be_had_gets_one_line_with_both_ways(folder, monkeypatch):
    import huggingface_hub

    def no_hub(_api, name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)

    def said(*arguments):
        message = call("train_base.py", *BASE, "--run_name=m", *arguments)
        assert "\n" not in message
        return message

    offline = said("--data=hf:owner/name:10BT")
    assert "ConnectionError: no route to host): connect to the hub" in offline
    assert "hf download --repo-type=dataset owner/name --local-dir=folder" in offline
    assert "--data=hf:folder" in offline
    assert "Available splits: ['train']" in said(f"--data=hf:{folder}:default:val")
    assert "no field 'body', only id, text" in said(f"--data=hf:{folder}", "--text_field=body")
    assert "cannot be named together" in said(f"--data=hf:{folder},a.txt")
    assert "'hf:a:b:c:d' is no hf:<name>" in said("--data=hf:a:b:c:d")
    assert "/none is no folder" in said(f"--data=hf:{folder}/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in said(f"--data=hf:{folder}")


def test_a_stream_that_breaks_off_says_how_to_go_on(folder, tmp_path, monkeypatch):
    class Breaking:
        def state_dict(self):
            return {}

        def __iter__(self):
            yield {"text": "a cat"}
            raise OSError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Breaking())
    with pytest.raises(ValueError, match="reset by peer.*start the same command again"):
        tokenize(Stream(f"hf:{folder}"), 300, tmp_path / "made")


def test_token_files_of_a_changed_folder_are_made_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n')
    first = Stream(f"hf:{tmp_path}").made_from
    assert Stream(f"hf:{tmp_path}").made_from == first
    assert Stream(f"hf:{tmp_path}", "body").made_from != first
    (tmp_path / "a.jsonl").write_text('{"text": "a cat sat"}\n')
    assert Stream(f"hf:{tmp_path}").made_from != first
