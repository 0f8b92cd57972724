"The range test: the rates it tries, when it stops, and what it suggests."

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.lr_range import SUGGESTIONS, RangeTest, minimum, slide, steepest, suggest, valley

losses = st.floats(0, 1e3)


def fed(values: list[float], **options: float) -> RangeTest:
    "A test that was given these losses until it was over."
    test = RangeTest(**options)
    for value in values:
        test.add(value)
        if test.finished:
            break
    return test


@given(st.floats(1e-8, 1e-3), st.floats(1e-2, 100), st.integers(2, 200))
def test_rates_rise_geometrically_from_start_to_end(start, end, n_steps) -> None:
    planned = RangeTest(start, end, n_steps).planned
    assert len(planned) == n_steps
    assert (planned[0], planned[-1]) == pytest.approx((start, end))
    ratios = [b / a for a, b in pairwise(planned)]
    assert ratios == pytest.approx([(end / start) ** (1 / (n_steps - 1))] * (n_steps - 1))


@given(st.lists(losses, min_size=1, max_size=30))
def test_the_smoothed_loss_is_the_weighted_mean_of_the_losses_so_far(values) -> None:
    test = fed(values)
    for n, smoothed in enumerate(test.smoothed, 1):
        weights = [RangeTest.smoothing ** (n - 1 - i) for i in range(n)]
        mean = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        assert smoothed == pytest.approx(mean, abs=1e-9)


@given(st.lists(losses, min_size=1, max_size=30))
def test_it_stops_at_the_first_smoothed_loss_over_four_times_the_best(values) -> None:
    test = fed(values)
    over = [s > 4 * min(test.smoothed[: n + 1]) for n, s in enumerate(test.smoothed)]
    assert not any(over[:-1]) and test.diverged == over[-1]
    assert test.lrs == test.planned[: len(test.losses)] and test.losses == values[: len(test.losses)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_it_and_is_not_kept(bad: float) -> None:
    test = fed([2.0, 1.0, bad])
    assert test.diverged and test.finished and test.losses == [2.0, 1.0] and len(test.lrs) == 2


def test_it_is_over_when_all_rates_are_tried() -> None:
    test = fed([1.0] * 3, n_steps=3)
    assert test.finished and not test.diverged and test.lrs == test.planned
    assert not fed([1.0] * 2, n_steps=3).finished


@given(st.lists(losses, min_size=1, max_size=30))
def test_the_suggestion_is_a_tenth_of_the_rate_with_the_least_smoothed_loss(values) -> None:
    test = fed(values)
    best = test.smoothed.index(min(test.smoothed))
    assert minimum(test.lrs, test.smoothed) == (test.planned[best] / 10 if best else None)


@pytest.mark.parametrize("values", [[], [1.0], [0.7] * 100, [2.302585] * 100, [math.nan], [1.0, 1.0, 2.0]])
def test_no_suggestion_where_the_loss_never_falls(values: list[float]) -> None:
    test = fed(values)
    for name, rule in SUGGESTIONS.items():
        assert name == "slide" or rule(test.lrs, test.smoothed) is None


def test_a_plateau_a_fall_and_a_rise_suggest_a_rate_within_the_fall() -> None:
    test = RangeTest(1e-6, 10.0, 100)
    for lr in test.planned:
        wobble = 0.02 * math.sin(1e3 * math.log(lr))
        test.add(2.3 - 1.8 / (1 + (1e-2 / lr) ** 2) + 40 * max(0.0, lr - 1) + wobble)
        if test.finished:
            break
    assert test.diverged
    for name, suggestion in suggest(test).items():
        assert 1e-4 < suggestion < 1, name


def test_one_rate_is_a_test_too() -> None:
    assert RangeTest(0.1, 1.0, 1).planned == [0.1]


def test_on_a_straight_line_all_slopes_are_alike() -> None:
    rates, losses = [float(i) for i in range(40)], [1 - 0.02 * i for i in range(40)]
    assert slide(rates, losses) == rates[-1 - 15]


def test_the_rules_on_curves_whose_answers_are_plain() -> None:
    lrs = [10.0**n for n in range(-7, 0)]
    assert minimum(lrs, [3, 3, 2, 1, 0, 1, 9]) == lrs[4] / 10
    assert steepest(lrs, [9, 9, 8, 4, 3, 3, 9]) == lrs[2]
    assert valley(lrs, [9, 8, 7, 6, 5, 6, 9]) == lrs[2]
    assert slide([*lrs, 1.0], [9, 8, 7, 7, 7, 7, 7, 9], width=2) == lrs[3]


@given(st.lists(losses, min_size=2, max_size=25))
def test_the_valley_lies_within_a_longest_decreasing_subsequence(values) -> None:
    lrs = [float(n) for n in range(len(values))]
    longest = max(len(run) for run in decreasing_runs(values))
    spans = [(run[0], run[-1]) for run in decreasing_runs(values) if len(run) == longest]
    found = valley(lrs, values)
    assert found is None if longest == 1 else any(found == (first + last) // 2 for first, last in spans)


def decreasing_runs(values: list[float]) -> list[list[int]]:
    "For each place and each start, one longest decreasing subsequence of places, by brute force over its ends."
    best: dict[tuple[int, int], list[int]] = {(i, i): [i] for i in range(len(values))}
    for last in range(len(values)):
        for middle in range(last):
            if values[middle] > values[last]:
                for (first, end), run in list(best.items()):
                    if end == middle and len(run) >= len(best.get((first, last), [])):
                        best[first, last] = [*run, last]
    return list(best.values())
