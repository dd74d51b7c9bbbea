"""Debiased CKA against the paper's N x N matrices, and what it does to clouds that are alike, and that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.errors import DataError
from adaptkit.probes.drift import cka_score, drift_scores, linear_cka, neighbour_overlap


def slow_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, summed up one pair at a time."""
    n = len(k)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    trace = sum(k[i, j] * m[i, j] for i, j in off)
    total = sum(k[i, j] for i, j in off) * sum(m[i, j] for i, j in off)
    through = sum(sum(k[i, j] for j in range(n) if j != i) * sum(m[i, j] for j in range(n) if j != i) for i in range(n))
    return (trace + total / ((n - 1) * (n - 2)) - 2 / (n - 2) * through) / (n * (n - 3))


def pair(count: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1, (count, 7)) * np.geomspace(0.1, 2, 7) + 3
    second = first @ rng.normal(0, 1, (7, 5)) + noise * rng.normal(0, 1, (count, 5)) - 8
    return torch.from_numpy(first), torch.from_numpy(second)


@pytest.mark.parametrize("count", [4, 5, 21])
def test_cka_against_the_matrices(count: int) -> None:
    first, second = pair(count, 0.8)
    k, m = (vectors.numpy() @ vectors.numpy().T for vectors in (first, second))
    expected = slow_hsic(k, m) / np.sqrt(slow_hsic(k, k) * slow_hsic(m, m))
    assert linear_cka(first, second) == pytest.approx(expected, rel=1e-8)


def test_cka_is_one_for_the_same_cloud_and_zero_for_unrelated_ones() -> None:
    first, _ = pair(60, 0)
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).normal(0, 1, (7, 7))))[0]
    assert linear_cka(first, 4 * first @ turn - 2) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(2, 40, 400, generator=generator)
    values = [linear_cka(*torch.randn(2, 40, 400, generator=generator)) for _ in range(20)]
    assert abs(np.mean(values)) < 0.05, "without the debiasing it is 0.9 with so many dimensions"
    assert linear_cka(clouds[0], torch.full((40, 3), 0.3) + 1e-8 * torch.rand(40, 3)) == 0


def test_interval_of_cka_narrows_with_images_and_is_there_from_five_on() -> None:
    widths = []
    for count in (40, 400):
        score = cka_score(*pair(count, 2.0))
        assert score.ci95 is not None
        assert score.ci95[0] < score.value < score.ci95[1]
        widths.append(score.ci95[1] - score.ci95[0])
    assert widths[1] < 0.6 * widths[0]
    assert cka_score(*pair(5, 2.0)).ci95 is not None
    assert cka_score(*pair(4, 2.0)).ci95 is None


def test_drift_holds_both_measures_and_needs_the_same_four_images() -> None:
    first, second = pair(30, 1.0)
    scores = drift_scores(first, second)
    assert scores["cka"].value == linear_cka(first, second)
    assert scores["neighbour_overlap"].value == pytest.approx(100 * float(neighbour_overlap(first, second).mean()))
    with pytest.raises(DataError, match="at least 4"):
        drift_scores(first[:3], second[:3])
    with pytest.raises(ValueError, match="same images"):
        linear_cka(first, second[:9])
