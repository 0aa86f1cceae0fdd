"""The objective against truth: enumeration of every completion of a tiny model, in fp64."""

import copy
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, toy_model

from nanorl import grpo
from nanorl.gpt import token_logprobs


def test_advantages():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    assert torch.equal(
        grpo.advantages(r),
        torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]], dtype=torch.float64),
    )
    loo = grpo.advantages(r, "loo")  # r_i minus the mean of the others, by hand
    assert torch.allclose(loo[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64))
    assert torch.allclose(loo, grpo.advantages(r) * 4 / 3)
    z = grpo.advantages(r, "zscore")
    assert torch.allclose(
        z[1], torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64) / ((1 / 3) ** 0.5 + 1e-4)
    )  # ddof 1


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
    loss = lambda kind: float(
        grpo.policy_loss(
            grpo.reinforce(logprobs, a),
            grpo.token_weights(lengths, kind, 10).repeat_interleave(lengths),
            grpo.denominator(lengths, kind),
        )
    )
    assert loss("token") == pytest.approx(-(1 * -3 - 0.5 * -18) / 6)
    assert loss("sequence") == pytest.approx(-(1 * -3 / 2 - 0.5 * -18 / 4) / 2)
    assert loss("constant") == pytest.approx(-(1 * -3 - 0.5 * -18) / 10 / 2)


def test_no_trainable_tokens_is_not_a_division_by_zero():
    empty = torch.zeros(0, dtype=torch.float64)
    assert float(grpo.policy_loss(empty, empty, 0)) == 0


# ---- against the exact gradient of the expected reward --------------------------------------------------------

V, LENGTH, STOP, T = 3, 3, 0, 0.8
PROMPTS = [[1, 2], [2, 2, 1]]
TOY = dict(vocab=V, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_inner=8)


def completions():
    """Every completion over V tokens that ends with STOP or after LENGTH tokens."""
    for n in range(1, LENGTH + 1):
        for ids in itertools.product(range(V), repeat=n):
            if STOP not in ids[:-1] and (ids[-1] == STOP or n == LENGTH):
                yield list(ids)


EVERY = list(completions())
assert len(EVERY) == 15


def reward(ids):
    """Rewards that differ with length and content; some completions earn the same, so that some groups are dead."""
    return float(ids[-1] == STOP) + 0.5 * ids.count(2) - 0.25 * len(ids)


def logprobs(model, ids, prompt=PROMPTS[0]):
    logits = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
    return token_logprobs(logits, torch.tensor(ids), T)


def gradient(model, value):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        ]
    )


def expected_reward(model, prompt=PROMPTS[0]):
    return sum(logprobs(model, ids, prompt).sum().exp() * reward(ids) for ids in EVERY)


def sequence_kl(model, reference, prompt=PROMPTS[0]):
    """KL(pi || ref) over whole completions."""
    own, ref = ([logprobs(m, ids, prompt).sum() for ids in EVERY] for m in (model, reference))
    return sum(a.exp() * (a - b.detach()) for a, b in zip(own, ref))


