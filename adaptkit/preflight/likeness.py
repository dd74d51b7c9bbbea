"""Which images are the same, or nearly: equal content, or a close hash confirmed by a small picture.

The hash alone finds pairs among thousands without comparing each with each. But images of one kind (sketches on white,
cells of a solar panel) often hash alike and are not the same, so what it finds is looked at more closely.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adaptkit.preflight.scan import Look
from adaptkit.sources import near_duplicates

ALIKE = 0.99  # correlation of the small pictures; most copies that were shrunk and recompressed have more


def exact_copies(looks: Sequence[Look]) -> list[list[Look]]:
    """Groups of two or more files with the same content."""
    groups: dict[bytes, list[Look]] = {}
    for look in looks:
        if look.digest:
            groups.setdefault(look.digest, []).append(look)
    return [group for group in groups.values() if len(group) > 1]


def near_copies(looks: Sequence[Look]) -> list[list[Look]]:
    """Groups of two or more images that look nearly the same as the first of their group."""
    groups = []
    for candidates in _candidates(looks):
        left = candidates
        while left:
            is_alike = _correlations(left[:1], left)[0] >= ALIKE
            group = [look for look, alike in zip(left, is_alike, strict=True) if alike]
            groups += [group] if len(group) > 1 else []
            left = [look for look, alike in zip(left[1:], is_alike[1:], strict=True) if not alike]
    return groups


def nearly_seen(seen: Sequence[Look], asked: Sequence[Look]) -> list[tuple[Look, Look]]:
    """(the image of `seen` that is most like it, image) for those of `asked` that look nearly the same as one."""
    is_asked = {id(look) for look in asked}
    pairs = []
    for candidates in _candidates([*seen, *asked]):
        known = [look for look in candidates if id(look) not in is_asked]
        new = [look for look in candidates if id(look) in is_asked]
        if known and new:
            likeness = _correlations(known, new)
            best = likeness.argmax(axis=0)
            pairs += [
                (known[b], look) for b, look, c in zip(best, new, likeness.max(axis=0), strict=True) if c >= ALIKE
            ]
    return pairs


def _candidates(looks: Sequence[Look]) -> list[list[Look]]:
    textured = [look for look in looks if look.has_texture]
    return [[textured[index] for index in group] for group in near_duplicates(look.code for look in textured)]


def _correlations(ones: Sequence[Look], others: Sequence[Look]) -> NDArray[np.float32]:
    """(len(ones), len(others))."""
    return _rows(ones) @ _rows(others).T


def _rows(looks: Sequence[Look]) -> NDArray[np.float32]:
    """The small pictures as rows of mean 0 and length 1."""
    levels = np.frombuffer(b"".join(look.thumbnail for look in looks), dtype=np.uint8)
    rows = levels.reshape(len(looks), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows
