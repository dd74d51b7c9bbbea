"""The decay of the spectrum against numpy; the other rank measures are in test_probes.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptkit.probes import alpha_req


def power_law(count: int, dim: int, alpha: float) -> torch.Tensor:
    """(count, dim) whose covariance has exactly the eigenvalues i^-alpha, in a rotated basis with an offset."""
    rng = np.random.default_rng(0)
    cloud = rng.normal(0, 1, (count, dim))
    basis, _, _ = np.linalg.svd(cloud - cloud.mean(axis=0), full_matrices=False)
    turn, _ = np.linalg.qr(rng.normal(0, 1, (dim, dim)))
    return torch.from_numpy(basis * np.arange(1, dim + 1) ** (-alpha / 2) @ turn + 2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dim", [8, 64])
def test_a_power_law_has_its_exponent(alpha: float, dim: int) -> None:
    assert alpha_req(power_law(200, dim, alpha)) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "dim", "first", "last"), [(300, 64, 11, 32), (40, 64, 11, 19), (25, 64, 11, 12), (24, 64, 1, 11)]
)
def test_alpha_against_numpy(count: int, dim: int, first: int, last: int) -> None:
    vectors = np.random.default_rng(7).normal(0, 1, (count, dim)) * np.geomspace(0.05, 2, dim) + 5
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(vectors.T)))[::-1]
    ranks = np.arange(first, last + 1)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[first - 1 : last]), 1)
    assert alpha_req(torch.from_numpy(vectors)) == pytest.approx(-slope, rel=1e-6)


def test_embeddings_without_enough_directions_have_no_finite_exponent() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.full((50, 8), 0.3) + 1e-8 * torch.randn(50, 8, generator=generator)
    line = torch.arange(50.0)[:, None] * torch.ones(1, 64)
    few = torch.randn(50, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    for vectors in (constant, line, few, torch.ones(2, 4), torch.ones(1, 4), torch.randn(9, 1, generator=generator)):
        assert alpha_req(vectors) == math.inf
