"""Normalised cut of patch tokens: against scipy's generalised problem, on known cuts, in drawn scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.ndimage import label

from adaptkit.dense.cut import (
    LOOSE,
    TAU_ONE,
    affinity,
    box_of,
    cosines,
    find_one,
    find_several,
    second_eigenvector,
)


def patches(*blocks: tuple[int, int, int, int], side: int = 10, dims: int = 6) -> torch.Tensor:
    """(side, side, dims) tokens: the background is one direction, each block (x0, y0, x1, y1) another."""
    grid = torch.zeros(side, side, dims)
    grid[..., 0] = 1
    for number, (x0, y0, x1, y1) in enumerate(blocks, start=1):
        grid[y0:y1, x0:x1] = torch.eye(dims)[number]
    return grid + 0.01 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))


def box(mask: NDArray[np.bool_]) -> tuple[float, ...]:
    return box_of(mask, mask.shape[1], mask.shape[0])


@pytest.mark.parametrize("seed", range(4))
def test_eigenvector_against_the_generalised_problem(seed: int) -> None:
    tokens = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(seed))
    weights = affinity(cosines(tokens), TAU_ONE)
    degree = np.diag(weights.numpy().sum(axis=1))
    expected = eigh(degree - weights.numpy(), degree, subset_by_index=[1, 1])[1][:, 0]
    vector = second_eigenvector(weights)
    assert vector is not None
    assert vector[np.argmax(np.abs(vector))] > 0
    expected *= np.sign(expected[np.argmax(np.abs(expected))])
    assert vector / np.linalg.norm(vector) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-9)


def test_affinity_against_a_double_loop() -> None:
    tokens = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    flat = tokens.reshape(12, 5).double().numpy()
    weights = affinity(cosines(tokens), 0.2)
    for i in range(12):
        for j in range(12):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            assert weights[i, j].item() == (1.0 if cosine >= 0.2 else LOOSE)


def test_a_tie_of_eigenvalues_does_not_depend_on_the_solver() -> None:
    """Three equal groups: the second eigenvalue is double, so any mixture of the two vectors would do."""
    weights = torch.full((12, 12), LOOSE, dtype=torch.float64)
    for start in (0, 4, 8):
        weights[start : start + 4, start : start + 4] = 1
    vector = second_eigenvector(weights)
    assert vector is not None
    ratio = vector / vector[0]
    assert ratio[:4] == pytest.approx(np.ones(4))  # the projection of the first patch onto all cuts
    assert ratio[4:] == pytest.approx(np.full(8, -0.5))


def test_a_block_is_found_and_the_seed_s_component_alone() -> None:
    """The two blocks look alike, so the cut takes both; the seed is in the first of them."""
    grid = patches((2, 3, 5, 8))
    grid[0:2, 7:9] = grid[4, 3]
    mask = find_one(grid).mask
    assert mask.sum() in (4, 15)
    assert label(mask)[1] == 1
    one = find_one(patches((2, 3, 5, 8)))
    assert box(one.mask) == (2, 3, 5, 8)
    assert one.mask.sum() == 15


def test_patches_that_touch_by_a_corner_are_not_connected() -> None:
    grid = patches((4, 4, 7, 7), side=12)
    for rows, columns in ((2, 2), (2, 7), (7, 2), (7, 7)):
        grid[rows : rows + 2, columns : columns + 2] = grid[5, 5]
    assert find_one(grid).mask.sum() in (4, 9)


@pytest.mark.parametrize(("cosine", "one", "several"), [(0.14, True, 1), (0.18, True, 0), (0.22, False, 0)])
def test_thresholds_are_those_of_the_papers(cosine: float, one: bool, several: int) -> None:
    """0.2 for one object, 0.15 for several: above them object and background are tied."""
    grid = torch.zeros(8, 8, 2)
    grid[..., 0] = 1
    grid[2:5, 3:6] = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    assert (box(find_one(grid).mask) == (3, 2, 6, 5)) == one
    assert [box(segment.mask) for segment in find_several(grid)] == [(3, 2, 6, 5)] * several


def test_several_blocks_are_found_one_after_the_other() -> None:
    blocks = {(1, 1, 4, 4), (5, 2, 9, 4), (2, 6, 8, 9)}
    found = find_several(patches(*blocks))
    assert {box(segment.mask) for segment in found} == blocks
    assert not sum(segment.mask.astype(int) for segment in found).max() > 1


def test_a_side_with_three_corners_is_the_background_of_several() -> None:
    """With more object than background the seed lies in the background."""
    grid = patches((1, 1, 9, 9))
    assert bool(find_one(grid).mask[0, 0])
    assert box(find_several(grid)[0].mask) == (1, 1, 9, 9)


def test_a_later_speck_is_left_out() -> None:
    """One patch of 144 is under 1 %."""
    grid = patches((2, 2, 6, 6), side=12)
    grid[9, 9] = torch.eye(6)[2]
    assert [box(segment.mask) for segment in find_several(grid)] == [(2, 2, 6, 6)]


def test_nothing_to_cut_is_the_whole_image_and_no_object() -> None:
    flat = torch.ones(4, 5, 3)
    segment = find_one(flat)
    assert segment.mask.all()
    assert segment.score == 0
    assert find_several(flat) == []
    assert find_one(torch.ones(1, 1, 3)).mask.all()


def test_score_against_a_double_loop() -> None:
    tokens = patches((2, 3, 5, 8), side=9)
    segment = find_one(tokens)
    unit = torch.nn.functional.normalize(tokens.reshape(81, -1).double(), dim=1).numpy()
    flags = segment.mask.ravel()
    same = [unit[i] @ unit[j] for i in range(81) for j in range(81) if flags[i] and flags[j]]
    other = [unit[i] @ unit[j] for i in range(81) for j in range(81) if flags[i] and not flags[j]]
    assert segment.score == pytest.approx(np.mean(same) - np.mean(other))


def test_a_box_is_laid_over_the_image() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[1:3, 2:3] = True
    assert box_of(mask, 160, 40) == (40, 10, 60, 30)


def test_the_same_tokens_on_float32_and_float64_give_the_same_boxes() -> None:
    grid = patches((1, 1, 4, 4), (5, 5, 9, 8))
    first, second = find_several(grid), find_several(grid.double())
    assert [box(a.mask) for a in first] == [box(b.mask) for b in second]


def test_tokens_of_whole_zeros_are_no_crash() -> None:
    grid = torch.zeros(3, 3, 2)
    assert find_one(grid).mask.all()
