"""The objective against truth: enumeration of every completion of a tiny model, in fp64."""
import copy
import itertools

import pytest
import torch

from conftest import toy_model
from nanorl import grpo
from nanorl.gpt import token_logprobs


def test_advantages():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    assert torch.equal(grpo.advantages(r), torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]], dtype=torch.float64))
    loo = grpo.advantages(r, "loo")  # r_i minus the mean of the others, by hand
    assert torch.allclose(loo[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64))
    assert torch.allclose(loo, grpo.advantages(r) * 4 / 3)
    z = grpo.advantages(r, "zscore")
    assert torch.allclose(z[1], torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64) / ((1 / 3) ** 0.5 + 1e-4))  # ddof 1


@pytest.mark.parametrize("kind", ["mean", "loo", "zscore"])
def test_equal_rewards_give_exactly_zero(kind):
    """Twelve rewards of 0.1 have an fp32 mean that is not 0.1; divided by a deviation of 1e-9 that was |A| = 0.58."""
    r = torch.tensor([[0.1] * 12, [0.1] * 11 + [0.2]], dtype=torch.float32)
    a = grpo.advantages(r, kind)
    assert torch.equal(a[0], torch.zeros(12)) and (a[1] != 0).all()
    assert grpo.no_signal(r).tolist() == [True, False]


def test_groups_of_one_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="samples_per_prompt is 1"):
        grpo.advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="'median'"):
        grpo.advantages(torch.zeros(3, 2), "median")
    with pytest.raises(ValueError, match="'batch'"):
        grpo.token_weights(torch.ones(3), "batch")


def test_loss_norms_by_hand():
    lengths = torch.tensor([2, 4])
    logprobs = torch.tensor([-1.0, -2, -3, -4, -5, -6], dtype=torch.float64)
    a = torch.tensor([1.0, 1, -0.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    loss = lambda kind: float(grpo.policy_loss(grpo.reinforce(logprobs, a), grpo.token_weights(lengths, kind, 10).repeat_interleave(lengths),
                                               grpo.denominator(lengths, kind)))
    assert loss("token") == pytest.approx(-(1 * -3 - 0.5 * -18) / 6)
    assert loss("sequence") == pytest.approx(-(1 * -3 / 2 - 0.5 * -18 / 4) / 2)
    assert loss("constant") == pytest.approx(-(1 * -3 - 0.5 * -18) / 10 / 2)


def test_no_trainable_tokens_is_not_a_division_by_zero():
    empty = torch.zeros(0, dtype=torch.float64)
    assert float(grpo.policy_loss(empty, empty, 0)) == 0


# ---- against the exact gradient of the expected reward --------------------------------------------------------

V, LENGTH, STOP, PROMPT = 3, 3, 0, [1, 2]


def completions():
    """Every completion over V tokens that ends with STOP or after LENGTH tokens."""
    for n in range(1, LENGTH + 1):
        for ids in itertools.product(range(V), repeat=n):
            if STOP not in ids[:-1] and (ids[-1] == STOP or n == LENGTH):
                yield list(ids)


def reward(ids):
    return float(ids[-1] == STOP) + 0.5 * ids.count(2) - 0.3 * len(ids)


def logprobs(model, ids):
    logits = model(torch.tensor([PROMPT + ids[:-1]]))[0, len(PROMPT) - 1:]
    return token_logprobs(logits, torch.tensor(ids), 0.8)


def gradient(model, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def expected_gradient(model, G, advantage, loss_norm):
    """E over all groups of G independent samples of minus the loss's gradient: every group enumerated, weighted by
    its probability."""
    every = list(completions())
    lp = [logprobs(model, ids) for ids in every]
    p = [float(x.sum().detach().exp()) for x in lp]
    assert sum(p) == pytest.approx(1, abs=1e-12)
    weight = torch.zeros(len(every), dtype=torch.float64)  # what each completion's summed log-prob is multiplied by in all
    for group in itertools.product(range(len(every)), repeat=G):
        chance = 1.0
        for i in group:
            chance *= p[i]
        lengths = torch.tensor([len(every[i]) for i in group])
        a = grpo.advantages(torch.tensor([[reward(every[i]) for i in group]], dtype=torch.float64), advantage)[0]
        w = grpo.token_weights(lengths, loss_norm, LENGTH)
        for i, ai, wi in zip(group, a, w):
            weight[i] += chance * ai * wi / grpo.denominator(lengths, loss_norm)
    return gradient(model, sum(w * x.sum() for w, x in zip(weight, lp)))


@pytest.fixture(scope="module")
def truth():
    model = toy_model(vocab=V, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_inner=8)
    expected_reward = sum(logprobs(model, ids).sum().exp() * reward(ids) for ids in completions())
    return model, gradient(model, expected_reward)


@pytest.mark.parametrize("G", [2, 3])
def test_leave_one_out_with_constant_norm_is_unbiased(truth, G):
    model, exact = truth
    assert (expected_gradient(model, G, "loo", "constant") * LENGTH - exact).abs().max() < 1e-12


@pytest.mark.parametrize("G", [2, 3])
def test_mean_baseline_scales_the_gradient_by_one_minus_one_over_G(truth, G):
    model, exact = truth
    assert (expected_gradient(model, G, "mean", "constant") * LENGTH - (1 - 1 / G) * exact).abs().max() < 1e-12


@pytest.mark.parametrize("advantage,loss_norm", [("loo", "token"), ("loo", "sequence"), ("zscore", "constant")])
def test_the_other_forms_are_biased_and_still_point_uphill(truth, advantage, loss_norm):
    model, exact = truth
    g = expected_gradient(model, 2, advantage, loss_norm)
    cosine = float(g @ exact / g.norm() / exact.norm())
    assert 0.5 < cosine < 1 - 1e-6


def test_one_step_makes_the_better_completion_likelier(truth):
    model, _ = truth
    model = copy.deepcopy(model)
    good, bad = [2, 2, 0], [1, 1, 1]
    a = grpo.advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0]
    lp = [logprobs(model, good), logprobs(model, bad)]
    flat = torch.cat(lp)
    before = [float(x.detach().sum()) for x in lp]
    grpo.policy_loss(grpo.reinforce(flat, a.repeat_interleave(torch.tensor([3, 3]))), torch.ones(6, dtype=torch.float64), 6).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert float(logprobs(model, good).detach().sum()) > before[0] and float(logprobs(model, bad).detach().sum()) < before[1]
