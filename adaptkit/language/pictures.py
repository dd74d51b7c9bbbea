"""`codes_pictures.json`: for each bit the images it is surest of, and a map of the codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptkit.language.images import Collection
from adaptkit.pictures import principal_plane, thumbnail_of
from adaptkit.probes.hamming import hamming_blocks
from adaptkit.sources import evenly_spaced

SCHEMA = "adaptkit.codes_pictures/1"
MAX_POOL = 800  # images to choose from, so that the page stays below 8 MB
THUMB_PX = 64
MAX_BITS = 256  # that can be browsed
PER_SIDE, PER_SIDE_WITHIN = 6, 5
MIN_IN_CLASS = 8
MAX_MAPPED = 2_000
MIN_FOR_TSNE = 10


def take_pictures(images: Collection, seed: int) -> dict[str, Any]:
    """{schema, images: [{path, class, jpeg}], bits: [{bit, zero, one, within}], map}; numbers are rows of `images`.

    Galleries are drawn from at most 800 images, the map from 2,000. Only images that are shown are read.
    """
    pool = images.drawn(MAX_POOL, seed)
    browsed = evenly_spaced(pool.logits.shape[1], MAX_BITS).tolist()
    bits = [_gallery(pool, bit) for bit in browsed]
    sides = [side for bit in bits for side in (bit, bit["within"] or {"zero": [], "one": []})]
    shown = sorted({row for side in sides for value in ("zero", "one") for row in side[value]})
    number = {row: place for place, row in enumerate(shown)}
    for side in sides:
        for value in ("zero", "one"):
            side[value] = [number[row] for row in side[value]]
    pictures = [
        {"path": pool.path(row), "class": pool.classes[row], "jpeg": thumbnail_of(*pool.place(row), THUMB_PX)}
        for row in shown
    ]
    return {"schema": SCHEMA, "pool": len(pool), "images": pictures, "bits": bits, "map": draw_map(images, seed)}


def _gallery(pool: Collection, bit: int) -> dict[str, Any]:
    """{bit, zero, one, within: {class, zero, one} or None}: rows by falling |logit| on each side."""
    logits = pool.logits[:, bit]
    within = _most_divided_class(pool.classes, (logits > 0).tolist())
    zero, one = _surest(logits, range(len(pool)), PER_SIDE)
    found: dict[str, Any] = {"bit": bit, "zero": zero, "one": one, "within": None}
    if within is not None:
        members = [row for row, name in enumerate(pool.classes) if name == within]
        zero, one = _surest(logits, members, PER_SIDE_WITHIN)
        found["within"] = {"class": within, "zero": zero, "one": one}
    return found


def _surest(logits: Tensor, rows: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Of these rows those whose bit is most surely 0, and most surely 1; none that has the other value."""
    order = sorted(rows, key=lambda row: (float(logits[row]), row))
    zero = [row for row in order[:count] if logits[row] <= 0]
    one = [row for row in order[::-1][:count] if logits[row] > 0]
    return zero, one


def _most_divided_class(classes: Sequence[str | None], ones: Sequence[bool]) -> str | None:
    """The class, of at least 8 images, that the bit halves best; None when it divides none."""
    size, num_ones = Counter(classes), Counter(name for name, one in zip(classes, ones, strict=True) if one)
    large = sorted(name for name in size if name is not None and size[name] >= MIN_IN_CLASS)
    best = max(large, key=lambda name: min(num_ones[name], size[name] - num_ones[name]) / size[name], default=None)
    return best if best is not None and 0 < num_ones[best] < size[best] else None


def draw_map(images: Collection, seed: int) -> dict[str, Any]:
    """{method, reason, points: [[x, y]], images: [{path, class}]} of at most 2,000 codes.

    t-SNE (van der Maaten and Hinton 2008) of the Hamming distances; where scikit-learn is missing, or images are few,
    principal components of the codes, and `reason` says so.
    """
    shown = images.drawn(MAX_MAPPED, seed)
    codes = torch.from_numpy(shown.codes)
    points, reason = _tsne(codes, seed) if len(shown) >= MIN_FOR_TSNE else (None, f"only {len(shown)} images")
    method = "t-SNE" if points is not None else "PCA"
    plane = principal_plane(codes.float() * 2 - 1)[0].numpy() if points is None else points
    plane = plane - (plane.max(axis=0) + plane.min(axis=0)) / 2
    scaled = plane / max(float(np.abs(plane).max()), 1e-12)
    return {
        "method": method,
        "reason": reason,
        "points": [[round(x, 3), round(y, 3)] for x, y in scaled.tolist()],
        "images": [{"path": shown.path(row), "class": name} for row, name in enumerate(shown.classes)],
    }


def _tsne(codes: Tensor, seed: int) -> tuple[NDArray[np.float64] | None, str | None]:
    """(N, B) -> (N, 2), or None and why not."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None, "scikit-learn is not installed; `pip install 'adaptkit[codes]'` gives t-SNE"
    distances = torch.cat([block for _, block in hamming_blocks(codes, codes)]).float().numpy()
    if not distances.any():
        return None, "all codes are equal"
    perplexity = min(30.0, math.floor((len(codes) - 1) / 3))
    model = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed % 2**32)
    return model.fit_transform(distances).astype(np.float64), None
