"""LiDAR against a twin written from the paper's equations, and where there is nothing to measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.errors import DataError
from adaptkit.probes import lidar


def draw_views(images: int, views: int, dim: int, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """(images, views, dim) with directions of very different size, in what differs between images and in the noise."""
    rng = np.random.default_rng(seed)
    means = rng.normal(0, 1, (images, 1, dim)) * np.geomspace(0.01, 2, dim) + 3
    return means + noise * rng.normal(0, 1, (images, views, dim)) * np.geomspace(2, 0.1, dim)


def slow_lidar(views: np.ndarray) -> float:
    images, count, dim = views.shape
    overall = views.reshape(-1, dim).mean(axis=0)
    between, within = np.zeros((dim, dim)), 1e-4 * np.eye(dim)
    for image in views:
        mean = image.mean(axis=0)
        between += np.outer(mean - overall, mean - overall) / images
        for view in image:
            within += np.outer(view - mean, view - mean) / (images * count)
    eigenvalues = np.linalg.eigvals(np.linalg.inv(within) @ between).real  # similar to the symmetric form: the same l
    share = eigenvalues / eigenvalues.sum()
    return float(np.exp(-sum(p * np.log(p) for p in share if p > 1e-15)))


@pytest.mark.parametrize(("images", "views", "dim"), [(60, 2, 12), (40, 4, 12), (10, 3, 24)])  # last: fewer than dim
def test_lidar_against_a_slow_version(images: int, views: int, dim: int) -> None:
    given = draw_views(images, views, dim)
    assert lidar(torch.from_numpy(given)) == pytest.approx(slow_lidar(given), rel=1e-6)


def test_isotropic_images_have_their_dimension_and_images_on_a_line_have_one() -> None:
    cube = torch.cat([torch.eye(8), -torch.eye(8)])
    still = cube[:, None].expand(-1, 2, -1)
    assert lidar(still) == pytest.approx(8)
    line = torch.arange(10.0)[:, None, None] * torch.ones(1, 3, 8)
    assert lidar(line) == pytest.approx(1)


def test_a_direction_in_which_views_differ_counts_for_less() -> None:
    cube = torch.cat([torch.eye(8), -torch.eye(8)])[:, None].expand(-1, 2, -1).clone()
    cube[:, 0, 0] += 1
    cube[:, 1, 0] -= 1
    assert lidar(cube) == pytest.approx(7, abs=0.1)


def test_images_that_do_not_differ_have_the_minimum() -> None:
    assert lidar(torch.ones(6, 2, 4)) == 1
    generator = torch.Generator().manual_seed(0)
    assert lidar(torch.full((16, 2, 8), 0.3) + 1e-8 * torch.randn(16, 2, 8, generator=generator)) == 1
    assert 1 <= lidar(torch.from_numpy(draw_views(2, 2, 8))) <= 1 + 1e-9  # two images lie on a line


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        lidar(torch.ones(1, 3, 4))
    for shape in ((5, 1, 4), (5, 4)):
        with pytest.raises(ValueError, match="two or more views"):
            lidar(torch.ones(shape))
