"""Accuracy, pass@k and intervals; two models compared."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from nanorl.evaluate.statistics import (
    clustered_interval,
    compare,
    dead_groups,
    half_width,
    mcnemar,
    more_often,
    paired_bootstrap,
    pass_at_k,
    rates,
    smallest_effect,
    summary,
    wilson,
)
from nanorl.evaluate.words import describe, survey_table, verdict
from nanorl.tasks import Reward, is_correct


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(chosen) for chosen in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(200, 1, 100) == pytest.approx(
        0.5
    )  # exact integers: no overflow, no rounding to 0 or 1
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples a problem, there are 4"):
        pass_at_k(4, 4, 5)


@pytest.mark.parametrize(
    "correct, n",
    [(0, 1), (1, 1), (0, 400), (400, 400), (1, 400), (37, 50), (200, 400), (999, 1000)],
)
def test_wilson_equals_scipys(correct, n):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson(correct, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= correct / n <= high <= 1 and low < high


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_clustered_interval_counts_problems_not_samples():
    shares = [1.0, 0.0, 0.5, 0.5]
    half = 1.959964 * math.sqrt(
        (0.25 + 0.25) / 3 / 4
    )  # deviations of the four shares from their mean
    assert clustered_interval(shares) == pytest.approx((0.5 - half, 0.5 + half))
    assert clustered_interval([1.0, 0.9, 1.0])[1] == 1.0  # cut off at 1
    assert clustered_interval([0.0] * 50) == wilson(0, 50)  # nothing solved is not "certainly 0"


def outcome(correct, rewards, lengths, finished):
    parts = [{"correct": float(c)} for c in correct]
    return dict(
        parts=parts,
        solved=[bool(c) for c in correct],
        rewards=rewards,
        lengths=lengths,
        finished=finished,
    )


def test_summary_of_samples():
    results = [
        outcome([1, 0, 0, 0], [1.0, -0.5, 0.0, 0.0], [2, 4, 6, 8], [True, True, True, False]),
        outcome([1, 1, 0, 1], [1.0, 1.0, 0.5, 1.0], [1, 1, 1, 1], [True] * 4),
    ]
    s = summary(results, ks=(1, 2, 4, 8))
    assert (s["n"], s["samples"], s["accuracy"], s["reward"], s["length"], s["clipped"]) == (
        2,
        4,
        0.5,
        0.5,
        3.0,
        0.125,
    )
    assert s["pass@1"] == 0.5 and s["pass@2"] == pytest.approx((1 / 2 + 1) / 2) and s["pass@4"] == 1
    assert "pass@8" not in s  # there are no eight samples to choose from
    assert (s["low"], s["high"]) == clustered_interval([0.25, 0.75])


def test_summary_of_greedy_answers_has_wilsons_interval():
    results = [outcome([i < 7], [float(i < 7)], [3], [True]) for i in range(10)]
    s = summary(results)
    assert (s["accuracy"], s["pass@1"], s["clipped"]) == (pytest.approx(0.7), pytest.approx(0.7), 0)
    assert (s["low"], s["high"]) == wilson(7, 10)


def test_correct_is_the_part_or_else_a_full_reward():
    assert [
        is_correct(Reward(r, parts))
        for r, parts in [(0.2, {"correct": 1.0}), (1.0, {"correct": 0.0})]
    ] == [True, False]
    assert [
        is_correct(Reward(r, parts)) for r, parts in [(1.0, {}), (0.99, {}), (0.5, {"style": 1.0})]
    ] == [True, False, False]


def test_half_width_is_that_of_the_widest_interval():
    widths = [high - low for low, high in (wilson(c, 100) for c in range(101))]
    assert half_width(100) == pytest.approx(max(widths) / 2) == pytest.approx(0.0961, abs=1e-4)


# ---- where samples fail --------------------------------------------------------------------------


def of_parts(*parts):
    return dict(parts=list(parts), solved=[bool(p.get("correct")) for p in parts])


def test_rates_are_of_the_samples_that_got_so_far():
    yes, no, bare, none = (
        dict(format=1, answered=1, correct=1),
        dict(format=1, answered=1, correct=0),
        dict(format=1, answered=0, correct=0),
        dict(format=0, answered=0, correct=0),
    )
    results = [
        of_parts(yes, no),
        of_parts(no, no),
        of_parts(bare, bare),
        of_parts(none, {}),
    ]  # {}: its reward raised
    assert rates(results) == dict(
        format=6 / 8, answered_given_format=4 / 6, correct_given_answered=1 / 4
    )
    out_of_format = dict(
        format=0, answered=1, correct=1
    )  # an answer that a strict format does not count
    assert rates([of_parts(yes, bare, out_of_format, none)]) == dict(
        format=1 / 2, answered_given_format=1 / 2, correct_given_answered=1.0
    )
    assert rates([of_parts(none, none)]) == dict(
        format=0.0, answered_given_format=None, correct_given_answered=None
    )
    assert rates([of_parts(dict(answered=1, correct=1), dict(answered=1, correct=0))]) == dict(
        correct_given_answered=0.5
    )
    assert rates([of_parts(dict(format=1, correct=1))]) == dict(format=1.0)
    assert rates([of_parts(dict(correct=1.0))]) == {}


@pytest.mark.parametrize("n", range(1, 7))
def test_dead_groups_is_the_share_of_subsets_that_agree(n):
    for G in range(1, n + 1):
        results, expected = [], []
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            groups = [len(set(chosen)) == 1 for chosen in itertools.combinations(samples, G)]
            assert dead_groups([dict(solved=samples)], G) == pytest.approx(
                sum(groups) / len(groups), abs=1e-12
            )
            results.append(dict(solved=samples))
            expected.append(sum(groups) / len(groups))
        assert dead_groups(results, G) == pytest.approx(np.mean(expected))
    with pytest.raises(
        ValueError,
        match=f"groups of {n + 1} need at least {n + 1} samples a problem, there are {n}",
    ):
        dead_groups(results, n + 1)


@pytest.mark.parametrize(
    "accuracy, dead, clipped, words",
    [
        (0.5, 0.1, 0.0, "RL can learn here"),
        (0.05, 0.8, 0.0, "RL can learn here"),
        (0.05, 0.8, 0.9, "RL can learn here"),
        (0.97, 0.7, 0.0, "little left to learn"),
        (0.8, 0.9, 0.0, "little left to learn"),
        (0.01, 0.95, 0.1, "too hard as it is"),
        (0.01, 0.95, 0.6, "mostly cut off"),
    ],
)
def test_verdict_on_a_task(accuracy, dead, clipped, words):
    row = dict(accuracy=accuracy, dead=dead, clipped=clipped, n=10, samples=4)
    assert verdict(row) == words
    assert verdict({**row, "failed": 20}) == words
    assert verdict({**row, "failed": 21}) == "the reward fails"


def test_survey_table_fits_a_terminal_and_its_columns_line_up():
    row = {
        "accuracy": 1.0,
        "pass@16": 1.0,
        "dead": 1.0,
        "clipped": 1.0,
        "verdict": "little left to learn",
    }
    all_rates = dict(format=1.0, answered_given_format=1.0, correct_given_answered=None)
    _, names, full, bare, *_ = lines = survey_table({"a" * 14: row | all_rates, "b": row}, 16)
    assert max(map(len, lines)) <= 110
    assert (
        full.split()[1:] == ["100.0%"] * 5 + ["-", "100.0%", "little", "left", "to", "learn"]
        and bare.split()[4:7] == ["-"] * 3
    )
    for name in (
        "pass rate",
        "pass@16",
        "dead",
        "format",
        "| format",
        "| answered",
        "cut off",
    ):  # flush right over their columns
        end = names.index(f"  {name}  ") + 2 + len(name)
        assert full[end - 1] in "%-" and bare[end - 1] in "%-"
    assert names.index("verdict") == full.index("little") == bare.index("little")


def test_describe_says_what_there_is():
    greedy = summary([outcome([i < 7], [float(i < 7)], [3], [True]) for i in range(10)])
    assert describe(greedy) == [" 70.0%  95% [39.7%, 89.2%]  10 problems, 3.0 tokens, 0.0% cut off"]
    sampled = summary(
        [
            outcome([1, 0], [1.0, 0.0], [3, 5], [True, False]),
            outcome([0, 0], [0.0, 0.0], [4, 4], [True, True]),
        ],
        (1, 2),
    )
    assert describe(
        sampled | dict(format=0.5, answered_given_format=None), " at temperature 1"
    ) == [
        " 25.0%  95% [0.0%, 74.0%]  2 problems x 2 at temperature 1, 4.0 tokens, 25.0% cut off",
        "format 50.0%, answered given format -",
        "pass@1 25.0%  pass@2 50.0%",
    ]


# ---- two models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "only_a, only_b",
    [
        (0, 0),
        (0, 1),
        (1, 0),
        (5, 0),
        (6, 0),
        (3, 3),
        (3, 4),
        (2, 14),
        (30, 10),
        (512, 600),
        (4000, 4001),
    ],
)
def test_mcnemar_equals_scipys_exact_binomial_test(only_a, only_b):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("a, b", [((22, 100), (22, 400)), ((0, 5), (3, 9)), ((5, 5), (0, 7))])
def test_more_often_equals_fishers_exact_test_of_scipy(a, b):
    stats = pytest.importorskip("scipy.stats")
    table = [[right, n - right] for right, n in (a, b)]
    expected = stats.fisher_exact(table, alternative="greater").pvalue
    assert more_often(*a, *b) == pytest.approx(expected, rel=1e-9)


def shares(rng, n, samples, p):
    return rng.binomial(samples, p, n) / samples


@pytest.mark.parametrize("samples", [1, 8])
def test_bootstrap_interval_equals_scipys(samples):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = shares(rng, 100, samples, 0.4), shares(rng, 100, samples, 0.55)
    expected = stats.bootstrap(
        (b - a,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    mean, low, high, _ = paired_bootstrap(a, b)
    assert mean == pytest.approx((b - a).mean())
    step = 0.01 if samples == 1 else 0.0  # of the mean
    assert (low, high) == pytest.approx(
        (expected.low, expected.high), abs=0.04 * (high - low) + step
    )


@pytest.mark.parametrize("only_a, only_b, n", [(0, 4, 4), (1, 9, 50), (20, 36, 200), (7, 7, 30)])
def test_p_of_sign_flips_is_mcnemars_for_greedy_answers(only_a, only_b, n):
    a = np.array([1] * only_a + [0] * (n - only_a))
    b = np.array([0] * only_a + [1] * only_b + [0] * (n - only_a - only_b))
    exact = mcnemar(only_a, only_b)
    assert paired_bootstrap(a, b, draws=20_000)[3] == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4
    )


def test_p_of_sign_flips_equals_all_sign_flips():
    a, b = (
        np.array([0.25, 0.5, 0.1, 0.0, 0.75, 0.3, 0.2]),
        np.array([0.5, 0.25, 0.4, 0.75, 1.0, 0.4, 0.3]),
    )
    flips = np.array(list(itertools.product([-1, 1], repeat=len(a)))) @ (b - a)
    exact = np.mean(np.abs(flips) >= abs((b - a).sum()) - 1e-12)
    assert 0.05 < exact < 0.5 and paired_bootstrap(a, b, draws=20_000)[3] == pytest.approx(
        exact, abs=0.012
    )


@pytest.mark.parametrize("n, samples", [(12, 4), (60, 8)])
def test_intervals_cover_and_tests_stay_at_their_level(n, samples):
    """Problems differ in difficulty. B solves each more often, by 0.1 or (for p) by nothing.

    Over 4000 data sets instead of these 400, 0.902 and 0.939 are covered, and 0.023 and 0.046 are
    rejected. (A percentile interval is short for few problems; for 200 it covers 0.950.)
    """
    rng, covered, rejected = np.random.default_rng(3), 0, 0
    for i in range(400):
        p = rng.uniform(0, 0.9, n)
        a = shares(rng, n, samples, p)
        _, low, high, _ = paired_bootstrap(a, shares(rng, n, samples, p + 0.1), draws=400, seed=i)
        covered += low <= 0.1 <= high
        rejected += paired_bootstrap(a, shares(rng, n, samples, p), draws=400, seed=i)[3] < 0.05
    assert (0.86 if n < 30 else 0.9) <= covered / 400 <= 0.99
    assert rejected / 400 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400) and rejected > 0


def test_bootstrap_of_no_or_of_equal_differences():
    assert paired_bootstrap([0.3, 0.7, 1.0], [0.3, 0.7, 1.0]) == (0.0, 0.0, 0.0, 1.0)
    mean, low, high, p = paired_bootstrap([0, 0, 0, 0], [1, 1, 1, 1])
    # Four coins that fall alike are no proof, whatever the interval.
    assert (mean, low, high) == (1.0, 1.0, 1.0) and p == pytest.approx(1 / 8, abs=0.02)
    with pytest.raises(ValueError, match="2 shares for A and 3 for B"):
        paired_bootstrap([0, 1], [0, 1, 1])


def test_bootstrap_is_fixed_by_its_seed_and_bounded_in_memory():
    rng = np.random.default_rng(4)
    a, b = rng.random(3000), rng.random(3000)  # no two differences alike: the most it has to count
    tracemalloc.start()
    first = paired_bootstrap(a, b, draws=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 35e6  # two tables of 1000 x 3000 would be 48 MB
    standard_error = np.std(b - a) / math.sqrt(3000)
    assert (first[1], first[2]) == pytest.approx(
        (first[0] - 1.96 * standard_error, first[0] + 1.96 * standard_error),
        abs=0.3 * standard_error,
    )
    assert (
        paired_bootstrap(a[:50], b[:50])
        == paired_bootstrap(a[:50], b[:50])
        != paired_bootstrap(a[:50], b[:50], seed=1)
    )


@pytest.mark.parametrize("n, changed", [(200, 0.1), (200, 0.5), (60, 0.3), (60, 0.01)])
def test_smallest_effect_is_found_in_four_of_five_cases(n, changed):
    """The exact power of the exact test.

    It sums over the number of discordant problems, and over how many of them B solves.
    """
    stats = pytest.importorskip("scipy.stats")
    effect = smallest_effect(n, changed)
    changed = max(changed, effect)  # a difference needs as many changes

    def power(effect):
        total = 0.0
        for d in range(n + 1):
            rejected = [k for k in range(d + 1) if mcnemar(k, d - k) < 0.05]
            total += (
                stats.binom.pmf(d, n, changed)
                * stats.binom.pmf(rejected, d, (1 + effect / changed) / 2).sum()
            )
        return total

    assert 0.76 < power(effect) < 0.83
    assert power(effect / 2) < 0.3


def test_smallest_effect_of_samples_is_found_in_four_of_five_cases():
    rng, n, found = np.random.default_rng(5), 50, 0
    p = np.full(n, 0.5)
    variance = 2 * 0.25 / 8  # of a difference of two shares of 8, at one half
    effect = smallest_effect(n, variance, samples=8)
    for i in range(300):
        found += (
            paired_bootstrap(
                shares(rng, n, 8, p - effect / 2),
                shares(rng, n, 8, p + effect / 2),
                draws=300,
                seed=i,
            )[3]
            < 0.05
        )
    assert found / 300 == pytest.approx(0.8, abs=0.08)


def test_smallest_effect_in_numbers():
    assert smallest_effect(200, 0.1) == pytest.approx(0.0626, abs=1e-4) and smallest_effect(
        200, 0.5
    ) == pytest.approx(0.1401, abs=1e-4)
    assert smallest_effect(200, 0.0) == pytest.approx(7.85 / 200, abs=1e-4)
    assert smallest_effect(200, 0.0, samples=8) == pytest.approx(7.85 / 1600, abs=1e-4)
    assert smallest_effect(5, 0.5) == 1.0


def answers(solved, samples=1, prompt="Problem {}"):
    """Outcomes of problems of which each has so many of its samples right."""
    return [
        dict(
            index=i,
            prompt=[{"role": "user", "content": prompt.format(i)}],
            answer="1",
            solved=[j < s for j in range(samples)],
        )
        for i, s in enumerate(solved)
    ]


def test_compare_of_greedy_answers():
    a, b = (
        answers([1] * 20 + [1] * 2 + [0] * 12 + [0] * 6),
        answers([1] * 20 + [0] * 2 + [1] * 12 + [0] * 6),
    )
    c = compare(a, b)
    assert (c["n"], c["both"], c["only_a"], c["only_b"], c["neither"]) == (40, 20, 2, 12, 6)
    assert (c["accuracy_a"], c["accuracy_b"], c["difference"]) == (0.55, 0.8, pytest.approx(0.25))
    assert (
        0 < c["low"] < 0.25 < c["high"]
        and c["p"] == mcnemar(2, 12) < 0.05
        and c["verdict"] == "B is better"
    )
    assert compare(b, a)["verdict"] == "A is better"


def test_compare_of_samples():
    rng = np.random.default_rng(6)
    worse, better = answers(rng.binomial(8, 0.3, 100), 8), answers(rng.binomial(8, 0.6, 100), 8)
    c = compare(worse, better)
    assert (
        c["verdict"] == "B is better" and c["p"] < 0.001 and c["samples"] == 8 and "only_a" not in c
    )
    assert (
        c["difference"] == pytest.approx(c["accuracy_b"] - c["accuracy_a"])
        and c["low"] > 0.2
        and c["high"] < 0.4
    )


def test_compare_finds_nothing_where_nothing_is():
    c = compare(
        answers([1] * 100 + [0] * 100), answers([0] * 10 + [1] * 100 + [0] * 90)
    )  # ten lost, ten gained
    assert c["p"] == 1.0 and c["low"] < 0 < c["high"]
    assert (
        c["verdict"]
        == "no difference that n = 200 can see; one below about 6.3 points would likely not show"
    )


@pytest.mark.parametrize(
    "b",
    [
        answers([1, 1], prompt="Other {}"),
        [a | {"answer": "2"} for a in answers([1, 1])],
        answers([1, 1], samples=2),
    ],
)
def test_compare_refuses_other_problems(b):
    with pytest.raises(
        ValueError,
        match="problem 0 of A is not problem 0 of B, or has another number of samples: "
        "evaluate both",
    ):
        compare(answers([1, 1]), b)
    with pytest.raises(ValueError, match="2 shares for A and 3 for B"):
        compare(answers([1, 1]), answers([1, 1, 1]))


def worded(texts, **more):
    """An outcome a text, one sample each, that solves a problem where it is 'yes'."""
    found = []
    for i, text in enumerate(texts):
        outcome = dict(index=i, prompt=[i], answer="", solved=[text == "yes"], texts=[text])
        found.append({**outcome, "finished": [True], **more})
    return found


def test_a_comparison_says_what_makes_it_mean_less():
    some = ["yes", "no", "no"] * 10
    found = compare(worded(some), worded(some))
    assert found["verdict"].startswith("no difference: all 30 completions are the same, word for")
    found = compare(worded(some), worded(["yes", "never", "no"] * 10))
    assert found["verdict"].startswith("no difference that n = 30 can see")
    assert "but" not in found["verdict"]

    cut = worded(["?"] * 30, finished=[False])
    failed = worded(["no"] * 30, errors=["no verifier"])
    said = compare(worded(["yes"] * 30), cut)["verdict"]
    assert (
        said == "A is better; but 100% of the completions of B are cut off: raise --max_new_tokens"
    )
    said = compare(failed, worded(["yes"] * 30))["verdict"]
    words = "the reward failed on 30 samples of A, which count as not solved"
    assert said == f"B is better; but {words}"

    # Problems that do not fit the model were not asked.
    too_long = worded(["?"] * 30, finished=[False], too_long=True)
    assert compare(worded(["yes"] * 30), too_long)["verdict"] == "A is better"
