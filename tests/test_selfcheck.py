"""The naive implementation itself: against the model, for every head layout, and by hand."""

import ast

import pytest
import torch

from conftest import toy_model
from nanorl import grpo
from nanorl.gpt import token_logprobs
from nanorl.tools import selfcheck


@pytest.mark.parametrize(
    "heads",
    [
        dict(),
        dict(n_kv_head=4, tie_embeddings=True),
        dict(n_kv_head=1, qk_norm=False, qkv_bias=True),
        dict(rope_scaling=(8.0, 1.0, 4.0, 16), rope_theta=100.0),
    ],
)
def test_the_naive_forward_is_the_model(heads):
    model = toy_model(n_tokens=60, **heads)
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    naive = selfcheck.row_logprobs(weights, model.config, ids, 0.7)
    expected = token_logprobs(model(ids[None])[0, :-1], ids[1:], 0.7)
    assert (naive - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["mean", "loo", "zscore"])
def test_the_naive_advantages(kind):
    for r in ([1.0, 0.0, 0.5, 0.0], [0.1] * 4):
        expected = grpo.advantages(torch.tensor([r], dtype=torch.float64), kind)[0].tolist()
        assert selfcheck.group_advantages(r, kind) == pytest.approx(expected, abs=1e-15)


def test_it_does_not_share_code_with_what_it_checks():
    """The exception is dist, by which ranks agree on the verdict.

    An import counts wherever in the file it stands.
    """
    with open(selfcheck.__file__, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in imported if name.startswith("nanorl")} == {"nanorl.runtime.dist"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "importlib", "eval", "exec", "sys"}  # no other way in