def expected_gradient(
    model,
    G=2,
    advantage="loo",
    loss_norm="constant",
    overlong="zero",
    sampler=None,
    clip=None,
    reference=None,
    estimator=None,
    kl_coef=1.0,
    with_reward=True,
    live_only=False,
    prompt=PROMPTS[0],
):
    """E over all groups of G independent samples of minus the loss's gradient, by grpo's functions: every group enumerated, weighted by its
    probability under `sampler` (default: the model itself). live_only: given that the group is not dead."""
    lp = [logprobs(model, ids, prompt) for ids in EVERY]
    old = [
        x.detach()
        for x in (lp if sampler is None else [logprobs(sampler, ids, prompt) for ids in EVERY])
    ]
    ref = (
        None if reference is None else [logprobs(reference, ids, prompt).detach() for ids in EVERY]
    )
    p = [float(x.sum().exp()) for x in old]
    assert sum(p) == pytest.approx(1, abs=1e-12)
    total, mass = 0.0, 0.0
    for group in itertools.product(range(len(EVERY)), repeat=G):
        chance = math.prod(p[i] for i in group)
        rewards = torch.tensor(
            [[reward(EVERY[i]) * with_reward for i in group]], dtype=torch.float64
        )
        if live_only and grpo.no_signal(rewards)[0]:
            continue
        lengths = torch.tensor([[len(EVERY[i]) for i in group]])
        counted = (
            torch.tensor([[EVERY[i][-1] == STOP for i in group]]) if overlong == "mask" else None
        )
        a = grpo.advantages(rewards, advantage)
        w = grpo.token_weights(lengths, loss_norm, LENGTH, counted)
        flat = lambda values: torch.cat([values[i] for i in group])
        spread = lambda table: table[0].repeat_interleave(lengths[0])
        a, w = spread(a), spread(w)
        if estimator == "k1-in-reward":
            a = a - kl_coef * grpo.kl_to_go(flat(old), flat(ref), lengths[0])
        objective = (
            grpo.reinforce(flat(lp), a)
            if clip is None
            else grpo.clipped(flat(lp), flat(old), a, *clip)
        )
        if estimator in ("k2", "k3"):
            objective = objective - kl_coef * grpo.kl(
                flat(lp), flat(ref), estimator, None if sampler is None else flat(old)
            )
        total = total - chance * grpo.policy_loss(
            objective, w, grpo.denominator(lengths, loss_norm, counted)
        )
        mass += chance
    return gradient(model, total) / mass


def stepped(model, size):
    """The model after a step uphill, so that the one before it is the policy that sampled."""
    after = copy.deepcopy(model)
    g = gradient(after, expected_reward(after))
    vector = torch.nn.utils.parameters_to_vector(after.parameters()) + size * g / g.norm()
    torch.nn.utils.vector_to_parameters(vector.detach(), after.parameters())
    return after


@pytest.fixture(scope="module")
def truth():
    model = toy_model(**TOY)
    return model, gradient(model, expected_reward(model))


@pytest.fixture(scope="module")
def reference():
    return toy_model(seed=1, **TOY)


@pytest.mark.parametrize("G", [2, 3])
def test_leave_one_out_with_constant_norm_is_unbiased(truth, G):
    model, exact = truth
    assert (expected_gradient(model, G) * LENGTH - exact).abs().max() < 1e-12


@pytest.mark.parametrize("G", [2, 3])
def test_mean_baseline_scales_the_gradient_by_one_minus_one_over_G(truth, G):
    model, exact = truth
    assert (expected_gradient(model, G, "mean") * LENGTH - (1 - 1 / G) * exact).abs().max() < 1e-12


def test_kl_in_the_reward_is_the_gradient_of_the_sequence_kl(truth, reference):
    model, exact = truth
    whole = (
        expected_gradient(model, reference=reference, estimator="k1-in-reward", kl_coef=0.3)
        * LENGTH
    )
    assert (
        whole - (exact - 0.3 * gradient(model, sequence_kl(model, reference)))
    ).abs().max() < 1e-12


def prefix_kl(model, reference, visits, forward):
    """Sum over prefixes of how often they are visited times the KL between the next tokens' distributions there."""
    value = 0.0
    for prefix, visit in visits.items():
        p, q = (
            m(torch.tensor([PROMPTS[0] + list(prefix)]))[0, -1].div(T).log_softmax(-1)
            for m in (model, reference)
        )
        value = value + visit * ((q.exp() * (q - p)) if forward else (p.exp() * (p - q))).sum()
    return value


def visits(model):
    """How often the model comes to each prefix from which it samples a token."""
    count = {}
    for ids in EVERY:
        chance = float(logprobs(model, ids).sum().detach().exp())
        for t in range(len(ids)):
            count[tuple(ids[:t])] = count.get(tuple(ids[:t]), 0.0) + chance
    return count


