"""The benchmark's parts: the obvious way is right too, and each command gives its figures."""

import json

import pytest
import torch
from conftest import toy_model

from nanorl.engine import Engine
from nanorl.gpt import token_logprobs
from nanorl.rollout import Rollout
from nanorl.sampling import Completion
from nanorl.tools import bench, naive


def test_the_obvious_way_samples_from_the_model():
    """Near temperature 0 there is nothing to choose: the same tokens as the engine's; and it stops where the engine does."""
    model = toy_model()
    model.lm_head.weight.data *= 1e6
    prompts, stops = [[1, 2, 3], [7, 8, 9]], [3, 5, 9, 11, 40]
    groups = Engine(model).generate(prompts, 2, 20, stop_ids=stops)
    ids, kept = naive.generate(model, prompts, 2, 20, stops)
    assert [row[: len(c.ids)] for row, c in zip(ids.tolist(), sum(groups, []))] == [
        c.ids for c in sum(groups, [])
    ]
    assert kept == sum(len(c.ids) for g in groups for c in g)


def test_the_obvious_way_learns_by_the_policy_gradient():
    model = toy_model()
    rollouts = [
        Rollout(
            None,
            [7, 8],
            [Completion([5, 0, 4, 0], [], True), Completion([0], [], True)],
            None,
            None,
            None,
        )
    ]
    naive.learn(model, rollouts, [[0.5, -0.25]], 2)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for c, a in zip(rollouts[0].completions, (0.5, -0.25)):
        (
            -a
            / 5
            * token_logprobs(
                model(torch.tensor([[7, 8] + c.ids]))[0, 1:-1], torch.tensor(c.ids)
            ).sum()
        ).backward()
    for a, b in zip(found, (p.grad for p in model.parameters())):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("command", ["rollout", "learner", "step"])
def test_each_command_gives_its_figures(command, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        [
            "bench",
            command,
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
        ],
    )
    for name, value in vars(bench).copy().items():
        if isinstance(value, (bool, int, float, str)) and not name.startswith("__"):
            monkeypatch.setattr(bench, name, value)  # put back afterwards
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    row = json.loads(last)
    assert row["command"] == command and row["settings"]["prompts"] == 2 and len(table) > 5
    assert all(
        row[name] > 0
        for name in ("tok_s", "speedup_over_naive", "of_floor", "gflop_s", "gb_s", "floor_s")
    )
    assert {
        "rollout": "occupancy_over_time",
        "learner": "padding_of_attention",
        "step": "update_share",
    }[command] in row
