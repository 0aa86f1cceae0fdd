"""What is said of GPUs that have little to do: the numbers, when it is said, and that it is."""

from types import SimpleNamespace

import pytest
import torch

from conftest import toy_model
from nanorl.report import sizes
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from scripts import BASE, RL, SFT, TOY, call

GPU = torch.device("cuda")


def test_the_rows_by_arithmetic():
    config = toy_model().config
    weights = config.n_params()[1]
    row = 2 * 2 * 2 * 2 * 8  # key and value x layers x kv heads x head dim x bytes, a token
    # Products that cost nothing: as many rows as have the weights' bytes in their caches.
    assert sizes.rows_at_twice(config, 2, 10, 1e30, 1.0) == 2 * weights // (10 * row)
    # Caches that are empty: 2 bytes a weight, 2 FLOPs a weight and row, at 100.5 FLOPs a byte.
    assert sizes.rows_at_twice(config, 2, 0, 1.005e14, 1e12) == 100


def lines(monkeypatch, P, ranks=8, device=GPU, max_rows=0):
    """Of groups of 4 with prompts of 8 tokens and completions of 4; a step serves 100 rows."""
    monkeypatch.setattr(sizes.dist, "world_size", lambda: ranks)
    model = toy_model(dtype=torch.float32, vocab=4000)
    group = Rollout(None, [1] * 8, [Completion([5] * 4, [], True)] * 4, None, None, None)
    settings = dict(prompts_per_step=P, samples_per_prompt=4)
    policy = SimpleNamespace(device=device, model=model)
    engine = SimpleNamespace(max_rows=max_rows)
    # 2 FLOPs a weight, 4 bytes a weight.
    return sizes.decode_lines([group, group], engine, policy, settings, 5e13, 1e12)


def test_few_rows_a_gpu_are_said_with_what_would_use_it(monkeypatch):
    (line,) = lines(monkeypatch, P=16)
    assert line == (
        "decode: 8 rows a GPU, and a step of 100 would take less than twice as long: "
        "--prompts_per_step=128 would use them, as another algorithm (larger batches)"
    )
    assert "12 rows a GPU" in lines(monkeypatch, P=17)[0]  # of the rank that has the most
    assert lines(monkeypatch, P=128) == []  # the remedy
    assert lines(monkeypatch, P=12 * 8) and not lines(monkeypatch, P=13 * 8)  # under half of 100
    assert lines(monkeypatch, P=12, ranks=1) and not lines(monkeypatch, P=13, ranks=1)
    assert lines(monkeypatch, P=16, device=torch.device("cpu")) == []
    assert lines(monkeypatch, P=16, max_rows=16) == []  # no more fit into memory
    assert "--prompts_per_step=32 " in lines(monkeypatch, P=16, max_rows=17)[0]


def test_long_completions_leave_room_for_fewer_rows(monkeypatch):
    """The prompt's cache is read once for its rows, and a row's own is half full."""
    seen = []
    monkeypatch.setattr(sizes, "rows_at_twice", lambda *given: seen.append(given[2]) or 1)
    lines(monkeypatch, P=16)
    assert seen == [8 / 4 + 4 / 2]


def test_few_tokens_a_gpu_are_said(monkeypatch, capsys):
    def said(ranks, device=GPU, **settings):
        monkeypatch.setattr(sizes.dist, "world_size", lambda: ranks)
        defaults = dict(batch_tokens=8192, device_tokens=16384, seq_len=256)
        sizes.say_tokens(device, {**defaults, **settings})
        return capsys.readouterr().out

    line = said(8)
    assert "1,024 tokens a GPU and step; with 8,192" in line
    assert "--batch_tokens=65536 gives each so many" in line
    for silent in (
        said(1),
        said(8, batch_tokens=65536),
        said(8, batch_tokens=32768),
        said(8, torch.device("cpu")),
        said(8, device_tokens=2048),
    ):
        assert silent == ""
    # What it names is a multiple of seq_len.
    assert "--batch_tokens=64000 " in said(8, seq_len=1000, batch_tokens=8000)


@pytest.fixture
def posed_as_a_gpu(monkeypatch):
    """The scripts on a CPU, with a GPU's rates, say what they say on a GPU."""
    monkeypatch.setattr(sizes, "on_a_gpu", lambda device: True)
    monkeypatch.setattr("nanorl.report.rates.device_rates", lambda *_: (1e14, 1e12))


def test_the_scripts_say_it_before_they_start(out, posed_as_a_gpu, capsys):
    sft = f"--model={out / 'a' / 'sft'}"
    run = [*RL, sft, "--dry_run", "--run_name=sizes", "--device_rows=0", "--max_new_tokens=4"]
    assert call("train_rl.py", *run, "--prompts_per_step=1") is None
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "decode: " in text]
    assert "decode: 4 rows a GPU, and a step of " in line

    for script, run in (
        ("train_base.py", [*BASE, "--sample_tokens=0"]),
        ("train_sft.py", [*SFT, TOY, f"--model={out / 'a' / 'base'}"]),
    ):
        assert call(script, *run, "--steps=1", "--run_name=sizes") is None
        assert "512 tokens a GPU and step; with 8,192" in capsys.readouterr().out
