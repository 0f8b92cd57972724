"Schedules: their ends, their bounds, and the book chapter's formula."

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import UsageError
from learner.schedule import (
    SCHEDULES,
    combine,
    constant,
    cosine,
    exponential,
    flat_cosine,
    linear,
    one_cycle,
    one_cycle_momentum,
    polynomial,
    warm_restarts,
)

progress = st.floats(0, 1)
rates = st.floats(1e-6, 10)


def chapters_rate(pct: float, base_lr: float) -> float:
    "OneCycle's rate as the book computes it, statement by statement."
    pct_start, div_start = 0.25, 10
    if pct < pct_start:
        pct /= pct_start
        return (1 - pct) * base_lr / div_start + pct * base_lr
    pct = (pct - pct_start) / (1 - pct_start)
    return (1 - pct) * base_lr


@given(progress, rates)
def test_one_cycle_is_the_chapters(pct, peak) -> None:
    assert one_cycle(pct, peak) == pytest.approx(chapters_rate(pct, peak), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("anneal", [linear, cosine])
@given(progress, rates, rates)
def test_anneals_go_from_start_to_end_and_never_outside(anneal, pct, start, end) -> None:
    assert anneal(start, end, 0) == pytest.approx(start)
    assert anneal(start, end, 1) == pytest.approx(end)
    assert anneal(start, end, 0.5) == pytest.approx((start + end) / 2)
    assert min(start, end) * (1 - 1e-9) <= anneal(start, end, pct) <= max(start, end) * (1 + 1e-9)


def test_cosine_leaves_its_ends_slowly_and_linear_does_not() -> None:
    assert cosine(1.0, 0.0, 0.1) > 0.97 and cosine(1.0, 0.0, 0.9) < 0.03
    assert linear(1.0, 0.0, 0.1) == pytest.approx(0.9)


@pytest.mark.parametrize("anneal", [linear, cosine])
@given(st.floats(0.05, 0.95), st.floats(2, 100), rates)
def test_one_cycle_rises_to_its_peak_and_falls_to_zero(anneal, pct_start, div, peak) -> None:
    def rate(pct: float) -> float:
        return one_cycle(pct, peak, anneal, pct_start, div)

    assert (rate(0), rate(pct_start)) == pytest.approx((peak / div, peak))
    assert rate(1) == pytest.approx(0, abs=1e-9 * peak)
    up = [rate(pct_start * i / 20) for i in range(21)]
    down = [rate(pct_start + (1 - pct_start) * i / 20) for i in range(21)]
    assert up == sorted(up) and down == sorted(down, reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
@given(progress, rates)
def test_every_schedule_stays_between_zero_and_the_peak(name, pct, peak) -> None:
    assert -1e-9 * peak <= SCHEDULES[name](pct, peak) <= peak * (1 + 1e-9)


def test_schedules_are_what_their_names_say() -> None:
    assert [SCHEDULES["constant"](pct, 0.3) for pct in (0, 0.5, 1)] == [0.3, 0.3, 0.3]
    assert [SCHEDULES["cosine"](pct, 0.3) for pct in (0, 0.5, 1)] == pytest.approx([0.3, 0.15, 0])
    assert [SCHEDULES["one_cycle"](pct, 0.3) for pct in (0, 0.25, 0.625)] == pytest.approx([0.03, 0.3, 0.15])


@given(rates, rates, progress)
def test_exponential_and_polynomial_keep_to_their_ends(start, end, pct) -> None:
    for piece in (exponential, polynomial, constant):
        assert piece(start, end, 0.0) == pytest.approx(start)
    for piece in (exponential, polynomial):
        assert piece(start, end, 1.0) == pytest.approx(end)
        assert min(start, end) * (1 - 1e-9) <= piece(start, end, pct) <= max(start, end) * (1 + 1e-9)
    assert exponential(start, end, 0.5) ** 2 == pytest.approx(start * end)
    assert polynomial(start, end, pct, power=1.0) == pytest.approx(linear(start, end, pct))


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), progress)
def test_combined_pieces_each_run_from_0_to_1_over_their_fraction(parts, pct) -> None:
    fractions = [part / sum(parts) for part in parts]
    which = combine(fractions, [lambda p, n=n: n + min(p, 0.999) for n in range(len(parts))])
    ends = [sum(fractions[: n + 1]) for n in range(len(parts))]
    values = [which(p) for p in sorted([0.0, pct, *ends])]
    assert values == sorted(values)
    assert which(0.0) == 0.0 and which(1.0) == pytest.approx(len(parts) - 0.001)
    assert int(which(pct)) == min(sum(end <= pct for end in ends), len(parts) - 1)


@pytest.mark.parametrize("fractions", [[0.5, 0.6], [1.0], [1.5, -0.5]])
def test_fractions_that_are_no_whole_are_refused(fractions) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        combine(fractions, [lambda p: p, lambda p: p])


@given(progress, rates)
def test_one_cycle_with_fastais_numbers(pct, peak) -> None:
    "fastai: combined_cos(pct_start, lr_max/div, lr_max, lr_max/div_final)."
    ours = one_cycle(pct, peak, cosine, 0.25, 25.0, 1e5)
    if pct < 0.25:
        theirs = peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * pct / 0.25)) / 2
    else:
        theirs = peak + (peak / 1e5 - peak) * (1 - math.cos(math.pi * (pct - 0.25) / 0.75)) / 2
    assert ours == pytest.approx(theirs)


@given(progress)
def test_momentum_goes_against_the_rate(pct) -> None:
    assert 0.85 - 1e-9 <= one_cycle_momentum(pct, anneal=cosine) <= 0.95 + 1e-9
    assert one_cycle_momentum(0.0) == 0.95 and one_cycle_momentum(0.25) == pytest.approx(0.85)
    assert one_cycle_momentum(1.0) == pytest.approx(0.95)


def test_flat_cosine_is_flat_then_falls() -> None:
    assert [flat_cosine(p, 2.0) for p in (0.0, 0.5, 0.749)] == [2.0] * 3
    assert flat_cosine(0.875, 2.0) == pytest.approx(1.0) and flat_cosine(1.0, 2.0) == pytest.approx(0.0)


def test_warm_restarts_start_anew_and_last_longer_each_time() -> None:
    rates = [warm_restarts(n / 700, 1.0) for n in range(700)]
    assert [n for n in range(1, 700) if rates[n] > rates[n - 1] + 0.5] == [100, 300]
    assert rates[0] == rates[100] == rates[300] == 1.0 and rates[200] == pytest.approx(0.5, abs=0.01)