@pytest.mark.parametrize("estimator", ["k1-in-reward", "k2", "k3"])
def test_kl_gradients_against_finite_differences(truth, reference, estimator):
    """k1 in the reward climbs down the sequence's KL; k2 and k3 those of the next tokens, reverse and forward, at the prefixes the
    model visits now."""
    model, _ = truth
    g = (
        -expected_gradient(model, with_reward=False, reference=reference, estimator=estimator)
        * LENGTH
    )
    fixed = visits(model)
    of = {
        "k1-in-reward": lambda m: sequence_kl(m, reference),
        "k2": lambda m: prefix_kl(m, reference, fixed, forward=False),
        "k3": lambda m: prefix_kl(m, reference, fixed, forward=True),
    }[estimator]
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for seed in range(3):
        direction = torch.randn(
            len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        values, moved, step = [], copy.deepcopy(model), 1e-5
        with torch.no_grad():
            for sign in (1, -1):
                torch.nn.utils.vector_to_parameters(
                    start + sign * step * direction, moved.parameters()
                )
                values.append(float(of(moved)))
        assert float(g @ direction) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def variants(model, reference):
    """Every form of the objective -> (its expected gradient, scaled so that 1 is right, the exact gradient of what it is meant to climb)."""
    exact = gradient(model, expected_reward(model))
    after = stepped(model, 0.01)
    exact_after = gradient(after, expected_reward(after))
    kl = -gradient(model, sequence_kl(model, reference))
    kl_after = -gradient(after, sequence_kl(after, reference))
    both = sum(gradient(model, expected_reward(model, prompt)) for prompt in PROMPTS)
    only_kl = dict(with_reward=False, reference=reference)
    e = lambda **form: expected_gradient(form.pop("model", model), **form)
    return {
        "`loo`, `constant`": (e() * LENGTH, exact),
        "`mean`, `constant` (Dr. GRPO)": (e(advantage="mean") * LENGTH, exact),
        "`zscore`, `constant`": (e(advantage="zscore") * LENGTH, exact),
        "`loo`, `token`": (e(loss_norm="token"), exact),
        "`mean`, `token` (default)": (e(advantage="mean", loss_norm="token"), exact),
        "`loo`, `sequence`": (e(loss_norm="sequence"), exact),
        "`zscore`, `sequence` (GRPO)": (e(advantage="zscore", loss_norm="sequence"), exact),
        "`loo`, `constant`, `overlong=mask`": (e(overlong="mask") * LENGTH, exact),
        "`loo`, `constant`, dead groups replaced, two prompts": (
            sum(e(live_only=True, prompt=prompt) for prompt in PROMPTS) * LENGTH,
            both,
        ),
        "second update, ratio, not clipped": (
            e(model=after, sampler=model, clip=(1.0, math.inf)) * LENGTH,
            exact_after,
        ),
        "second update, ratio in [0.8, 1.2]": (
            e(model=after, sampler=model, clip=(0.2, 0.2)) * LENGTH,
            exact_after,
        ),
        "second update, no ratio": (e(model=after, sampler=model) * LENGTH, exact_after),
        "KL `k1-in-reward`": (e(estimator="k1-in-reward", **only_kl) * LENGTH, kl),
        "KL `k2`": (e(estimator="k2", **only_kl) * LENGTH, kl),
        "KL `k3`": (e(estimator="k3", **only_kl) * LENGTH, kl),
        "KL `k2`, second update": (
            e(model=after, sampler=model, clip=(1.0, math.inf), estimator="k2", **only_kl) * LENGTH,
            kl_after,
        ),
    }


def test_the_table_of_biases_in_the_docs_is_what_enumeration_gives(truth, reference):
    """docs/algorithm.md, item 34: the angle to the exact gradient, and the length beside it."""
    table = {}
    with open(os.path.join(ROOT, "docs", "algorithm.md"), encoding="utf-8") as f:
        for line in f:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) == 4 and cells[1].endswith("°"):
                table[cells[0]] = cells[1:3]
    for name, (g, exact) in variants(truth[0], reference).items():
        g, length = g / exact.norm(), float(g.norm() / exact.norm())
        along = float(
            g @ exact / exact.norm()
        )  # atan2, because acos loses half of the digits near 1
        angle = math.degrees(math.atan2(float((g - along * exact / exact.norm()).norm()), along))
        assert table.pop(name, None) == [f"{angle:.1f}°", f"{length:.3f}"], (
            f"| {name} | {angle:.1f}° | {length:.3f} |"
        )
    assert not table


