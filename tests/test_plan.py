"""What a run will cost: the plan of a depth, and the dry runs, against what runs then do."""

import json
import os
from functools import partial

import pytest
import torch

from conftest import toy_model
from nanorl import learner
from nanorl.data import preview as previews
from nanorl.data.corpus import Corpus
from nanorl.data.tokens import tokenize, total
from nanorl.engine import Engine
from nanorl.gpt import GPTConfig
from nanorl.report import cost, forecast, memory, plan, terminal, trial
from nanorl.tokenizer import Tokenizer
from nanorl.tools import plan as tool
from scripts import BASE, RL, SFT, call, rows

DRY = "--dry_run"


def listing(folder):
    """{path: (bytes, time)} of all that is in a folder."""
    found = {}
    for path, folders, names in os.walk(folder):
        for name in folders + names:
            stat = os.stat(os.path.join(path, name))
            found[os.path.join(path, name)] = stat.st_size, stat.st_mtime_ns
    return found


def size_in(text, before):
    """The bytes that follow a word, '12.3 MB' as a number."""
    number, unit = text.split(before)[1].split()[:2]
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit.strip(",;")]


def size_of(folder):
    return sum(size for size, _ in listing(folder).values())


# ---- dry runs ------------------------------------------------------------------------------------


def test_a_dry_run_of_base_foretells_the_run_and_writes_nothing(out, capsys):
    run = [*BASE, "--run_name=foretold", "--sample_tokens=0", "--eval_every=0"]
    before = listing(out)
    assert call("train_base.py", *run, DRY, "--batch_tokens=6400") is None
    assert listing(out) == before
    said = capsys.readouterr().out
    dry = next(line for line in said.splitlines() if line.startswith("base  "))

    assert call("train_base.py", *run, "--steps=2") is None
    real = capsys.readouterr().out
    heading = next(line for line in real.splitlines() if line.startswith("base  "))
    assert dry.split(";")[0] == heading.split(";")[0]  # parameters and vocabulary
    assert dry.split("over ")[1] == heading.split("over ")[1]  # tokens to train on
    parameters = json.loads((out / "foretold" / "base" / "run.json").read_text())["params"]
    assert f"{-(-20 * parameters // 6400)} steps of 6,400 tokens" in dry

    written = size_of(out / "foretold" / "base" / "step_000002")
    assert size_in(said, "a checkpoint ") == pytest.approx(written, rel=0.1)
    tokens = [
        size for path, (size, _) in listing(out).items() if "foretold" in path and ".bin" in path
    ]
    assert size_in(said, "token files ") == pytest.approx(sum(tokens), rel=0.1)

    # With the token files there, and where the run goes on.
    before = listing(out)
    assert call("train_base.py", *run, DRY, "--steps=5") is None
    assert listing(out) == before
    said = capsys.readouterr().out
    assert "the token files in" in said and "5 steps" in said
    assert f"resumed {out / 'foretold' / 'base' / 'step_000002'}" in said


def test_the_flops_of_the_plan_are_those_that_a_run_counts(out):
    row = rows(out / "a" / "base")[-1]
    tokenizer = Tokenizer.from_pretrained(out / "a" / "base" / "step_000006")
    config = GPTConfig.from_depth(1, tokenizer.n_tokens)
    flops = plan.text_flops(config, row["tokens_total"], 64)
    assert flops == pytest.approx(row["flops_causal_total"], rel=1e-9)


def test_a_dry_run_of_sft_foretells_the_run_and_writes_nothing(out, capsys):
    run = [*SFT, f"--model={out / 'a' / 'base'}", "--run_name=foretold", "--steps=3"]
    before = listing(out)
    assert call("train_sft.py", *run, DRY) is None
    assert listing(out) == before
    said = capsys.readouterr().out
    assert call("train_sft.py", *run) is None
    real = capsys.readouterr().out
    assert said.splitlines()[0] == real.splitlines()[0]
    written = size_of(out / "foretold" / "sft" / "step_000003")
    assert size_in(said, "a checkpoint ") == pytest.approx(written, rel=0.1)
    assert "s in all, without evaluations (timed on" in said


def test_without_a_base_model_a_dry_run_of_sft_says_so(out):
    ended = call("train_sft.py", *SFT, DRY, "--run_name=nothing")
    assert "make one with `python train_base.py" in str(ended)


