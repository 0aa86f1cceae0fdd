"""The objective against truth: enumeration of every completion of a tiny model, in fp64."""

import copy
import functools
import itertools
import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, toy_model
from nanorl import grpo
from nanorl.gpt import token_logprobs


def test_advantages():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]).double()
    assert torch.equal(grpo.advantages(r), centred)

    # r_i minus the mean of the others, by hand.
    loo = grpo.advantages(r, "loo")
    assert torch.allclose(loo[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64))
    assert torch.allclose(loo, grpo.advantages(r) * 4 / 3)

    # The standard deviation has ddof 1.
    z = grpo.advantages(r, "zscore")
    deviation = (1 / 3) ** 0.5
    assert torch.allclose(z[1], centred[1] / (deviation + 1e-4))


@pytest.mark.parametrize("kind", ["mean", "loo", "zscore"])
def test_equal_rewards_give_exactly_zero(kind):
    """Twelve rewards of 0.1 have an fp32 mean that is not 0.1.

    Divided by a deviation of 1e-9 that was |A| = 0.58.
    """
    r = torch.tensor([[0.1] * 12, [0.1] * 11 + [0.2]], dtype=torch.float32)
    a = grpo.advantages(r, kind)
    assert torch.equal(a[0], torch.zeros(12))
    assert (a[1] != 0).all()
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

    def loss(kind):
        weights = grpo.token_weights(lengths, kind, 10).repeat_interleave(lengths)
        n = grpo.denominator(lengths, kind)
        return float(grpo.policy_loss(grpo.reinforce(logprobs, a), weights, n))

    assert loss("token") == pytest.approx(-(1 * -3 - 0.5 * -18) / 6)
    assert loss("sequence") == pytest.approx(-(1 * -3 / 2 - 0.5 * -18 / 4) / 2)
    assert loss("constant") == pytest.approx(-(1 * -3 - 0.5 * -18) / 10 / 2)


def test_no_trainable_tokens_is_not_a_division_by_zero():
    empty = torch.zeros(0, dtype=torch.float64)
    assert float(grpo.policy_loss(empty, empty, 0)) == 0


# ---- against the exact gradient of the expected reward -------------------------------------------

V = 3
LENGTH = 3
STOP = 0
TEMPERATURE = 0.8
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
    """A reward that differs with length and content.

    Some completions earn the same, so that some groups are dead.
    """
    return float(ids[-1] == STOP) + 0.5 * ids.count(2) - 0.25 * len(ids)


def logprobs(model, ids, prompt=PROMPTS[0]):
    """The log-probs of a completion's tokens, (len(ids),)."""
    logits = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
    return token_logprobs(logits, torch.tensor(ids), TEMPERATURE)


def every_logprobs(model, prompt=PROMPTS[0]):
    """The logprobs of each completion in EVERY, as a list."""
    return [logprobs(model, ids, prompt) for ids in EVERY]


def gradient(model, value):
    """The gradient of value with respect to all parameters, as one vector."""
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def expected_reward(model, prompt=PROMPTS[0]):
    return sum(logprobs(model, ids, prompt).sum().exp() * reward(ids) for ids in EVERY)


def sequence_kl(model, reference, prompt=PROMPTS[0]):
    """KL(pi || ref) over whole completions."""
    kl = 0.0
    for own, ref in zip(every_logprobs(model, prompt), every_logprobs(reference, prompt)):
        kl = kl + own.sum().exp() * (own.sum() - ref.sum().detach())
    return kl


@dataclass
class Form:
    """A form of the objective, and the conditions under which it is enumerated."""

    G: int = 2
    advantage: str = "loo"
    loss_norm: str = "constant"
    overlong: str = "zero"
    clip: tuple | None = None  # (clip_low, clip_high); None: no ratio
    estimator: str | None = None  # of the KL term; None: no such term
    kl_coef: float = 1.0
    reference: torch.nn.Module | None = None  # of the KL term
    sampler: torch.nn.Module | None = None  # None: the model itself
    with_reward: bool = True  # False: every reward is 0
    live_only: bool = False  # given that the group is not dead
    prompt: list = field(default_factory=lambda: PROMPTS[0])


def expected_gradient(model, **choices):
    """The expectation of minus the loss's gradient over all groups of G independent samples.

    It uses grpo's functions. Every group is enumerated and weighted by its probability under the
    form's sampler. choices: the fields of Form.
    """
    form = Form(**choices)

    # Log-probs of every completion: of the model, of what sampled, of the reference.
    lp = every_logprobs(model, form.prompt)
    sampled = lp if form.sampler is None else every_logprobs(form.sampler, form.prompt)
    old = [x.detach() for x in sampled]
    ref = None
    if form.reference is not None:
        ref = [x.detach() for x in every_logprobs(form.reference, form.prompt)]

    p = [float(x.sum().exp()) for x in old]
    assert sum(p) == pytest.approx(1, abs=1e-12)

    total = 0.0
    mass = 0.0
    for group in itertools.product(range(len(EVERY)), repeat=form.G):
        rewards = [reward(EVERY[i]) * form.with_reward for i in group]
        rewards = torch.tensor([rewards], dtype=torch.float64)  # (1, G)
        if form.live_only and grpo.no_signal(rewards)[0]:
            continue
        chance = math.prod(p[i] for i in group)
        total = total - chance * group_loss(form, group, rewards, lp, old, ref)
        mass += chance
    return gradient(model, total) / mass


