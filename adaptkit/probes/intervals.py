"""95 % intervals: the bootstrap for means over queries, the block jackknife for measures of a whole set.

They cover the choice of images, with gallery and fitted probe held fixed; they say nothing about training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptkit.errors import DataError

DRAWS_AT_ONCE = 1 << 22  # resampled values held in memory: 32 MB of float64
Z_975 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, in the unit of what was compared."""

    value: float
    lo: float
    hi: float


def bootstrap(values: Tensor, *, seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """(Q,) values -> 95 % percentile interval of their mean (Efron 1979). Raises DataError when Q < 2."""
    numbers = values.detach().double().numpy()
    count = len(numbers)
    if count < 2:
        raise DataError(f"{count} queries: an interval needs at least 2; add images to the queries")
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // count)
    means = [
        numbers[rng.integers(0, count, (min(rows, rounds - done), count))].mean(axis=1)
        for done in range(0, rounds, rows)
    ]
    lo, hi = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(lo), float(hi)


def paired_bootstrap(before: Tensor, after: Tensor, *, seed: int = 0, rounds: int = 2000) -> Interval:
    """(Q,) and (Q,) values of the same queries -> mean of after - before. Raises DataError when Q < 2."""
    if before.shape != after.shape:
        raise ValueError(f"paired values must belong to the same queries, got {before.shape} and {after.shape}")
    gain = after.double() - before.double()
    lo, hi = bootstrap(gain, seed=seed, rounds=rounds)
    return Interval(float(gain.mean()), lo, hi)


def resampled_interval(
    of_images: Callable[[np.ndarray], float], num_images: int, *, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of a measure of `num_images` images, drawn anew with repetition (Efron 1979).

    Draws for which the measure is not defined (NaN: a class that no drawn image shows) are left out.
    """
    rng = np.random.default_rng(seed)
    values = [of_images(rng.integers(0, num_images, num_images)) for _ in range(rounds)]
    lo, hi = np.nanpercentile(values, [2.5, 97.5])
    return float(lo), float(hi)


def jackknife(fn: Callable[[Tensor], float], vectors: Tensor, blocks: int = 20) -> Interval:
    """fn of (N, D) vectors with its block jackknife interval. Raises DataError when N < 4."""
    groups = leave_out(len(vectors), blocks)
    parts = [fn(vectors[kept]) for kept in groups]
    return jackknife_interval(fn(vectors), parts, [len(vectors) - len(kept) for kept in groups])


def paired_jackknife(fn: Callable[[Tensor], float], before: Tensor, after: Tensor, blocks: int = 20) -> Interval:
    """fn(after) - fn(before) for (N, D) and (N, D') embeddings of the same images, leaving out the same images."""
    if len(before) != len(after):
        raise ValueError(f"paired embeddings must belong to the same images, got {len(before)} and {len(after)}")
    groups = leave_out(len(before), blocks)
    parts = [fn(after[kept]) - fn(before[kept]) for kept in groups]
    sizes = [len(before) - len(kept) for kept in groups]
    return jackknife_interval(fn(after) - fn(before), parts, sizes)


def leave_out(count: int, blocks: int) -> list[Tensor]:
    """The indices kept when each of the blocks of images is left out.

    Blocks are random (fixed seed), not contiguous: folders list images class by class, and leaving out a
    class is not a sample of the same kind.
    """
    if count < 4:
        raise DataError(f"{count} images: an interval needs at least 4; add images")
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    block = torch.arange(count) * min(blocks, count) // count
    return [order[block != b].sort().values for b in range(min(blocks, count))]


def jackknife_interval(value: float, parts: Sequence[float], sizes: Sequence[int]) -> Interval:
    """The estimate on all images, on all but each block, and the block sizes -> value +- t * standard error.

    The delete-m_j jackknife for unequal blocks (Busing, Meijer and van der Leeden 1999, eq. 7-8). The interval is
    centred on the value itself: rank measures depend on the number of images, and "before" and "after" share it.
    """
    part, ratio = np.array(parts), sum(sizes) / np.array(sizes)  # ratio: n / m_j
    corrected = len(part) * value - ((1 - 1 / ratio) * part).sum()
    pseudo = ratio * value - (ratio - 1) * part
    error = float(np.sqrt((((pseudo - corrected) ** 2) / (ratio - 1)).mean()))
    half = t_975(len(part) - 1) * error
    return Interval(value, value - half, value + half)


def t_975(df: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5), within 0.3 % from 3 degrees of freedom on."""
    z = Z_975
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