def test_a_dry_run_of_rl_writes_nothing_and_tries_what_is_quick(out, capsys, monkeypatch):
    run = [*RL, f"--model={out / 'a' / 'sft'}", "--run_name=foretold", DRY]
    before = listing(out)
    assert call("train_rl.py", *run) is None
    said = capsys.readouterr().out
    assert "probe: " in said and "held-out before: " in said and "left out" not in said

    monkeypatch.setattr(forecast, "SECONDS", 1e-9)
    assert call("train_rl.py", *run) is None
    said = capsys.readouterr().out
    assert "held-out before: left out" in said and "0 of 4 problems are tried" in said
    assert "every answer has 12 tokens (assumed" in said and "memory: about" in said
    assert listing(out) == before


# ---- text looked at in memory --------------------------------------------------------------------


def test_a_preview_of_the_beginning_is_near_what_tokenizing_gives(tmp_path, monkeypatch):
    words = "the cat sat on the mat and saw a dog run far away over green hills".split()
    for name in range(4):
        text = "\n".join(f"{name} {i} " + " ".join(words[i % 7 :]) for i in range(2000))
        documents = [text[i : i + 500] for i in range(0, len(text), 500)]
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents))
    source = Corpus(str(tmp_path / "*.txt"))
    exact = previews.preview(source, 400, str(tmp_path / "none"))
    monkeypatch.setattr(previews, "ENOUGH", 100_000)  # the first file
    about = previews.preview(source, 400, str(tmp_path / "none"))
    index = tokenize(source, 400, str(tmp_path / "tokens"))
    train = total(index, "tokens", ["train"])
    assert exact.exact and exact.train == train and exact.val == total(index, "tokens", ["val"])
    assert not about.exact and about.train == pytest.approx(train, rel=0.05)
    assert previews.preview(source, 400, str(tmp_path / "tokens")).train == train

    # A file without an end tells nothing of how much there is.
    monkeypatch.setattr(previews, "MOST", 10_000)
    unknown = previews.preview(source, 400, str(tmp_path / "none"))
    assert unknown.train is None and "not known" in unknown.in_words()
    assert unknown.bytes_a_token == pytest.approx(about.bytes_a_token, rel=0.2)


def test_tokens_are_made_in_whole_shards(monkeypatch):
    monkeypatch.setattr(previews, "SHARD_BYTES", 4000)
    seen = previews.Preview(300, 4.0, 50_000, 1000, False, "")
    assert seen.made(0) == (50_000, 1000)
    assert seen.made(2500) == (3000, 60)
    assert seen.made(10**9)[0] == 50_000
    assert previews.Preview(300, 4.0, None, None, False, "").made(2500)[0] == 3000


# ---- a few layers --------------------------------------------------------------------------------


def deep(**more):
    return toy_model(dtype=torch.float32, n_layer=6, **more)


def loss_of(model, T=16):
    def loss(n):
        ids = torch.zeros(n, T, dtype=torch.long)
        return learner.text_loss(model, ids, ids)

    return loss


def test_a_few_layers_tell_what_all_hold():
    model = deep()
    settings = dict(seq_len=16, batch_tokens=64, device_tokens=32)
    loss = loss_of(model)
    tried = trial.try_step(model, model, loss, settings, muon=True, flop_rate=1e9)
    passes = ((partial(loss, n), 16 * n) for n in (1, 2))
    whole = memory.activation_bytes(model, *passes, 32)
    assert tried.activations == pytest.approx(whole, rel=0.05)
    assert len(model.model.layers) == 6 and model.config.n_layer == 6
    assert all(p.grad is None for p in model.parameters())
    assert "1 and 3 of 6 layers" in tried.how and tried.seconds > 0


def test_the_line_through_a_few_layers():
    assert trial.extended((1, 3), (5.0, 9.0), 20) == 9 + 17 * 2
    assert trial.extended((1, 3), (9.0, 5.0), 20) == 5  # noise does not make a run shorter
    assert trial.extended((4,), (7.0,), 4) == 7


@pytest.mark.parametrize("recompute", [False, True])
def test_sizes_without_numbers_are_those_of_a_real_pass(recompute, monkeypatch):
    monkeypatch.setattr(memory, "HOLES", dict.fromkeys(memory.HOLES, 1.0))
    model = deep()
    model.recompute = recompute
    passes = ((partial(loss_of(model, 64), n), 64 * n) for n in (1, 2))
    real = memory.activation_bytes(model, *passes, 4096)
    counted = memory.activation_bytes_on_a_gpu(model.config, torch.float32, 4096, recompute)
    assert counted == pytest.approx(real, rel=0.01)


