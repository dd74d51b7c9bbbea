"""Objects of one image without labels: normalised cut of the affinities between its patch tokens.

One object as TokenCut finds it (Wang et al., CVPR 2022, sect. 3.2), several as MaskCut does (CutLER, Wang et al., CVPR
2023, sect. 3.2). Both are the normalised cut of Shi and Malik (2000). Left out are the edge refinement of TokenCut and
the conditional random field of MaskCut: boxes end at patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TAU_ONE = 0.2  # TokenCut: a pair of patches is tied from this cosine on
TAU_SEVERAL = 0.15  # MaskCut
LOOSE = 1e-5  # what an edge of all other pairs weighs, in both: keeps the graph in one piece
MAX_OBJECTS = 3  # MaskCut
MIN_SHARE = 0.01  # MaskCut: a later object that covers no more of the image is noise
MAX_CORNERS = 2  # MaskCut: a side with more of the four corners is background
EQUAL = 1e-9  # eigenvalues, and entries relative to the largest, that differ by less are equal

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """Patches taken for one object."""

    mask: Mask  # (h, w), one connected component
    score: float  # mean cosine among its patches less the mean cosine with all others: 0 where there are no others


def find_one(tokens: Tensor) -> Segment:
    """(h, w, D) patch tokens -> the object (TokenCut); the whole image where nothing can be cut."""
    height, width, _ = tokens.shape
    similarity = cosines(tokens)
    everywhere = np.ones((height, width), dtype=bool)
    vector = second_eigenvector(affinity(similarity, TAU_ONE))
    if vector is None:
        return Segment(everywhere, 0.0)
    front, seed = _front(vector)
    return _segment(_component(_on_grid(front, everywhere), _place(seed, everywhere)), similarity)


def find_several(tokens: Tensor) -> list[Segment]:
    """(h, w, D) patch tokens -> up to `MAX_OBJECTS` objects, the first found first (MaskCut).

    Found patches leave the graph. MaskCut sets their tokens to zero instead, which leaves them in the graph with edges
    of `LOOSE` only and in the mean at which the eigenvector is cut.
    """
    similarity = cosines(tokens)
    free = np.ones(tokens.shape[:2], dtype=bool)
    found: list[Segment] = []
    while len(found) < MAX_OBJECTS and free.any():
        left = torch.from_numpy(np.flatnonzero(free)).to(similarity.device)
        vector = second_eigenvector(affinity(similarity[left][:, left], TAU_SEVERAL))
        if vector is None:
            break
        front, seed = _front(vector)
        if _corners(_on_grid(front, free)) > MAX_CORNERS:
            front, seed = ~front, int(np.argmax(_near_largest(-vector)))
        mask = _component(_on_grid(front, free), _place(seed, free))
        if found and mask.mean() <= MIN_SHARE:
            break
        found.append(_segment(mask, similarity))
        free &= ~mask
    return found


def cosines(tokens: Tensor) -> Tensor:
    """(h, w, D) -> (n, n) float64, n = h * w; 8 n^2 bytes, 104 MB for 3,600 patches."""
    unit = torch.nn.functional.normalize(tokens.flatten(0, 1).double(), dim=1)
    return unit @ unit.T


def affinity(similarity: Tensor, tau: float) -> Tensor:
    """(n, n) cosines -> edge weights: 1 from `tau` on, else `LOOSE` (TokenCut, eq. 5)."""
    tied = similarity >= tau
    tied = tied | tied.T  # rounding may tell the two apart
    return torch.full_like(similarity, LOOSE).masked_fill_(tied, 1)


def second_eigenvector(weights: Tensor) -> NDArray[np.float64] | None:
    """(n, n) symmetric edge weights W -> (n,) y of the second smallest lambda in (D - W) y = lambda D y.

    By way of the normalised Laplacian I - D^(-1/2) W D^(-1/2), whose eigenvectors are D^(1/2) y (Shi and Malik 2000,
    eq. 12); its known first one is moved out of the way. Costs n^3. Of equal eigenvalues the vector is the projection
    of the patch that lies most in their space, the first of several. The entry with the largest absolute value, the
    first of several, is positive. None when all weights are the same: then no cut is better than another.
    """
    if bool((weights == weights[0, 0]).all()):
        return None
    degree = weights.sum(dim=1)
    scale = degree.rsqrt()
    laplacian = -scale[:, None] * weights * scale
    laplacian.diagonal().add_(1)
    first = degree.sqrt() / degree.sum().sqrt()
    laplacian.addr_(first, first, alpha=3)  # eigenvalues are at most 2
    values, vectors = torch.linalg.eigh(laplacian)
    tied = vectors[:, values <= values[0] + EQUAL]
    inside = tied.square().sum(dim=1).cpu().numpy()
    patch = int(np.argmax(inside >= (1 - EQUAL) * inside.max()))
    vector: NDArray[np.float64] = ((tied @ tied[patch]) * scale).cpu().numpy()
    vector *= np.sign(vector[int(np.argmax(_near_largest(np.abs(vector))))])
    return vector


def box_of(mask: Mask, width: int, height: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in pixels around the patches of a mask that is laid over the whole width and height."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    across, down = width / mask.shape[1], height / mask.shape[0]
    return (columns[0] * across, rows[0] * down, (columns[-1] + 1) * across, (rows[-1] + 1) * down)


def _near_largest(values: NDArray[np.float64]) -> Mask:
    near: Mask = values >= values.max() - EQUAL * np.abs(values).max()
    return near


def _front(vector: NDArray[np.float64]) -> tuple[Mask, int]:
    """The side of the mean that holds the largest absolute value, and where that is: the seed."""
    seed = int(np.argmax(_near_largest(np.abs(vector))))  # positive, so above the mean
    return vector > vector.mean() + EQUAL * vector[seed], seed


def _on_grid(flags: Mask, free: Mask) -> Mask:
    """One flag for each free patch -> (h, w)."""
    grid = np.zeros_like(free)
    grid[free] = flags
    return grid


def _place(index: int, free: Mask) -> tuple[int, int]:
    row, column = divmod(int(np.flatnonzero(free)[index]), free.shape[1])
    return row, column


def _corners(mask: Mask) -> int:
    return int(mask[0, 0]) + int(mask[0, -1]) + int(mask[-1, 0]) + int(mask[-1, -1])


def _component(mask: Mask, seed: tuple[int, int]) -> Mask:
    """The patches that are connected with the seed by their sides."""
    reached = np.zeros_like(mask)
    waiting = [seed]
    while waiting:
        row, column = waiting.pop()
        if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column] and not reached[row, column]:
            reached[row, column] = True
            waiting += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return reached


def _segment(mask: Mask, similarity: Tensor) -> Segment:
    inside = torch.from_numpy(mask.ravel()).to(similarity.device)
    rows = similarity[inside]
    if bool(inside.all()):
        return Segment(mask, 0.0)
    return Segment(mask, float(rows[:, inside].mean() - rows[:, ~inside].mean()))
