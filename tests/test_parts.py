"""SFT on a mixture: what is drawn of each part, in which order, and what validates."""

import json
import shutil

import numpy as np
import pytest

from nanorl.data.packing import OrderedRows
from nanorl.data.parts import Mixture, Part, is_weighted, parse_parts, read_parts
from nanorl.tokenizer import Tokenizer
from scripts import TOY, assert_same_run, call, rows

TOY = TOY.removeprefix("--task=")


def toy_part(weight, first, n):
    """A part whose conversations are told by their first id."""
    train = [([first + i] * 3, [0, 1, 1]) for i in range(n)]
    return Part(weight, train, train[:1], None, "")


def toy_mixture(seed=0):
    return Mixture({"a": toy_part(4, 0, 50), "b": toy_part(2, 100, 5)}, seed)


def drawn(mixture, turns):
    return [mixture[number][0][0] for number in turns]


# ---- what the user writes ------------------------------------------------------------------------


def test_parts_and_weights():
    text = "hf:a/b:c:train=8, gsm8k = 2,mmlu:auxiliary=1, x.jsonl, y*.jsonl=1"
    assert is_weighted(text)
    assert parse_parts(text) == {
        "hf:a/b:c:train": 8,
        "gsm8k": 2,
        "mmlu:auxiliary": 1,
        "x.jsonl, y*.jsonl": 1,
    }
    assert not any(map(is_weighted, ["", "a.jsonl", "a=1.jsonl,b.jsonl", "hf:a/b", "x/lr=2/*.csv"]))


def test_a_file_with_a_weight_in_its_name_is_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_weighted("a=1,b.jsonl")
    (tmp_path / "a=1,b.jsonl").write_text("")
    assert not is_weighted("a=1,b.jsonl")


@pytest.mark.parametrize(
    "text, words",
    [
        ("gsm8k=2, a.jsonl", "'a.jsonl' has no weight: write a.jsonl=1"),
        ("hf:a/b, gsm8k=2", "'hf:a/b' has no weight: write hf:a/b=1"),
        ("gsm8k, a.jsonl=2", "'gsm8k' has no weight: write gsm8k=1"),
        ("gsm8k=0", "'gsm8k=0' must be a part and a weight of 1 or more"),
        ("=2", "'=2' must be a part and a weight of 1 or more"),
        ("gsm8k=1,gsm8k=1", "'gsm8k' comes twice"),
    ],
)
def test_a_mistake_in_a_mixture_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse_parts(text)


# ---- the turns -----------------------------------------------------------------------------------


def test_parts_take_turns_by_weight_each_in_passes_of_its_own():
    mixture = toy_mixture()
    assert len(mixture) == 75  # 50 turns of a, 25 of b
    turns = drawn(mixture, range(150))
    for start in range(0, 150, 3):  # evenly
        assert [i >= 100 for i in turns[start : start + 3]].count(True) == 1
    a, b = ([i for i in turns if (i >= 100) == is_b] for is_b in (False, True))
    for part, n in ((a, 50), (b, 5)):
        passes = [part[start : start + n] for start in range(0, len(part), n)]
        assert all(sorted(one) == sorted(passes[0]) for one in passes)
        assert len(set(passes[0])) == n and len({tuple(one) for one in passes}) > 1
    assert drawn(toy_mixture(), [149, 3, 70]) == [turns[149], turns[3], turns[70]]
    assert drawn(toy_mixture(seed=1), range(75)) != turns[:75]
    # 100 turns of a in 150 are two passes, 50 of b ten.
    assert mixture.epochs(150) == {"a": 2, "b": 10} and mixture.mean_length() == 3


def test_a_mixture_is_as_long_as_a_pass_of_its_weightiest_part():
    small, large = toy_part(1, 0, 4), toy_part(1, 100, 900)
    assert len(Mixture({"a": toy_part(3, 0, 50), "b": large}, 0)) == 17 * 4
    assert len(Mixture({"a": small, "b": large}, 0)) == 1800


def test_a_chunk_goes_on_where_the_last_one_ended():
    """Not to the beginning, at the end of a pass; and from a cursor to the same rows."""
    mixture = toy_mixture()
    chunks = dict(rows=1, chunk=16)
    source = OrderedRows(mixture.__getitem__, len(mixture), 2, **chunks)
    turns = []
    for number in range(96):
        if number == 90:  # beyond the mixture's length
            again = OrderedRows(mixture.__getitem__, len(mixture), 2, **chunks)
            again.load_state_dict(json.loads(json.dumps(source.state_dict())))
            assert again.next().inputs.tolist() == source.next().inputs.tolist()
            source = again
            turns.append(None)
        else:
            turns.append(int(source.next().inputs[0, 0]))
    for start in range(0, 80, 16):
        assert sorted(turns[start : start + 16]) == sorted(drawn(mixture, range(start, start + 16)))


