"""The estimators of nanorl/dynamics against truth: all completions of a tiny model, in fp64."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from conftest import toy_model
from nanorl import learner, lora, optim
from nanorl.batch import pack
from nanorl.dynamics import change, covariance, entropy, kernel, noise, step, vectors
from nanorl.dynamics.measured import Measured, derivative, derivatives, gradient, sequences_of
from nanorl.sampling import Completion
from nanorl.tasks import Reward

V, K, STOP = 4, 3, 0
PROMPTS = ([1, 2], [3, 1, 2])


def tiny(seed=0, vocab=V, **overrides):
    sizes = dict(n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_inner=8, context=16)
    sizes["tie_embeddings"] = True
    return toy_model(vocab=vocab, seed=seed, **{**sizes, **overrides})


def every_completion(tokens=K, vocab=V):
    """All ids up to the stop token, or cut off after `tokens`."""
    found = []
    for length in range(1, tokens + 1):
        for ids in itertools.product(range(vocab), repeat=length):
            ended = ids[-1] == STOP
            if STOP not in ids[:-1] and (ended or length == tokens):
                found.append(Completion(list(ids), [0.0] * length, ended))
    return found


def group(prompt, completions, rewards=None):
    rewards = [Reward(r) for r in rewards or [0.0] * len(completions)]
    return SimpleNamespace(prompt_ids=prompt, completions=completions, rewards=rewards)


def probabilities(measured, theta, sequences):
    """pi(t) of each, (B,), with a gradient where theta has one."""
    return measured.tokens(theta, sequences)[0].sum(1).exp()


@pytest.fixture(scope="module")
def world():
    """A tiny model, all completions of one prompt, their probabilities, a direction."""
    measured = Measured(tiny())
    sequences = sequences_of([group(PROMPTS[0], every_completion())])
    pi = probabilities(measured, measured.theta, sequences)
    generator = torch.Generator().manual_seed(1)
    u = {}
    for name, p in measured.theta.items():
        u[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1
    return SimpleNamespace(measured=measured, sequences=sequences, pi=pi, u=u)


def exact_entropy(world):
    """theta -> H(theta) by enumeration."""

    def at(theta):
        pi = probabilities(world.measured, theta, world.sequences)
        return -(pi * pi.log()).sum()

    return at


# ---- the model at any theta ----------------------------------------------------------------------


def test_completions_are_all_there_are(world):
    assert float(world.pi.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_plain_pass_and_the_learners_agree_in_value_and_gradient(adapted):
    """Of LoRA only A and B count, and their gradient is that of training's own product."""
    model, adapters = tiny(tie_embeddings=False), None
    if adapted:
        adapters = lora.LoRA(model, 2, 4.0)
        for _, projection in enumerate(adapters.projections.values()):
            projection.b.data.normal_(generator=torch.Generator().manual_seed(3))
        adapters.merge()
    completions = every_completion()[5:20:3]
    groups = [group(prompt, completions) for prompt in PROMPTS]
    A = torch.arange(10, dtype=torch.float64).view(2, 5) - 4
    (batch,) = pack(groups, A, torch.ones_like(A), 10**6, "cpu")
    gain = (batch.advantages * learner.forward(model, batch, 0.7).logprobs).sum()
    named = dict((adapters or model).named_parameters())
    trained = torch.autograd.grad(gain, list(named.values()))

    measured = Measured(model, adapters, temperature=0.7)
    assert set(measured.theta) == set(named) and (not adapted or "lora_A" in next(iter(named)))

    def by_learner(theta):
        return (batch.advantages * measured.learner_logprobs(theta, batch)).sum()

    def by_rows(theta):
        logprobs, _ = measured.tokens(theta, sequences_of(groups))
        return (A.flatten() * logprobs.sum(1)).sum()

    # pack puts the shorter prompt first, and so do these groups.
    for function in (by_learner, by_rows):
        value, found = gradient(function, measured.theta)
        assert float(value) == pytest.approx(float(gain), rel=1e-12)
        for x, y in zip(found.values(), trained):
            assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)

    # A model to sample from has the weights that theta gives.
    moved = vectors.plus(measured.theta, found, 0.01)
    rows = measured.at(moved)(sequences_of(groups).ids).log_softmax(-1)
    assert torch.allclose(
        rows, measured.call(moved, type(model).forward, sequences_of(groups).ids).log_softmax(-1)
    )


