"""Which property of an image each bit tells most about, and whether that could be chance.

With 256 bits and many properties the best of all pairs looks good by luck alone. So each gain is compared with the
largest gain of any pair when the properties are shuffled over the images (Westfall and Young 1993): the chance that
even one pair is called significant without reason is 5 %, whatever bits and properties have to do with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptkit.probes.codes import Codes, Floats, plogp

NUM_SHUFFLES = 500
LEVEL = 0.05
MIN_COUNT = 5  # images with, and without, a property


@dataclass(frozen=True, eq=False)
class Gains:
    """(B, A) information gain in bits and its p-value over the whole family."""

    gain: Floats
    p: Floats
    threshold: float | None  # gains above it have p <= level; None: too few shuffles for that


def information_gain(codes: Codes, properties: Codes) -> Floats:
    """(N, B), (N, A) bool -> (B, A) mutual information of bit and property, in bits (plug-in)."""
    return _gain_of(codes.astype(np.float32), properties.astype(np.float32))


def family_gains(
    codes: Codes, properties: Codes, seed: int, shuffles: int = NUM_SHUFFLES, level: float = LEVEL
) -> Gains:
    """`information_gain` with significance over all pairs. Each shuffle moves an image's properties together."""
    x, y = codes.astype(np.float32), properties.astype(np.float32)
    gain, rng = _gain_of(x, y), np.random.default_rng(seed)
    largest = np.sort([_gain_of(x, y[rng.permutation(len(y))]).max() for _ in range(shuffles)])
    as_large = shuffles - np.searchsorted(largest, gain - 1e-12)
    p: Floats = (1 + as_large) / (1 + shuffles)
    allowed = int(level * (1 + shuffles)) - 1  # so many shuffles may reach a gain that counts
    return Gains(gain, p, float(largest[shuffles - allowed - 1]) if allowed >= 0 else None)


def usable(properties: Codes) -> NDArray[np.bool_]:
    """(N, A) -> (A,): at least 5 images have the property and 5 have it not."""
    count = properties.sum(axis=0)
    enough: NDArray[np.bool_] = np.minimum(count, len(properties) - count) >= MIN_COUNT
    return enough


def _gain_of(x: NDArray[np.float32], y: NDArray[np.float32]) -> Floats:
    count = len(x)
    both = (x.T @ y).astype(np.float64) / count  # (B, A)
    bit, has = x.mean(axis=0, dtype=np.float64)[:, None], y.mean(axis=0, dtype=np.float64)[None, :]
    cells = [both, bit - both, has - both, 1 - bit - has + both]
    joint = sum((plogp(np.clip(cell, 0, 1)) for cell in cells), np.zeros_like(both))
    alone = plogp(bit) + plogp(1 - bit) + plogp(has) + plogp(1 - has)
    gain: Floats = np.maximum(alone - joint, 0)
    return gain