def group_loss(form, group, rewards, lp, old, ref):
    """The loss of one group, whose completions are EVERY[i] for i in group.

    rewards: (1, G). lp, old, ref: log-probs of every completion, as lists.
    """
    lengths = torch.tensor([[len(EVERY[i]) for i in group]])  # (1, G)
    counted = None
    if form.overlong == "mask":
        counted = torch.tensor([[EVERY[i][-1] == STOP for i in group]])

    # One value a completion -> one a token of the group, (S,).
    a = grpo.advantages(rewards, form.advantage)[0].repeat_interleave(lengths[0])
    w = grpo.token_weights(lengths, form.loss_norm, LENGTH, counted)[0]
    w = w.repeat_interleave(lengths[0])
    lp = torch.cat([lp[i] for i in group])
    old = torch.cat([old[i] for i in group])
    if ref is not None:
        ref = torch.cat([ref[i] for i in group])

    if form.estimator == "k1-in-reward":
        a = a - form.kl_coef * grpo.kl_to_go(old, ref, lengths[0])
    if form.clip is None:
        objective = grpo.reinforce(lp, a)
    else:
        objective = grpo.clipped(lp, old, a, *form.clip)
    if form.estimator in ("k2", "k3"):
        ratio_to = None if form.sampler is None else old
        objective = objective - form.kl_coef * grpo.kl(lp, ref, form.estimator, ratio_to)

    n = grpo.denominator(lengths, form.loss_norm, counted)
    return grpo.policy_loss(objective, w, n)


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
    assert (expected_gradient(model, G=G) * LENGTH - exact).abs().max() < 1e-12


@pytest.mark.parametrize("G", [2, 3])
def test_mean_baseline_scales_the_gradient_by_one_minus_one_over_G(truth, G):
    model, exact = truth
    g = expected_gradient(model, G=G, advantage="mean") * LENGTH
    assert (g - (1 - 1 / G) * exact).abs().max() < 1e-12


def test_kl_in_the_reward_is_the_gradient_of_the_sequence_kl(truth, reference):
    model, exact = truth
    form = dict(reference=reference, estimator="k1-in-reward", kl_coef=0.3)
    whole = expected_gradient(model, **form) * LENGTH
    expected = exact - 0.3 * gradient(model, sequence_kl(model, reference))
    assert (whole - expected).abs().max() < 1e-12