def test_the_clip_takes_the_gradient_where_it_should_and_nowhere_else():
    old = torch.zeros(7, dtype=torch.float64)
    ratio = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.7, 1.25, 0.75], dtype=torch.float64)
    a = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    lp = ratio.log().requires_grad_()
    value = grpo.clipped(lp, old, a, 0.2, 0.28)
    assert value.tolist() == pytest.approx([2.0, 2.56, 1.4, -2.6, -1.6, 2.5, -1.6])
    value.sum().backward()
    assert lp.grad.tolist() == pytest.approx([2.0, 0.0, 1.4, -2.6, 0.0, 2.5, 0.0])
    batch = SimpleNamespace(sampler_logprobs=old, advantages=a, reference_logprobs=None)
    sums = grpo.token_sums(lp, old, batch, grpo.Objective(clip_low=0.2, clip_high=0.28))
    m = grpo.token_metrics(sums, sums)
    assert (
        m["clip_ratio/low_mean"],
        m["clip_ratio/high_mean"],
        m["clip_ratio/region_mean"],
    ) == pytest.approx((2 / 7, 1 / 7, 3 / 7))
    assert m["ratio/mean"] == pytest.approx(float(ratio.mean())) and m[
        "ratio/std"
    ] == pytest.approx(float(((ratio - 1) ** 2).mean().sqrt()))
    assert m["logp_diff/mean"] == pytest.approx(float(ratio.log().abs().mean())) and m[
        "logp_diff/max"
    ] == pytest.approx(-math.log(0.7))
    assert m["logp_diff/kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))


def test_on_policy_the_clipped_surrogate_has_reinforces_gradient(truth):
    model, _ = truth
    assert (
        expected_gradient(model, clip=(0.2, 0.2)) - expected_gradient(model)
    ).abs().max() < 1e-12


def test_kl_by_hand():
    lp, ref = (
        torch.tensor([-1.0, -2.0], dtype=torch.float64),
        torch.tensor([-1.5, -1.0], dtype=torch.float64),
    )
    assert grpo.kl(lp, ref, "k2").tolist() == pytest.approx([0.125, 0.5])
    assert grpo.kl(lp, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(1) - 2])
    old = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    assert grpo.kl(lp, ref, "k2", old).tolist() == pytest.approx(
        [0.125, 0.5 * math.e]
    )  # a token counts pi / pi_old
    assert grpo.kl_to_go(
        torch.tensor([-1.0, -2, -3]), torch.tensor([-2.0, -2.5, -1]), torch.tensor([2, 1])
    ).tolist() == pytest.approx([1.5, 0.5, -2.0])
    with pytest.raises(ValueError, match="'k4'"):
        grpo.kl(lp, ref, "k4")


def test_what_is_masked_is_in_neither_the_sum_nor_the_denominator():
    lengths, counted = torch.tensor([[2, 4], [3, 5]]), torch.tensor([[True, False], [True, True]])
    assert (
        grpo.denominator(lengths, "token", counted) == 10
        and grpo.denominator(lengths, "sequence", counted) == 3
    )
    for kind in ("token", "sequence", "constant"):
        w, plain = (
            grpo.token_weights(lengths, kind, 8, counted),
            grpo.token_weights(lengths, kind, 8),
        )
        assert w[0, 1] == 0 and torch.equal(w[counted], plain[counted])


def test_one_step_makes_the_better_completion_likelier(truth):
    model, _ = truth
    model = copy.deepcopy(model)
    good, bad = [2, 2, 0], [1, 1, 1]
    a = grpo.advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0]
    lp = [logprobs(model, good), logprobs(model, bad)]
    flat = torch.cat(lp)
    before = [float(x.detach().sum()) for x in lp]
    grpo.policy_loss(
        grpo.reinforce(flat, a.repeat_interleave(torch.tensor([3, 3]))),
        torch.ones(6, dtype=torch.float64),
        6,
    ).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert (
        float(logprobs(model, good).detach().sum()) > before[0]
        and float(logprobs(model, bad).detach().sum()) < before[1]
    )