# ---- entropy -------------------------------------------------------------------------------------


def test_both_estimators_of_the_entropy_are_unbiased_and_one_has_less_variance(world):
    pi, H = world.pi, float(exact_entropy(world)(world.measured.theta))
    logprobs, entropies = entropy.tokens_at(world.measured, world.measured.theta, world.sequences)
    variances = []
    for values in (entropies.sum(1), -logprobs.sum(1)):
        assert float((pi * values).sum()) == pytest.approx(H, rel=1e-12)
        variances.append(float((pi * (values - H) ** 2).sum()))
    assert variances[0] < 0.5 * variances[1]

    # Of a sample: the standard error is that of the known variance.
    draws = torch.multinomial(
        pi, 4000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    found = entropy.estimates(logprobs[draws], entropies[draws])
    for estimate, variance in zip(found, variances):
        assert estimate.variance == pytest.approx(variance, rel=0.1)
        assert abs(estimate.mean - H) < 4 * (variance / 4000) ** 0.5


def test_the_surrogate_is_the_entropy_at_any_weights(world):
    """In expectation, for any b; at theta itself, and where every weight has moved."""
    measured, sequences = world.measured, world.sequences
    start, _ = entropy.tokens_at(measured, measured.theta, sequences)
    b = torch.tensor([0.3, -1.0, 0.2]).double().expand_as(start)
    for eta in (0.0, 1.0):
        theta = vectors.plus(measured.theta, world.u, eta)
        values = entropy.surrogate_at(measured, sequences, start, b)(theta)
        exact = float(exact_entropy(world)(theta))
        assert float((world.pi * values).sum()) == pytest.approx(exact, rel=1e-12)


def test_gradient_of_the_entropy_with_the_baseline_of_the_others(world):
    """The expectation over all pairs of completions, the second one's H_k being b_k of the first.
    Without the score term the gradient is another one."""
    measured, sequences, pi = world.measured, world.sequences, world.pi
    _, exact = gradient(exact_entropy(world), measured.theta)
    start, entropies = entropy.tokens_at(measured, measured.theta, sequences)
    n = len(pi)
    b = torch.stack(
        [
            entropy.baseline(torch.stack([entropies[i], entropies[j]]))[0]
            for i in range(n)
            for j in range(n)
        ]
    ).view(n, n, -1)  # the baseline of i beside j

    for with_score in (True, False):

        def expected(theta, with_score=with_score):
            logprobs, moved = measured.tokens(theta, sequences)
            logprobs = logprobs if with_score else logprobs.detach()
            total = 0.0
            for j in range(n):
                total = (
                    total + pi[j] * (pi * entropy.surrogate(logprobs, moved, start, b[:, j])).sum()
                )
            return total

        _, found = gradient(expected, measured.theta)
        off = vectors.norm(vectors.plus(found, exact, -1.0)) / vectors.norm(exact)
        assert off < 1e-10 if with_score else off > 0.05


def test_entropy_gradient_is_the_mean_over_completions(world):
    """As the function gives it, in parts of rows, against the plain sum."""
    measured, sequences = world.measured, world.sequences.rows(slice(3, 15))
    found = entropy.entropy_gradient(measured, sequences, rows=5)
    start, entropies = entropy.tokens_at(measured, measured.theta, sequences)
    at = entropy.surrogate_at(measured, sequences, start, entropy.baseline(entropies))
    _, whole = gradient(lambda theta: at(theta).mean(), measured.theta)
    assert vectors.norm(vectors.plus(found, whole, -1.0)) < 1e-12 * vectors.norm(whole)
    other = entropy.entropy_gradient(measured, sequences, with_score=False)
    assert vectors.cosine(other, whole) < 0.99


# ---- the change along a direction ----------------------------------------------------------------


def test_first_and_second_order_are_the_exact_ones_in_expectation(world):
    measured, u = world.measured, world.u
    exact = derivatives(exact_entropy(world), measured.theta, u)
    start, entropies = entropy.tokens_at(measured, measured.theta, world.sequences)
    function = entropy.surrogate_at(measured, world.sequences, start, torch.zeros_like(entropies))
    for found, truth in zip(derivatives(function, measured.theta, u), exact):
        assert float((world.pi * found).sum()) == pytest.approx(float(truth), rel=1e-9)

    # Of a completion it varies far less than - (log pi + 1) grad log pi does, with b_k or not.
    def logprob(theta):
        return measured.tokens(theta, world.sequences)[0].sum(1)

    def variance(values):
        return float((world.pi * (values - (world.pi * values).sum()) ** 2).sum())

    plain = -(world.pi.log() + 1) * derivative(logprob, measured.theta, u)
    means = (world.pi[:, None] * entropies).sum(0).expand_as(entropies)
    for b in (torch.zeros_like(entropies), means):
        function = entropy.surrogate_at(measured, world.sequences, start, b)
        assert variance(derivative(function, measured.theta, u)) < 0.4 * variance(plain)

    # And those are right: differences of the exact entropy.
    H = exact_entropy(world)
    up, at, down = (float(H(vectors.plus(measured.theta, u, e))) for e in (1e-3, 0.0, -1e-3))
    assert float(exact[0]) == pytest.approx((up - down) / 2e-3, rel=1e-4)
    assert float(exact[1]) == pytest.approx((up - 2 * at + down) / 1e-6, rel=1e-4)


def test_the_curve_starts_along_the_slope_and_leaves_it_by_the_curvature(world):
    measured, u = world.measured, world.u
    some = world.sequences.rows(torch.arange(0, 40, 3))
    first, second = change.expansion(measured, some, u, rows=4)
    grad = entropy.entropy_gradient(measured, some)
    assert first.mean == pytest.approx(vectors.dot(grad, u), rel=1e-10)

    etas = [10.0**e for e in range(-16, 1)]
    points = change.curve(measured, some, u, etas)
    by_eta = {round(math.log10(point.eta)): point for point in points}
    assert by_eta[-6].change.mean / 1e-6 == pytest.approx(first.mean, rel=1e-5)
    bend = by_eta[-3].change.mean - 1e-3 * first.mean
    assert bend == pytest.approx(0.5e-6 * second.mean, rel=0.05)

    # Rounding below, curvature above: neither end of the range is an end of the etas.
    low, high = change.linear_range(points, first.mean)
    assert 1e-16 < low < 1e-10 and 1e-4 < high < 1
    assert change.linear_range(points[:1], 100 * first.mean) is None
    assert points[0].effective == pytest.approx(len(some)) and points[-1].effective < len(some)


def test_effective_size_by_hand():
    assert entropy.effective_size(torch.tensor([1.0, 1.0, 1.0])) == pytest.approx(3)
    weights = torch.tensor([1.0, 3.0])
    assert entropy.effective_size(weights.log()) == pytest.approx(16 / 10)


# ---- the update ----------------------------------------------------------------------------------


def make(rule, dtype, decay=0.1):
    model = tiny(n_embd=16, n_inner=40).to(dtype)
    model.compute_dtype = dtype
    muon = rule == "muon"
    rules = dict(muon=muon, rule="adamw" if muon else rule)
    return model, optim.make_optimizers(model, 0.01, 0.02, decay, **rules)


def set_gradient(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("rule", ["adamw", "rmsprop", "sgd", "muon"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_update_by_hand_is_the_step(rule, dtype, steps):
    """In fp64 to 1e-10 of its norm. In fp32 weights land within a last bit of what is added up, and
    the few where summands cancel within some (torch
    orthogonalizes Muon's matrices in bf16, so there only in fp64)."""
    model, optimizers = make(rule, dtype)
    params = list(model.parameters())
    for number in range(steps):
        set_gradient(model, number)
        optim.update(optimizers, params, 0.5, 1.0)
    set_gradient(model, 99)
    named = dict(model.named_parameters())
    g = {name: p.grad.clone() for name, p in named.items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    found = step.update(optimizers, named, g, scale=0.7, max_norm=1.0)
    optim.update(optimizers, params, 0.7, 1.0)
    assert vectors.norm(g) > 1

    v = found.v
    true = {name: p.detach().double() - before[name].double() for name, p in named.items()}
    if dtype == torch.float64:
        assert vectors.norm(vectors.plus(v, true, -1.0)) < 1e-10 * vectors.norm(true)
    elif rule != "muon":
        for name, p in named.items():
            landed = before[name].double() + v[name]
            larger = torch.maximum(p.detach().abs(), before[name].abs())
            last_bit = torch.nextafter(larger, torch.tensor(math.inf)) - larger
            off = (landed - p.detach().double()).abs() / last_bit
            assert float((off <= 1).double().mean()) > 0.9 and float(off.max()) < 8, name

    if rule != "muon" and dtype == torch.float64:
        clipped = vectors.scaled(g, step.clip_factor(g, 1.0))
        by_M = vectors.times(found.M, {name: x.double() for name, x in clipped.items()})
        assert vectors.norm(vectors.plus(found.gradient, by_M)) < 1e-12 * vectors.norm(by_M)
        assert (vectors.norm(found.momentum) > 0) == (rule == "adamw" and steps > 0)


def test_a_gradient_of_zero_makes_no_update():
    model, optimizers = make("adamw", torch.float64)
    named = dict(model.named_parameters())
    with pytest.raises(ValueError, match="changes nothing"):
        step.update(optimizers, named, {name: torch.zeros_like(p) for name, p in named.items()})


def test_each_mistake_shows_and_only_where_it_is_one():
    model, optimizers = make("adamw", torch.float64)
    named = dict(model.named_parameters())
    set_gradient(model, 0)
    optim.update(optimizers, list(named.values()), 1.0, 1.0)
    set_gradient(model, 1)
    g = {name: p.grad for name, p in named.items()}
    found = step.mistakes(optimizers, named, g, 1.0, 1.0)
    for name, (ratio, cosine) in found.items():
        assert abs(ratio - 1) > 1e-9 or cosine < 1 - 1e-9, name
    assert found["no momentum: this gradient's part alone"][1] < 0.95
    assert found["stale state: m and s without this gradient"][1] < 0.95

    # Without decay, clipping or an embedding that moves there is nothing to get wrong.
    model, optimizers = make("sgd", torch.float64, decay=0.0)
    named = dict(model.named_parameters())
    found = step.mistakes(optimizers, named, g, 1.0, 0.0)
    for name in ("no weight decay", "no bias correction", "no clipping"):
        assert found[name] == (pytest.approx(1), pytest.approx(1))


# ---- the kernel ----------------------------------------------------------------------------------


def test_kernel_is_the_products_of_each_completions_gradient(world):
    measured, some = world.measured, world.sequences.rows(torch.arange(0, 40, 7))
    M = {name: x.abs() for name, x in world.u.items()}
    rows = []
    for one in some.parts(1):

        def logprob(theta, one=one):
            return measured.tokens(theta, one)[0].sum()

        rows.append(gradient(logprob, measured.theta)[1])
    ones = {name: torch.ones_like(p) for name, p in measured.theta.items()}
    for weights in (None, M):
        weighted = [vectors.times(weights or ones, row) for row in rows]
        truth = [[vectors.dot(x, y) for y in weighted] for x in rows]
        truth = torch.tensor(truth, dtype=torch.float64)
        # Whatever the number of rows and of parameters that are taken at once.
        for at_once in (2**20, 600):
            K = kernel.kernel(measured, some, weights, rows=4, numbers=at_once)
            assert torch.allclose(K, truth, rtol=1e-9, atol=1e-12)


def test_what_the_kernel_foresees_is_what_a_small_step_does(world):
    """delta log pi(t) of completions in the batch and of others, with momentum apart."""
    measured, some = world.measured, world.sequences.rows(torch.arange(0, 40, 5))
    optimizers = optim.make_optimizers(measured.model, 1e-7, 1e-7, muon=False)
    named = dict(measured.model.named_parameters())
    a = torch.linspace(-1, 1, len(some)).double()
    a[-2:] = 0  # those are not in the batch
    g = gradient(lambda theta: -(a * measured.tokens(theta, some)[0].sum(1)).sum(), measured.theta)[
        1
    ]
    found = step.update(optimizers, named, g, max_norm=1.0)
    factor = step.clip_factor(g, 1.0)
    K = kernel.kernel(measured, some, found.M)
    foreseen = K @ (factor * a)
    moved = vectors.plus(measured.theta, found.v)
    true = (measured.tokens(moved, some)[0] - measured.tokens(measured.theta, some)[0]).sum(1)
    assert torch.allclose(foreseen, true, rtol=1e-3, atol=1e-3 * float(true.abs().max()))


def test_u_statistic_is_unbiased_and_v_is_not():
    """Two groups of two completions, over all that can be drawn: the mean over pairs of groups is
    the exact change of the entropy. The mean over all pairs is off by its own groups' part."""
    measured = Measured(tiny(seed=2, vocab=3))
    completions = every_completion(tokens=2, vocab=3)
    sequences = sequences_of([group(PROMPTS[0], completions)])
    pi = probabilities(measured, measured.theta, sequences)
    logprobs = pi.log()
    rewards = torch.tensor([len(c.ids) + 0.5 * c.ids[0] for c in completions]).double()
    K = kernel.kernel(measured, sequences)

    # Truth: grad H . E v, from exact gradients.
    H = -(pi * logprobs).sum()
    n = len(pi)
    names = ("itself", "its copies", "its prompt", "other prompts", "V", "U")
    expected = dict.fromkeys(names, 0.0)
    numbers = torch.tensor([0, 0, 1, 1])
    total = 0.0
    for one in itertools.combinations_with_replacement(range(n), 2):
        for two in itertools.combinations_with_replacement(range(n), 2):
            drawn = torch.tensor([*one, *two])
            ways = (1 + (one[0] != one[1])) * (1 + (two[0] != two[1]))
            chance = float(pi[drawn].prod()) * ways
            A = rewards[drawn].view(2, 2)
            a = (A - A.mean(1, keepdim=True)).flatten() / 4
            h = kernel.centred(logprobs[drawn], numbers)
            some = sequences.rows(drawn)
            some.group = numbers
            K_drawn = K[drawn][:, drawn]
            found = kernel.entropy_split(K_drawn, h, a, some)
            found["U"], error = kernel.between_groups(K_drawn, h, a, numbers)
            assert math.isnan(error)  # of two groups nothing can be left out
            total += chance
            for name in expected:
                expected[name] += chance * found[name]
    assert total == pytest.approx(1)

    # E a(t') per completion is (1 - 1/G) / 4 * (r - E r) for G = 2; there are four of them.
    weights = pi * (rewards - (pi * rewards).sum()) / 2  # (n,)
    h = -H - logprobs
    exact = float((pi * h) @ K @ weights)
    assert expected["U"] == pytest.approx(exact, rel=1e-9)
    assert expected["other prompts"] == pytest.approx(exact / 2, rel=1e-9)
    bias = expected["itself"] + expected["its copies"] + expected["its prompt"] - exact / 2
    assert expected["V"] - exact == pytest.approx(bias, rel=1e-9)
    assert abs(bias) > 0.15 * abs(exact)


# ---- tokens --------------------------------------------------------------------------------------


def test_token_shares_add_up_to_what_the_gradient_does_to_the_entropy(world):
    measured, some = world.measured, world.sequences.rows(torch.arange(0, 40, 5))
    H_gradient = entropy.entropy_gradient(measured, some)
    M = {name: x.abs() for name, x in world.u.items()}
    a = torch.linspace(-1, 1, len(some)).double()
    shares = covariance.entropy_shares(measured, some, a, H_gradient, M, rows=3)
    g = gradient(lambda theta: (a * measured.tokens(theta, some)[0].sum(1)).sum(), measured.theta)[
        1
    ]
    whole = vectors.dot(H_gradient, vectors.times(M, g))
    assert float(shares.sum()) == pytest.approx(whole, rel=1e-10)
    assert (shares[~some.sampled] == 0).all()

    logprobs, _ = entropy.tokens_at(measured, measured.theta, some)
    cov = covariance.covariances(logprobs, a, some.sampled)
    chosen, A = logprobs[some.sampled], a[:, None].expand_as(cov)[some.sampled]
    assert float(cov.sum()) / len(chosen) == pytest.approx(
        float(torch.cov(torch.stack([chosen, A]), correction=0)[0, 1])
    )
    # By hand: the three tokens of the largest |cov_k|.
    best = covariance.top(cov, shares, logprobs, a, some.sampled, part=3.5 / len(chosen))
    first = cov.abs().flatten().argsort(descending=True)[:3]
    assert best.tokens == 3
    assert best.change == pytest.approx(float(shares.flatten()[first].sum()))
    A = a[first // cov.size(1)]
    assert best.wrong == pytest.approx(float((A < 0).double().mean()))
    below = logprobs.flatten()[first] < chosen.mean()
    assert best.unlikely == pytest.approx(float(below.double().mean()))


def test_the_formula_of_one_state_by_autograd():
    """A softmax over five actions: - lr Cov(log pi, pi A) is the first-order change of its entropy
    under the policy gradient, - lr Cov(log pi, A) that under the natural one."""
    z = torch.randn(5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    A = torch.tensor([1.0, -0.5, 0.2, 0.0, -2.0]).double()
    logpi = z.log_softmax(0)
    pi = logpi.exp()
    (H_gradient,) = torch.autograd.grad(-(pi * logpi).sum(), z, retain_graph=True)
    (J_gradient,) = torch.autograd.grad((pi * A).sum(), z)
    pi, logpi = pi.detach(), logpi.detach()
    assert float(H_gradient @ J_gradient) == pytest.approx(
        covariance.one_state_change(logpi, A, natural=False), rel=1e-12
    )
    Fisher = pi.diag() - torch.outer(pi, pi)
    natural = torch.linalg.pinv(Fisher) @ J_gradient
    assert float(H_gradient @ natural) == pytest.approx(
        covariance.one_state_change(logpi, A, natural=True), rel=1e-9
    )


# ---- noise ---------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.1, 0.4]).double()  # |g|^2 = 0.55
BETWEEN, WITHIN = 0.3, 1.1  # deviations of a number: tr = 6 * 0.09 and 6 * 1.21


def drawn_pairs(problems, generator):
    """Gradients of two groups a problem, of known covariance."""
    for _ in range(problems):
        own = MEAN + BETWEEN * torch.randn(6, generator=generator, dtype=torch.float64)
        noise_of = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        yield own + WITHIN * noise_of[0], own + WITHIN * noise_of[1]


def test_noise_of_known_covariance():
    """Means over many repetitions are the truth within their standard errors; the jackknife's error
    is the spread that there is."""
    truth = dict(signal=0.55, within=6 * WITHIN**2, between=6 * BETWEEN**2)
    generator = torch.Generator().manual_seed(0)
    found, errors, scales = {name: [] for name in truth}, [], []
    for _ in range(300):
        blocks = noise.blocks_of(drawn_pairs(64, generator), 4)
        one = noise.noise(blocks)
        for name in truth:
            found[name].append(getattr(one, name))
        scale, error = noise.jackknife(blocks, lambda one: one.scale)
        assert scale == pytest.approx(one.scale)
        scales.append(scale)
        errors.append(noise.jackknife(blocks, lambda one: one.trace)[1])
    for name, values in found.items():
        estimate = entropy.estimate(torch.tensor(values))
        assert abs(estimate.mean - truth[name]) < 4 * estimate.error, name
    spread = float(torch.tensor([w + b for w, b in zip(found["within"], found["between"])]).std())
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.15)
    # The ratio of means is the noise scale; the mean of ratios is not.
    total = sum(w + b for w, b in zip(found["within"], found["between"]))
    assert total / sum(found["signal"]) == pytest.approx(7.8 / 0.55, rel=0.05)
    assert sum(scales) / 300 > 1.05 * 7.8 / 0.55


def test_variance_falls_as_one_over_the_batch_and_twice_the_samples_is_not_twice_the_problems():
    generator = torch.Generator().manual_seed(1)
    blocks = noise.blocks_of(drawn_pairs(4096, generator), 8)
    one = noise.noise(blocks)
    for together in (1, 4, 16):
        observed = noise.observed_variance(blocks, together)
        assert observed * 8 * together == pytest.approx(one.trace, rel=0.15)
    with pytest.raises(ValueError, match="no two batches"):
        noise.observed_variance(blocks, 300)
    share = (6 * BETWEEN**2 + 3 * WITHIN**2) / (6 * BETWEEN**2 + 6 * WITHIN**2)
    assert noise.more_samples(one) == pytest.approx(share, rel=0.02)


def test_a_mean_that_drifts_breaks_the_law():
    """Batches from weights that move between them: four times the problems a batch leave more than
    a quarter of the variance."""
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for number, (one, two) in enumerate(drawn_pairs(4096, generator)):
        drift = 0.1 * math.sin(2 * math.pi * number / 4096) * torch.ones(6, dtype=torch.float64)
        pairs.append((one + drift, two + drift))
    blocks = noise.blocks_of(pairs, 64)
    falls = noise.observed_variance(blocks, 1) / noise.observed_variance(blocks, 4)
    assert falls < 3
    still = noise.blocks_of(drawn_pairs(4096, generator), 64)
    falls = noise.observed_variance(still, 1) / noise.observed_variance(still, 4)
    assert falls == pytest.approx(4, rel=0.35)


def test_two_sizes_give_both_moments_and_a_window_its_error():
    generator = torch.Generator().manual_seed(3)
    traces, signals = [], []
    for _ in range(2000):
        groups = torch.stack([one for one, _ in drawn_pairs(8, generator)])  # (8, 6)
        small, large = groups[:2].mean(0), groups.mean(0)
        pair = noise.from_two_sizes(float(small @ small), float(large @ large), 2, 8)
        traces.append(pair[0])
        signals.append(pair[1])
    for values, truth in ((traces, 7.8), (signals, 0.55)):
        estimate = entropy.estimate(torch.tensor(values))
        assert abs(estimate.mean - truth) < 4 * estimate.error
    scale, error = noise.windowed(traces, signals)
    assert abs(scale - 7.8 / 0.55) < 4 * error and error < 0.2 * scale


def test_group_gradients_add_up_to_the_steps(world):
    """- their sum / N is the gradient of the loss that train_rl.py's loop has."""
    measured = world.measured
    completions = every_completion()
    groups = [
        group(PROMPTS[0], completions[2:6], [0.0, 1.0, 1.0, 0.0]),
        group(PROMPTS[1], completions[7:11], [0.0, 0.0, 0.5, 0.0]),
    ]
    settings = dict(
        samples_per_prompt=4,
        advantage="mean",
        loss_norm="token",
        max_new_tokens=K,
        overlong="zero",
        device_tokens=10**6,
    )
    whole, N = noise.gain_gradient(measured, groups, settings)
    parts = [noise.gain_gradient(measured, [one], settings) for one in groups]
    assert (
        N
        == sum(count for _, count in parts)
        == sum(len(c.ids) for g in groups for c in g.completions)
    )
    total = vectors.plus(parts[0][0], parts[1][0])
    assert vectors.norm(vectors.plus(total, whole, -1.0)) < 1e-12 * vectors.norm(whole)

    model = copy.deepcopy(measured.model)
    A = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-0.125, -0.125, 0.375, -0.125]]).double()
    (batch,) = pack(groups, A, torch.ones_like(A), 10**6, "cpu")
    loss = -(batch.advantages * learner.forward(model, batch).logprobs).sum() / N
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(-whole[name] / N, p.grad, rtol=1e-9, atol=1e-13)


def test_derivative_is_the_first_of_derivatives(world):
    function = exact_entropy(world)
    first, _ = derivatives(function, world.measured.theta, world.u)
    assert float(derivative(function, world.measured.theta, world.u)) == pytest.approx(float(first))


def test_the_error_of_the_u_statistic_is_its_spread():
    """Over many draws of six groups of two, and a batch whose completions are known to be alike."""
    measured = Measured(tiny(seed=2, vocab=3))
    completions = every_completion(tokens=2, vocab=3)
    sequences = sequences_of([group(PROMPTS[0], completions)])
    pi = probabilities(measured, measured.theta, sequences)
    rewards = torch.tensor([len(c.ids) + 0.5 * c.ids[0] for c in completions]).double()
    K = kernel.kernel(measured, sequences)
    numbers = torch.arange(6).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(200):
        drawn = torch.multinomial(pi, 12, replacement=True, generator=generator)
        A = rewards[drawn].view(6, 2)
        a = (A - A.mean(1, keepdim=True)).flatten() / 12
        h = kernel.centred(pi.log()[drawn], numbers)
        value, error = kernel.between_groups(K[drawn][:, drawn], h, a, numbers)
        values.append(value)
        errors.append(error)
    spread = float(torch.tensor(values).std())
    assert 0.9 * spread < sum(errors) / 200 < 1.5 * spread

    some = sequences.rows(torch.tensor([3, 3, 3, 1]))
    some.group = torch.tensor([0, 0, 1, 0])
    alike = torch.eye(4, dtype=torch.bool)
    alike[0, 1] = alike[1, 0] = True
    assert torch.equal(kernel.copies(some), alike)


def test_slope_is_the_gradient_along_a_vector(world):
    some = world.sequences.rows(torch.arange(0, 40, 3))
    grad = entropy.entropy_gradient(world.measured, some)
    found = change.slope(world.measured, some, world.u, rows=4)
    assert found.mean == pytest.approx(vectors.dot(grad, world.u), rel=1e-10)
    first, _ = change.expansion(world.measured, some, world.u)
    assert found.error == pytest.approx(first.error, rel=1e-9)