# ---- the plan ------------------------------------------------------------------------------------


def test_rollouts_are_reckoned_as_the_engine_counts_them():
    model = toy_model(dtype=torch.float32)
    engine = Engine(model)
    engine.generate(
        [[1] * 20] * 3, samples_per_prompt=4, max_new_tokens=30, stop_ids=(), keys=[1, 2, 3]
    )
    asked = plan.Rollouts(3, 4, 20, 30, 30)
    assert asked.bytes_read(model.config, 4) == pytest.approx(cost.bytes_decoded(engine), rel=0.1)
    assert asked.flops(model.config) == pytest.approx(cost.causal_sampling_flops(engine), rel=0.1)
    assert asked.share(2).problems == 2


def test_the_memory_of_a_base_run_by_arithmetic():
    config = GPTConfig.from_depth(20, 32768)
    total_numbers, multiplied = config.n_params()
    matrices = multiplied - 32768 * 1280
    assert plan.optimizer_numbers(config, muon=False) == 2 * total_numbers
    assert plan.optimizer_numbers(config, muon=True) == 2 * total_numbers - matrices
    parts = plan.training_bytes(config, True, ranks=8, activations=1)
    assert parts["all-reduce"] == parts["weights"] == 4 * total_numbers
    assert plan.training_bytes(config, True, 1, 5.0)["activations"] == 5.0


def planned(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    saved = dict(vars(tool))
    try:
        tool.main()
    finally:
        vars(tool).update(saved)
    return capsys.readouterr().out


def test_the_plan_of_depth_20_on_eight_gpus(monkeypatch, capsys):
    said = planned(monkeypatch, capsys, "--dollars_per_gpu_hour=2")
    lines = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    assert "447,668,480 parameters" in said and "17,078 steps of 524,288 tokens" in said
    assert "assumed, not measured: 40% MFU in base" in said and "WARNING" not in said
    base = lines["base"]
    config = GPTConfig.from_depth(20, 32768)
    seconds = plan.text_flops(config, 17078 * 524288, 2048) / (8 * 0.4 * 989e12)
    assert float(base[-4 - 1]) == pytest.approx(8 * seconds / 3600, abs=0.06)
    assert float(base[-4]) == pytest.approx(2 * 8 * seconds / 3600, abs=0.6)
    said = planned(monkeypatch, capsys, "--gpu=rtx4090")
    assert "WARNING: that does not fit rtx4090" in said and "dollars" not in said
    with pytest.raises(SystemExit, match="--gpu=h10: it must be one of h100, h200"):
        planned(monkeypatch, capsys, "--gpu=h10")


def test_a_plan_like_a_run_takes_its_speeds(out, monkeypatch, capsys):
    small = ["--depth=1", "--vocab_size=300", f"--like={out / 'a'}"]
    said = planned(monkeypatch, capsys, *small)
    row = rows(out / "a" / "base")[-1]
    with open(out / "a" / "base" / "metrics.jsonl") as f:
        seconds = sum(json.loads(line)["time/step"] for line in f)
    assert f"base {row['flops_causal_total'] / seconds:.3g} FLOP/s" in said
    # What that run does not have is still assumed.
    assert "MFU in base" not in said and "MFU in RL's learner" in said
    with pytest.raises(ValueError, match="no steps of base, sft or rl in it"):
        planned(monkeypatch, capsys, "--like=nowhere")


# ---- passes of RL --------------------------------------------------------------------------------


class Stages:
    """Two stages: 100 problems until step 20, then very many."""

    stages = [(0, range(100)), (20, range(10**9))]

    def n_of(self, task):
        return len(task)


def test_steps_are_said_as_passes():
    problems = Stages()
    said = terminal.passes_in_words(problems, 16, 40)
    assert said == (
        "40 steps x 16 problems; from step 0 on 3.20 passes over 100 problems; "
        "from step 20 on less than 0.01 passes over 1,000,000,000 problems"
    )
    problems.stages = [(0, range(7473))]
    said = terminal.passes_in_words(problems, 16, 40)
    assert said == "40 steps x 16 problems = 0.09 passes over 7,473 problems"
