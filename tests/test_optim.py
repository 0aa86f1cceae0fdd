import math

import pytest
import torch

from conftest import toy_model
from nanorl.optim import group_norms, lr_scale, make_optimizers, update


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_changes_nothing(muon, value):
    """Muon with old momentum moves weights as far on a zero gradient as on a full one."""
    model = toy_model(dtype=torch.float32)
    params = list(model.parameters())
    optimizers = make_optimizers(model, 0.02, 0.01, weight_decay=0.1, muon=muon)

    def step(gradient):
        for p in params:
            p.grad = torch.full_like(p, gradient)
        return update(optimizers, params, 1.0, 1.0)

    assert step(1.0) > 0
    weights = [p.clone() for p in params]
    states = [str(o.state_dict()) for o in optimizers]
    norm = step(value)
    if value == 0:
        assert norm == 0
    else:
        assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(weights, params))
    assert states == [str(o.state_dict()) for o in optimizers]
    assert all(p.grad is None for p in params)
    step(1.0)
    assert not all(torch.equal(a, b) for a, b in zip(weights, params))


def test_clipping_is_by_the_global_norm_and_reports_the_norm_before():
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    sgd = torch.optim.SGD(params, lr=1.0)
    sgd.param_groups[0]["initial_lr"] = 1.0
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert update([sgd], params, 0.5, 1.0) == pytest.approx(5.0)
    assert params[0].tolist() == pytest.approx([-0.3, 0.0])
    assert params[1].tolist() == pytest.approx([-0.4])


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest():
    model = toy_model()
    muon, adamw = make_optimizers(model, 0.02, 0.01)
    hidden = {id(p) for p in muon.param_groups[0]["params"]}
    assert hidden == {id(p) for n, p in model.named_parameters() if "_proj" in n}
    assert len(hidden) + len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))


def test_schedule():
    assert [lr_scale(s, 10, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_scale(s, 10, cooldown=0.5) for s in range(10)] == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    assert lr_scale(9, 10) == 1.0
    assert [lr_scale(s, 4, cooldown=1.0, shape="linear") for s in range(4)] == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )
    half = math.sqrt(0.5) / 2
    assert [lr_scale(s, 4, cooldown=1.0, shape="cosine") for s in range(4)] == pytest.approx(
        [1, 0.5 + half, 0.5, 0.5 - half]
    )
    assert [lr_scale(s, 4, warmup=2, shape="constant") for s in range(4)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_norms_by_parameter_group_make_up_the_whole(tied):
    model = toy_model(tie_embeddings=tied)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    norms = group_norms(model)
    expected = {"attention", "mlp", "norms", "embeddings"}
    if not tied:
        expected.add("head")
    assert set(norms) == expected
    whole = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert sum(norm * norm for norm in norms.values()) == pytest.approx(whole)
    only = [p.grad.square().sum() for name, p in model.named_parameters() if ".mlp." in name]
    assert norms["mlp"] == pytest.approx(float(sum(only)) ** 0.5)
    for p in model.parameters():
        p.grad = None
    assert group_norms(model) == {}


def test_the_rules_without_momentum_by_hand():
    """Two steps of RMSprop and SGD on one gradient, and AdamW's betas."""
    beta, lr, g = 0.9, 0.01, 0.5
    for rule in ("rmsprop", "sgd"):
        model = torch.nn.Linear(1, 1, bias=False).double()
        before = model.weight.item()
        optimizers = make_optimizers(model, lr, lr, muon=False, rule=rule, betas=(0.0, beta))
        second, moved = 0.0, 0.0
        for _ in range(2):
            model.weight.grad = torch.full((1, 1), g, dtype=torch.float64)
            update(optimizers, [model.weight], 1.0, 0)
            second = beta * second + (1 - beta) * g * g
            moved += lr * g / (second**0.5 + 1e-8) if rule == "rmsprop" else lr * g
        assert before - model.weight.item() == pytest.approx(moved, rel=1e-12)
    (adamw,) = make_optimizers(model, lr, lr, muon=False, betas=(0.5, 0.6))
    assert {group["betas"] for group in adamw.param_groups} == {(0.5, 0.6)}
