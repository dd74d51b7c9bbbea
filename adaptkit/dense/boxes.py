"""How well boxes fit: intersection over union, CorLoc of one box an image, AP50 of several with scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_IOU = 0.5
RECALLS = np.arange(101)  # percent; COCO reads the precision at each of them

Boxes = NDArray[np.float64]
"""(n, 4): x0, y0, x1, y1 in pixels, x1 and y1 just outside."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was predicted in one image, and what is there."""

    boxes: Boxes  # (p, 4)
    scores: NDArray[np.float64]  # (p,)
    truth: Boxes  # (t, 4)


def iou(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """(n, 4) and (m, 4) boxes -> (n, m) area of the intersection over that of the union."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared: NDArray[np.float64] = (high - low).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    shared /= areas[0][:, None] + areas[1][None, :] - shared
    return shared


def is_found(box: Boxes, truth: Boxes) -> bool:
    """Whether the one box (1, 4) has an IoU above 0.5 with any of the truth: CorLoc of an image (Deselaers 2010)."""
    return bool((iou(box, truth) > MIN_IOU).any())


def right_ones(found: Found) -> NDArray[np.bool_]:
    """(p,) whether each predicted box is right: best score first, each takes the free true box of the largest IoU.

    That IoU must be at least 0.5; a true box is taken once (COCO's matching, class-agnostic).
    """
    overlap = iou(found.boxes, found.truth)
    right = np.zeros(len(found.boxes), dtype=bool)
    for index in np.argsort(-found.scores, kind="stable"):
        if overlap.shape[1] and overlap[index].max() >= MIN_IOU:
            right[index] = True
            overlap[:, int(np.argmax(overlap[index]))] = -1
    return right


def ap50(images: Sequence[Found]) -> Callable[[NDArray[np.int64]], float]:
    """A function of drawn image numbers -> AP at IoU 0.5 in percent; NaN when none of the drawn has a true box.

    The mean over 101 recalls of the best precision at that recall or a higher one (COCO's). Boxes of equal score count
    together, so the order of the images changes nothing.
    """
    counts = np.array([len(image.truth) for image in images])
    image_of = np.repeat(np.arange(len(images)), [len(image.boxes) for image in images])
    scores = np.concatenate([image.scores for image in images])
    order = np.argsort(-scores, kind="stable")
    image_of, scores = image_of[order], scores[order]
    right = np.concatenate([right_ones(image) for image in images])[order]
    is_last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # of its score

    def of_images(drawn: NDArray[np.int64]) -> float:
        times = np.bincount(drawn, minlength=len(images))
        total = int((times * counts).sum())
        if not total:
            return float("nan")
        weight = times[image_of]
        hits = (weight * right).cumsum()[is_last]
        boxes = weight.cumsum()[is_last]
        hits, boxes = hits[boxes > 0], boxes[boxes > 0]
        best = np.maximum.accumulate((hits / boxes)[::-1])[::-1]
        place = np.searchsorted(
            100 * hits, total * RECALLS
        )  # the first that reaches the recall; whole numbers, so exact
        return float(100 * np.append(best, 0.0)[place].mean())

    return of_images
