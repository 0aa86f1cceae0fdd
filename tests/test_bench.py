"""The benchmark's parts: the obvious way is right too, and each command gives its figures."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import toy_model
from nanorl.engine import Engine
from nanorl.gpt import GPTConfig, token_logprobs
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from nanorl.tools import bench, bench_base, bench_loader, naive


def test_the_obvious_way_samples_from_the_model():
    """Near temperature 0 there is nothing to choose: the tokens are the engine's.

    And it stops where the engine does.
    """
    model = toy_model()
    model.lm_head.weight.data *= 1e6
    prompts, stops = [[1, 2, 3], [7, 8, 9]], [3, 5, 9, 11, 40]
    groups = Engine(model).generate(prompts, 2, 20, stop_ids=stops)
    expected = [completion.ids for group in groups for completion in group]
    ids, kept = naive.generate(model, prompts, 2, 20, stops)
    assert [row[: len(e)] for row, e in zip(ids.tolist(), expected)] == expected
    assert kept == sum(len(e) for e in expected)


def test_the_obvious_way_learns_by_the_policy_gradient():
    model = toy_model()
    prompt, advantages = [7, 8], (0.5, -0.25)
    completions = [Completion([5, 0, 4, 0], [], True), Completion([0], [], True)]
    rollout = Rollout(None, prompt, completions, None, None, None)
    naive.learn(model, [rollout], [advantages], 2)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for completion, a in zip(completions, advantages):
        logits = model(torch.tensor([prompt + completion.ids]))[0, 1:-1]
        logprobs = token_logprobs(logits, torch.tensor(completion.ids))
        (-a / 5 * logprobs.sum()).backward()
    for gradient, p in zip(found, model.parameters()):
        assert (gradient - p.grad).abs().max() < 1e-10


SMALL = [
    "--depth=1",
    "--vocab_size=64",
    "--prompts=2",
    "--samples=2",
    "--prompt_tokens=5",
    "--new_tokens=6",
    "--repeats=1",
    "--stops=0.05",
    "--dtype=fp32",
    "--naive_rows=2",
]
OWN_FIGURE = {
    "rollout": "occupancy_over_time",
    "learner": "padding_of_attention",
    "step": "update_share",
}


@pytest.mark.parametrize("command", ["rollout", "learner", "step"])
def test_each_command_gives_its_figures(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", command, *SMALL])
    for name, value in vars(bench).copy().items():
        if isinstance(value, (bool, int, float, str)) and not name.startswith("__"):
            monkeypatch.setattr(bench, name, value)  # put back afterwards
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    row = json.loads(last)
    assert row["command"] == command and row["settings"]["prompts"] == 2 and len(table) > 5
    for name in ("tok_s", "speedup_over_naive", "of_floor", "gflop_s", "gb_s", "floor_s"):
        assert row[name] > 0
    assert OWN_FIGURE[command] in row


@pytest.mark.parametrize("command", ["rollout", "learner", "step", "base", "flips", "rates"])
def test_each_command_obeys_device(command, monkeypatch):
    """A GPU that is not there is asked for, and refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", command, "--device=cuda"])
    monkeypatch.setattr(bench, "device", "auto")  # put back afterwards
    with pytest.raises(ValueError, match="--device=cuda: this machine has no CUDA GPU"):
        bench.main()


@pytest.mark.parametrize("compiled", [False, True])
def test_pretraining_runs_where_its_options_say(compiled):
    """Both loops work on a device that computes nothing."""
    options = SimpleNamespace(depth=1, width=64, vocab_size=32, seq_len=8)
    device = torch.device("meta")
    ids = torch.ones(2, 8, dtype=torch.long, device=device)
    ours = bench_base.OurStep(bench_base.config_of(options), 16, device, torch.float32, compiled)
    assert {p.device for p in ours.params} == {device}
    plain = bench_base.PlainGPT(1, 64, 1, 32, 8).to(device)
    with AllOnMeta():
        assert plain(ids).shape == (2, 8, 32)


class AllOnMeta(TorchDispatchMode):
    """No operation makes a tensor anywhere else."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        assert all(t.device.type == "meta" for t in tree_leaves(made)), operation
        return made


def test_loader_gives_the_rates_of_tokenizing_and_of_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "ROWS", 4)
    monkeypatch.setattr(bench_loader, "T", 16)
    text = "\n<|endoftext|>\n".join(f"{i} the cat sat on the mat" * 9 for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    options = SimpleNamespace(data=f"{tmp_path}/*.txt", vocab_size=300, seconds=0.02, repeats=3)
    figures = bench_loader.measure_loader(options)
    assert figures["d20_horizon"] == 20 * GPTConfig.from_depth(20, 300).n_params()[0]
    core_seconds = figures["d20_horizon"] / figures["tok_s_a_core"]
    assert figures["d20_core_hours"] == pytest.approx(core_seconds / 3600, rel=0.05)
    bytes_a_second = figures["tok_s_a_core"] * figures["bytes_a_token"]
    assert figures["mb_s_a_core"] == pytest.approx(bytes_a_second / 1e6, rel=0.05)
    times = figures["loader_tok_s"] / bench_loader.H100_RATE
    assert figures["loader_over_h100"] == pytest.approx(times, abs=0.06)
    assert times > 1  # with 4 rows of 16 tokens: the overhead of a batch is all there is


def test_loader_asks_for_text():
    with pytest.raises(ValueError, match="--data='folder"):
        bench_loader.measure_loader(SimpleNamespace(data=""))
