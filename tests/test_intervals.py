"""Intervals: coverage on data whose truth is known, and the jackknife against textbook formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from adaptkit.errors import DataError
from adaptkit.probes.intervals import (
    Interval,
    bootstrap,
    jackknife,
    jackknife_interval,
    leave_out,
    paired_bootstrap,
    paired_jackknife,
    resampled_interval,
    t_975,
)
from adaptkit.probes.measure import Measurement, Unpaired, compare
from adaptkit.probes.score import whole_score


def mean_of_first(vectors: Tensor) -> float:
    return float(vectors[:, 0].double().mean())


def test_bootstrap_covers_the_true_mean_95_times_of_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        lo, hi = bootstrap(torch.from_numpy(100.0 * (rng.random(150) < 0.7)), seed=trial, rounds=400)
        hits += lo <= 70 <= hi
    assert 0.91 <= hits / 300 <= 0.985


def test_bootstrap_width_is_that_of_the_normal_theory() -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(3, 2, 1000))
    lo, hi = bootstrap(values)
    expected = 1.96 * float(values.std(correction=0)) / 1000**0.5
    assert (hi - lo) / 2 == pytest.approx(expected, rel=0.06)
    assert (hi + lo) / 2 == pytest.approx(float(values.mean()), abs=0.1 * expected)


def test_bootstrap_is_reproducible_and_seeded() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_bootstrap_in_several_chunks_uses_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = bootstrap(values, rounds=501)
    monkeypatch.setattr("adaptkit.probes.intervals.DRAWS_AT_ONCE", 50 * 7)
    assert bootstrap(values, rounds=501) == pytest.approx(whole, abs=0.02)


def test_paired_bootstrap_sees_what_the_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(50, 20, 400)
    before, after = torch.from_numpy(difficulty), torch.from_numpy(difficulty + rng.normal(1, 2, 400))
    gain = paired_bootstrap(before, after)
    assert gain.value == pytest.approx(float((after - before).mean()))
    assert 0 < gain.lo < gain.value < gain.hi
    assert bootstrap(before)[1] > bootstrap(after)[0]


def test_paired_bootstrap_is_antisymmetric_and_zero_for_equal_values() -> None:
    before, after = torch.rand(2, 60, generator=torch.Generator().manual_seed(3))
    gain, loss = paired_bootstrap(before, after), paired_bootstrap(after, before)
    assert (gain.value, gain.lo, gain.hi) == pytest.approx((-loss.value, -loss.hi, -loss.lo))
    assert paired_bootstrap(before, before) == Interval(0, 0, 0)


def test_jackknife_of_a_mean_is_the_analytic_standard_error() -> None:
    vectors = torch.from_numpy(np.random.default_rng(4).normal(5, 3, (120, 2)))
    interval = jackknife(mean_of_first, vectors, blocks=120)  # delete one: exact for a mean
    half = stats.t.ppf(0.975, 119) * float(vectors[:, 0].std(correction=1)) / 120**0.5
    assert interval.value == pytest.approx(mean_of_first(vectors))
    assert interval.hi - interval.value == pytest.approx(half, rel=1e-4)
    assert interval.value - interval.lo == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize("count", [200, 213])
def test_block_jackknife_covers_the_true_mean(count: int) -> None:
    rng = np.random.default_rng(count)
    hits = 0
    for _ in range(300):
        interval = jackknife(mean_of_first, torch.from_numpy(rng.normal(1, 1, (count, 1))))
        hits += interval.lo <= 1 <= interval.hi
    assert 0.91 <= hits / 300 <= 0.985


def test_unequal_blocks_against_the_formula_written_out() -> None:
    values = np.random.default_rng(5).normal(0, 1, 23)
    groups = [kept.numpy() for kept in leave_out(23, 5)]
    sizes = [23 - len(kept) for kept in groups]
    corrected = 5 * values.mean()
    for kept, size in zip(groups, sizes, strict=True):
        corrected -= (1 - size / 23) * values[kept].mean()
    variance = 0.0
    for kept, size in zip(groups, sizes, strict=True):
        ratio = 23 / size
        pseudo = ratio * values.mean() - (ratio - 1) * values[kept].mean()
        variance += (pseudo - corrected) ** 2 / (ratio - 1) / 5
    interval = jackknife_interval(values.mean(), [values[kept].mean() for kept in groups], sizes)
    assert interval.hi - interval.value == pytest.approx(stats.t.ppf(0.975, 4) * variance**0.5, rel=5e-3)


def test_paired_jackknife_is_the_jackknife_of_the_difference() -> None:
    before, after = torch.from_numpy(np.random.default_rng(6).normal(0, 1, (2, 90, 3)))
    paired = paired_jackknife(mean_of_first, before, after)
    single = jackknife(mean_of_first, after - before)
    assert (paired.value, paired.lo, paired.hi) == pytest.approx((single.value, single.lo, single.hi))


def test_a_measure_of_all_images_is_resampled_as_a_mean_is() -> None:
    values = np.random.default_rng(7).normal(0, 1, 200)
    lo, hi = resampled_interval(lambda drawn: float(values[drawn].mean()), 200, rounds=4000)
    assert (lo, hi) == pytest.approx(bootstrap(torch.from_numpy(values), rounds=4000), abs=0.01)
    some_undefined = resampled_interval(lambda drawn: math.nan if 0 in drawn else float(values[drawn].mean()), 200)
    assert np.isfinite(some_undefined).all()


def test_two_measures_of_all_images_are_compared_on_the_same_draws() -> None:
    values = np.random.default_rng(8).normal(0, 1, 100)
    old = whole_score(lambda drawn: float(values[drawn].max()), 100)
    new = whole_score(lambda drawn: float(values[drawn].max()) + 2, 100)
    delta = compare(Measurement({"top": old}), Measurement({"top": new}))["top"]
    assert delta is not None
    assert (delta.value, delta.lo, delta.hi) == pytest.approx((2, 2, 2))  # unpaired, it would be as wide as theirs
    fewer = whole_score(lambda drawn: 0.0, 99)
    with pytest.raises(Unpaired):
        compare(Measurement({"top": old}), Measurement({"top": fewer}))


def test_leave_out_puts_every_image_in_exactly_one_block() -> None:
    groups = leave_out(47, 20)
    assert len(groups) == 20
    left_out = [sorted(set(range(47)) - set(kept.tolist())) for kept in groups]
    assert sorted(i for block in left_out for i in block) == list(range(47))
    assert {len(block) for block in left_out} == {2, 3}
    assert any(max(block) - min(block) > 3 for block in left_out)  # not contiguous: folders come class by class
    assert len(leave_out(5, 20)) == 5


@pytest.mark.parametrize("df", [3, 4, 9, 19, 100])
def test_t_quantile(df: int) -> None:
    assert t_975(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-2 if df < 4 else 3e-3)


def test_too_little_data_is_the_users_error() -> None:
    with pytest.raises(DataError, match="at least 2"):
        bootstrap(torch.ones(1))
    with pytest.raises(DataError, match="at least 4"):
        jackknife(mean_of_first, torch.ones(3, 2))
    with pytest.raises(ValueError, match="same queries"):
        paired_bootstrap(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="same images"):
        paired_jackknife(mean_of_first, torch.ones(5, 2), torch.ones(6, 2))