def prefix_kl(model, reference, visits, forward):
    """The KL between the next tokens' distributions, summed over prefixes by how often they come.

    visits: {prefix: how often}. forward: KL(ref || pi), else KL(pi || ref).
    """
    value = 0.0
    for prefix, visit in visits.items():
        ids = torch.tensor([PROMPTS[0] + list(prefix)])
        p = model(ids)[0, -1].div(TEMPERATURE).log_softmax(-1)  # (V,)
        q = reference(ids)[0, -1].div(TEMPERATURE).log_softmax(-1)  # (V,)
        kl = q.exp() * (q - p) if forward else p.exp() * (p - q)
        value = value + visit * kl.sum()
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
    """What each estimator's gradient climbs down.

    For k1 in the reward that is the KL of whole sequences. For k2 and k3 it is the KL of the next
    tokens, reverse and forward, at the prefixes that the model visits now.
    """
    model, _ = truth
    form = dict(with_reward=False, reference=reference, estimator=estimator)
    g = -expected_gradient(model, **form) * LENGTH
    fixed = visits(model)

    def climbed(m):
        if estimator == "k1-in-reward":
            return sequence_kl(m, reference)
        return prefix_kl(m, reference, fixed, forward=estimator == "k3")

    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    moved = copy.deepcopy(model)
    step = 1e-5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(len(start), generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                vector = start + sign * step * direction
                torch.nn.utils.vector_to_parameters(vector, moved.parameters())
                values.append(float(climbed(moved)))
        assert float(g @ direction) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def variants(model, reference):
    """{form of the objective: (its expected gradient, the exact gradient of what it is to climb)}.

    The expected gradient is scaled so that a length of 1 is right.
    """
    exact = gradient(model, expected_reward(model))
    after = stepped(model, 0.01)
    exact_after = gradient(after, expected_reward(after))
    kl = -gradient(model, sequence_kl(model, reference))
    kl_after = -gradient(after, sequence_kl(after, reference))
    both = sum(gradient(model, expected_reward(model, prompt)) for prompt in PROMPTS)

    only_kl = dict(with_reward=False, reference=reference)
    first = functools.partial(expected_gradient, model)
    second = functools.partial(expected_gradient, after, sampler=model)
    no_clip = (1.0, math.inf)
    live = sum(first(live_only=True, prompt=prompt) for prompt in PROMPTS)
    return {
        "`loo`, `constant`": (first() * LENGTH, exact),
        "`mean`, `constant` (Dr. GRPO)": (first(advantage="mean") * LENGTH, exact),
        "`zscore`, `constant`": (first(advantage="zscore") * LENGTH, exact),
        "`loo`, `token`": (first(loss_norm="token"), exact),
        "`mean`, `token` (default)": (first(advantage="mean", loss_norm="token"), exact),
        "`loo`, `sequence`": (first(loss_norm="sequence"), exact),
        "`zscore`, `sequence` (GRPO)": (first(advantage="zscore", loss_norm="sequence"), exact),
        "`loo`, `constant`, `overlong=mask`": (first(overlong="mask") * LENGTH, exact),
        "`loo`, `constant`, dead groups replaced, two prompts": (live * LENGTH, both),
        "second update, ratio, not clipped": (second(clip=no_clip) * LENGTH, exact_after),
        "second update, ratio in [0.8, 1.2]": (second(clip=(0.2, 0.2)) * LENGTH, exact_after),
        "second update, no ratio": (second() * LENGTH, exact_after),
        "KL `k1-in-reward`": (first(estimator="k1-in-reward", **only_kl) * LENGTH, kl),
        "KL `k2`": (first(estimator="k2", **only_kl) * LENGTH, kl),
        "KL `k3`": (first(estimator="k3", **only_kl) * LENGTH, kl),
        "KL `k2`, second update": (
            second(clip=no_clip, estimator="k2", **only_kl) * LENGTH,
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

    for name, (found, exact) in variants(truth[0], reference).items():
        length = float(found.norm() / exact.norm())
        # atan2, because acos loses half of the digits near 1.
        g = found / exact.norm()
        along = float(g @ exact / exact.norm())
        across = float((g - along * exact / exact.norm()).norm())
        angle = math.degrees(math.atan2(across, along))
        row = [f"{angle:.1f}°", f"{length:.3f}"]
        assert table.pop(name, None) == row, f"| {name} | {angle:.1f}° | {length:.3f} |"
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
    entropy = torch.zeros_like(old)
    sums = grpo.token_sums(lp, entropy, batch, grpo.Objective(clip_low=0.2, clip_high=0.28))
    m = grpo.token_metrics(sums, sums)
    assert m["clip_ratio/low_mean"] == pytest.approx(2 / 7)
    assert m["clip_ratio/high_mean"] == pytest.approx(1 / 7)
    assert m["clip_ratio/region_mean"] == pytest.approx(3 / 7)
    assert m["ratio/mean"] == pytest.approx(float(ratio.mean()))
    assert m["ratio/std"] == pytest.approx(float(((ratio - 1) ** 2).mean().sqrt()))
    assert m["logp_diff/mean"] == pytest.approx(float(ratio.log().abs().mean()))
    assert m["logp_diff/max"] == pytest.approx(-math.log(0.7))
    assert m["logp_diff/kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))


def test_on_policy_the_clipped_surrogate_has_reinforces_gradient(truth):
    model, _ = truth
    difference = expected_gradient(model, clip=(0.2, 0.2)) - expected_gradient(model)
    assert difference.abs().max() < 1e-12


def test_kl_by_hand():
    lp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    assert grpo.kl(lp, ref, "k2").tolist() == pytest.approx([0.125, 0.5])
    assert grpo.kl(lp, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(1) - 2])

    # A token counts pi / pi_old.
    old = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    assert grpo.kl(lp, ref, "k2", old).tolist() == pytest.approx([0.125, 0.5 * math.e])

    own = torch.tensor([-1.0, -2, -3])
    ref_of_own = torch.tensor([-2.0, -2.5, -1])
    to_go = grpo.kl_to_go(own, ref_of_own, torch.tensor([2, 1]))
    assert to_go.tolist() == pytest.approx([1.5, 0.5, -2.0])

    with pytest.raises(ValueError, match="'k4'"):
        grpo.kl(lp, ref, "k4")


def test_what_is_masked_is_in_neither_the_sum_nor_the_denominator():
    lengths = torch.tensor([[2, 4], [3, 5]])
    counted = torch.tensor([[True, False], [True, True]])
    assert grpo.denominator(lengths, "token", counted) == 10
    assert grpo.denominator(lengths, "sequence", counted) == 3
    for kind in ("token", "sequence", "constant"):
        w = grpo.token_weights(lengths, kind, 8, counted)
        plain = grpo.token_weights(lengths, kind, 8)
        assert w[0, 1] == 0
        assert torch.equal(w[counted], plain[counted])


def test_one_step_makes_the_better_completion_likelier(truth):
    model = copy.deepcopy(truth[0])
    better = [2, 2, 0]
    worse = [1, 1, 1]

    def totals():
        return [float(logprobs(model, ids).detach().sum()) for ids in (better, worse)]

    before = totals()
    lp = torch.cat([logprobs(model, better), logprobs(model, worse)])  # (6,)
    a = grpo.advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0]
    a = a.repeat_interleave(torch.tensor([3, 3]))
    weights = torch.ones(6, dtype=torch.float64)
    grpo.policy_loss(grpo.reinforce(lp, a), weights, 6).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)

    after = totals()
    assert after[0] > before[0]
    assert after[1] < before[1]