def test_a_mixture_of_long_and_short_conversations_is_packed_above_95_percent():
    """At the default of 256 tokens a row."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, weight, mean in (("chats", 8, 120), ("problems", 2, 180), ("words", 1, 40)):
        lengths = np.exp(rng.normal(np.log(mean), 0.5, 3000)).astype(int).clip(10, 257)
        train = [([1] * int(n), [1] * int(n)) for n in lengths]
        parts[name] = Part(weight, train, train[:1], None, "")
    source = OrderedRows(Mixture(parts, 0).__getitem__, 3000, 256, rows=32)
    shares = [float((source.next().document > 0).float().mean()) for _ in range(80)]
    assert sum(shares) / len(shares) > 0.95


def test_the_ranks_share_the_rows_of_one():
    def source(*ranks):
        return OrderedRows(toy_mixture().__getitem__, 75, 8, rows=4, ranks=ranks, chunk=16)

    whole, ranks = source(0, 1), [source(0, 2), source(1, 2)]
    for _ in range(10):
        shares = [of_rank.next().inputs.tolist() for of_rank in ranks]
        assert sorted(shares[0] + shares[1]) == sorted(whole.next().inputs.tolist())


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(out):
    """Constants of a run on two files and a task, of other sizes and weights."""
    for name, n in (("long", 120), ("short", 20)):
        chats = [{"prompt": f"{name} {i}", "completion": f"{name} is {i * i}"} for i in range(n)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return [
        "--depth=1",
        "--device=cpu",
        "--dtype=fp64",
        "--run_name=a",
        f"--model={out / 'a' / 'base'}",
        "--batch_tokens=256",
        "--seq_len=64",
        f"--data={out}/long.jsonl=4, {TOY}=2, {out}/short.jsonl=1",
        "--steps=4",
        "--eval_every=2",
    ]


def test_a_mixture_is_announced_learnt_and_validated_by_part(out, mixed, capsys):
    answers = ["--eval_problems=5", "--eval_new_tokens=4"]
    assert call("train_sft.py", *mixed, *answers, "--stage=whole", "--save_every=2") is None
    said = capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(out / "a" / "base" / "step_000006")
    data = mixed[7].removeprefix("--data=")
    parts = read_parts(data, "", tokenizer, 64, 0)
    mixture = Mixture(parts, 0)
    epochs = mixture.epochs(4 * 256 / mixture.mean_length())
    for name, part in parts.items():
        words = f"{name}: weight {part.weight}, {len(part.train)} conversations, "
        assert f"{words}{epochs[name]:.2f} epochs; {len(part.held_out)} validate" in said

    found = [row for row in rows(out / "a" / "whole") if "val/loss" in row]
    assert [row["step"] for row in found] == [0, 2, 4]
    for row in found:
        losses = [row[f"val/loss/{name}"] for name in parts]
        assert min(losses) < row["val/loss"] < max(losses)
        assert row[f"val/n/{TOY}"] == 5 and f"val/accuracy/{TOY}" in row
    # As much as the mixture has of each part counts in all, whatever number of each validates.
    nats = said_in_all = 0.0
    for name, part in parts.items():
        trained = sum(sum(mask[1:]) for _, mask in part.held_out) / len(part.held_out)
        nats += part.weight * trained * found[-1][f"val/loss/{name}"]
        said_in_all += part.weight * trained
    assert found[-1]["val/loss"] == pytest.approx(nats / said_in_all, rel=1e-9)
    loss, share = (found[-1][f"val/{name}/{TOY}"] for name in ("loss", "accuracy"))
    assert f", {TOY} {loss:.3f} ({share:.1%} right)" in said

    # Ended after step 2 and started again, it is the same run.
    shutil.copytree(out / "a" / "whole", out / "before" / "whole")
    shutil.rmtree(out / "a" / "whole" / "step_000004")
    again = [*mixed, *answers, "--stage=whole", "--save_every=2", "--resume=must"]
    assert call("train_sft.py", *again) is None
    assert_same_run(out / "before" / "whole", out / "a" / "whole", "step_000004")


def test_a_data_set_and_a_task_of_files_are_parts(out, tmp_path, monkeypatch):
    """Of a data set only the first rows are read, and broken ones are left out and counted."""
    pytest.importorskip("datasets")
    chats = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(40)]
    chats[3]["completion"] = None
    (tmp_path / "set").mkdir()
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    (tmp_path / "set" / "rows.jsonl").write_text(lines)
    (tmp_path / "mmlu").mkdir()
    for file, n in (("auxiliary_train", 9), ("validation", 5)):
        row = {"question": "Say 1", "choices": ["0", "1"], "answer": 1}
        (tmp_path / "mmlu" / f"{file}.jsonl").write_text((json.dumps(row) + "\n") * n)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))

    tokenizer = Tokenizer.from_pretrained(out / "a" / "base" / "step_000006")
    name = f"hf:{tmp_path / 'set'}"
    data = f"{name}=2, mmlu:auxiliary=1"
    parts = read_parts(data, "", tokenizer, 128, most=20)
    assert len(parts[name].train) + len(parts[name].held_out) == 19
    assert "1 rows are no conversations and are left out, such as" in parts[name].note
    task = parts["mmlu:auxiliary"]
    assert len(task.train) == 9 and len(task.held_out) == 5 == len(task.val_task)
    ids, mask = task.train[0]
    said = [int(i) for i, trained in zip(ids, mask) if trained]
    assert tokenizer.decode(said).startswith("B")
    with pytest.raises(ValueError, match="no demonstration of mmlu:auxiliary, split train, fits"):
        read_parts("mmlu:auxiliary=1", "", tokenizer, 8, 0)
    with pytest.raises(ValueError, match="no part of --data is a task"):
        read_parts(f"{name}=1", "rewards=signed", tokenizer, 128, 20)


def test_answers_of_a_mixture_without_tasks_are_refused(out, mixed):
    files = f"--data={out}/long.jsonl=1, {out}/short.jsonl=1"
    message = call("train_sft.py", *mixed, files, "--stage=none", "--eval_problems=5")
    assert "--eval_problems=5: no part of --data is a task: leave it out" in message
