"""How well two regions agree: J, the overlap of their areas, and F, that of their outlines (Perazzi et al. 2016)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.008  # of the image's diagonal, as in the evaluation of DAVIS 2017 (Pont-Tuset et al. 2017)

Region = NDArray[np.bool_]


def region_j(found: Region, truth: Region) -> float:
    """(H, W) and (H, W) -> intersection over union; 1 where both are empty."""
    union = int((found | truth).sum())
    return int((found & truth).sum()) / union if union else 1.0


def contour_f(found: Region, truth: Region) -> float:
    """(H, W) and (H, W) -> the harmonic mean of precision and recall of outline pixels; 1 where both have none.

    A pixel of one outline is matched when one of the other lies within `TOLERANCE`. With one outline only, nothing is
    matched: 0.
    """
    radius = reach(found.shape)
    ours, theirs = outline(found), outline(truth)
    num_ours, num_theirs = int(ours.sum()), int(theirs.sum())
    if not num_ours or not num_theirs:
        return float(num_ours == num_theirs)
    precision = int((ours & dilated(theirs, radius)).sum()) / num_ours
    recall = int((theirs & dilated(ours, radius)).sum()) / num_theirs
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def reach(shape: tuple[int, ...]) -> int:
    """Pixels by which two outlines may differ in an image of this height and width."""
    return math.ceil(TOLERANCE * math.hypot(*shape))


def outline(region: Region) -> Region:
    """(H, W) -> pixels that the one to the right, below or right below differs from (Martin et al. 2004)."""
    wider = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    right, below, across = wider[:-1, 1:], wider[1:, :-1], wider[1:, 1:]
    edges: Region = (region != right) | (region != below) | (region != across)
    return edges


def dilated(points: Region, radius: int) -> Region:
    """(H, W) -> pixels at most `radius` away from one of the points, in Euclid's distance."""
    height, width = points.shape
    sums = np.zeros((height + 2 * radius, width + 2 * radius + 1), dtype=np.int32)  # of each row up to a column
    sums[radius : radius + height, radius + 1 : radius + 1 + width] = np.cumsum(points, axis=1)
    sums[:, radius + 1 + width :] = sums[:, radius + width : radius + width + 1]
    reached = np.zeros(points.shape, dtype=np.bool_)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)
        rows = sums[radius + dy : radius + dy + height]
        reached |= (
            rows[:, radius + half + 1 : radius + half + 1 + width] > rows[:, radius - half : radius - half + width]
        )
    return reached
