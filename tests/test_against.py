"""runs/against_plain.py at its smallest: its plain GPT, and its comparison with a base run."""

import importlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from nanorl.gpt import GPTConfig
from nanorl.report.cost import forward_flops
from scripts import ROOT, call, rows

COMPARISON = "runs/against_plain.py"


@pytest.fixture(scope="module")
def against():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.path.join(ROOT, "runs"))
        yield importlib.import_module("against_plain")


def test_the_plain_model_knows_nothing_at_first_and_learns(against):
    torch.manual_seed(0)
    model = against.PlainGPT(vocabulary=300, context=16, layers=2, heads=2, width=32)
    ids = torch.randint(0, 300, (4, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    optimizer = against.adamw(model, 3e-3)
    losses = []
    for _ in range(60):
        loss = against.loss_of(model, inputs, targets, torch.float32) / targets.numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[-1] < 0.2 * losses[0]


def test_the_plain_model_is_as_large(against):
    config = GPTConfig.from_depth(4, 4096)
    model = against.PlainGPT(4096, 256, config.n_layer, config.n_head, config.n_embd)
    params = sum(p.numel() for p in model.parameters())
    assert params == pytest.approx(config.n_params()[0], rel=0.01)
    needed = 3 * forward_flops(config, 256, 256 * 257 // 2, 256)
    assert model.flops(256) == pytest.approx(needed, rel=0.02)


def test_the_plain_model_does_not_see_what_comes(against):
    torch.manual_seed(0)
    model = against.PlainGPT(vocabulary=50, context=8, layers=2, heads=2, width=32)
    ids = torch.randint(0, 50, (1, 8))
    before = model(ids)
    ids[0, 5] = (ids[0, 5] + 1) % 50
    after = model(ids)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5:], after[0, 5:])


def test_a_comparison(out, capsys):
    """Its last line has the base run's own figures, and the better of two rates."""
    directory = out / "a" / "base"
    options = ["--rates=1e-9,1e-2", "--trial_steps=4"]
    assert call(COMPARISON, f"--run={directory}", *options) is None
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    last = rows(directory)[-1]
    assert found["bits_per_byte"]["nanorl"] == last["val/bits_per_byte"]
    assert found["flops"]["nanorl"] == last["flops_causal_total"]
    assert found["tokens"] == last["tokens_total"]
    assert found["tried"]["1e-2"] < found["tried"]["1e-9"]
    assert "rate 1e-2\n" in said
    assert found["flops"]["plain"] == pytest.approx(found["flops"]["nanorl"], rel=0.1)
    share = found["bits_per_byte"]["nanorl"] / found["bits_per_byte"]["plain"]
    assert found["less"] == pytest.approx(1 - share)


def test_the_plain_model_may_take_smaller_steps(out, capsys):
    options = [f"--run={out / 'a' / 'base'}", "--rates=1e-2"]
    said = []
    for batch in (0, 512, 128):
        assert call(COMPARISON, *options, f"--batch_tokens={batch}") is None
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert said[0]["bits_per_byte"] == said[1]["bits_per_byte"]
    assert said[2]["flops"] == said[0]["flops"] and said[2]["tokens"] == said[0]["tokens"]
    assert said[2]["bits_per_byte"]["plain"] < said[0]["bits_per_byte"]["plain"]
    for batch in (192, 32):
        error = call(COMPARISON, *options, f"--batch_tokens={batch}")
        assert error.startswith(f"error: --batch_tokens={batch}: it must divide")


def test_both_see_the_same_windows(against, out):
    """Those of the run's seed, one after the other; and the run's own validation."""
    import train_base

    base = against.BaseRun(str(out / "a" / "base"))
    settings = SimpleNamespace(**base.settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_base, "seq_len", settings.seq_len)
        patch.setattr(train_base, "eval_tokens", settings.eval_tokens)
        theirs = train_base.validation_windows(base.tokens)
    assert torch.equal(base.validation_windows().next()[1], theirs.next()[1])
    train, halves = base.train_windows(512), base.train_windows(256)
    for _ in range(6):
        inputs, _ = train.next()
        assert torch.equal(inputs, torch.cat([halves.next()[0], halves.next()[0]]))
    path = out / "a" / "base" / "step_000006" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    assert state["data"] == train.state_dict()


@pytest.mark.parametrize("name", ["sft", "nothing"])
def test_what_is_no_base_run_is_refused_in_a_line(out, name):
    said = call(COMPARISON, f"--run={out / 'a' / name}")
    assert said.startswith("error: --run=") and "not a run of train_base.py" in said
