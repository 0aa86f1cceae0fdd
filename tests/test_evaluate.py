"""Accuracy, pass@k and intervals."""
import itertools
import math

import pytest

from nanorl.tasks import Reward
from nanorl.evaluate import clustered_interval, is_correct, pass_at_k, summary, wilson


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(chosen) for chosen in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)  # exact integers: no overflow, no rounding to 0 or 1
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples a problem, there are 4"):
        pass_at_k(4, 4, 5)


@pytest.mark.parametrize("correct, n", [(0, 1), (1, 1), (0, 400), (400, 400), (1, 400), (37, 50), (200, 400), (999, 1000)])
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
    half = 1.959964 * math.sqrt((0.25 + 0.25) / 3 / 4)  # deviations of the four shares from their mean
    assert clustered_interval(shares) == pytest.approx((0.5 - half, 0.5 + half))
    assert clustered_interval([1.0, 1.0]) == (1.0, 1.0)
    assert clustered_interval([1.0, 0.9, 1.0])[1] == 1.0  # cut off at 1


def outcome(correct, rewards, lengths, finished):
    parts = [{"correct": float(c)} for c in correct]
    return dict(parts=parts, solved=[bool(c) for c in correct], rewards=rewards, lengths=lengths, finished=finished)


def test_summary_of_samples():
    results = [outcome([1, 0, 0, 0], [1.0, -0.5, 0.0, 0.0], [2, 4, 6, 8], [True, True, True, False]),
               outcome([1, 1, 0, 1], [1.0, 1.0, 0.5, 1.0], [1, 1, 1, 1], [True] * 4)]
    s = summary(results, ks=(1, 2, 4, 8))
    assert (s["n"], s["samples"], s["accuracy"], s["reward"], s["length"], s["clipped"]) == (2, 4, 0.5, 0.5, 3.0, 0.125)
    assert s["pass@1"] == 0.5 and s["pass@2"] == pytest.approx((1 / 2 + 1) / 2) and s["pass@4"] == 1
    assert "pass@8" not in s  # there are no eight samples to choose from
    assert (s["low"], s["high"]) == clustered_interval([0.25, 0.75])


def test_summary_of_greedy_answers_has_wilsons_interval():
    results = [outcome([i < 7], [float(i < 7)], [3], [True]) for i in range(10)]
    s = summary(results)
    assert (s["accuracy"], s["pass@1"], s["clipped"]) == (pytest.approx(0.7), pytest.approx(0.7), 0)
    assert (s["low"], s["high"]) == wilson(7, 10)


def test_correct_is_the_part_or_else_a_full_reward():
    assert [is_correct(Reward(r, parts)) for r, parts in [(0.2, {"correct": 1.0}), (1.0, {"correct": 0.0})]] == [True, False]
    assert [is_correct(Reward(r, parts)) for r, parts in [(1.0, {}), (0.99, {}), (0.5, {"style": 1.0})]] == [True, False, False]
