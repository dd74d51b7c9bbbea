"""How many bits of information a set of binary codes carries, and how often bits repeat each other.

Codes are (N, B) bool: N images, B bits. No labels are needed; a code that says much need not say what matters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.objectives.bits import LIVE_MINORITY

Codes = NDArray[np.bool_]
Floats = NDArray[np.float64]

DEAD_ENTROPY = 0.05  # bits: below it a bit hardly ever takes its rarer value (one image in 180)
DUPLICATE = 0.95  # |correlation| above which two bits say the same
BLOCK_BITS = 8
CORRELATION_BINS = 10
MAX_PAIRS = 100  # duplicate pairs that are listed; all are counted


def bit_entropy(codes: Codes) -> Floats:
    """(N, B) -> (B,) marginal entropy of each bit, in bits."""
    ones = codes.mean(axis=0, dtype=np.float64)
    return plogp(ones) + plogp(1 - ones)


def plogp(p: Floats) -> Floats:
    """-p log2 p, 0 where p is 0."""
    return 0 - p * np.log2(np.where(p > 0, p, 1))  # not -p: 0 has no sign


def is_live(codes: Codes) -> NDArray[np.bool_]:
    """(N, B) -> (B,): at least 1 % of the images have the bit's rarer value, as in the log of a run."""
    ones = codes.mean(axis=0, dtype=np.float64)
    live: NDArray[np.bool_] = np.minimum(ones, 1 - ones) >= LIVE_MINORITY
    return live


def bit_correlation(codes: Codes) -> Floats:
    """(N, B) -> (B, B) Pearson correlation (phi); NaN for a bit that never changes."""
    x = codes.astype(np.float32)  # sums of 0 and 1 are exact up to 2**24 images
    ones, both = x.sum(axis=0, dtype=np.float64), (x.T @ x).astype(np.float64)
    count = len(codes)
    deviation = np.sqrt(ones * (count - ones))
    with np.errstate(invalid="ignore", divide="ignore"):
        r: Floats = (count * both - np.outer(ones, ones)) / np.outer(deviation, deviation)
    return r


def correlation_summary(correlation: Floats) -> dict[str, Any]:
    """Mean, maximum and histogram of |r| over all pairs of different bits that both change; None where there are none.

    {num_pairs, mean_abs, max_abs, histogram: {edges, counts}}.
    """
    first, second = np.triu_indices(len(correlation), k=1)
    strength = np.abs(correlation[first, second])
    strength = strength[~np.isnan(strength)]
    counts, edges = np.histogram(strength.clip(max=1), bins=CORRELATION_BINS, range=(0, 1))
    return {
        "num_pairs": len(strength),
        "mean_abs": float(strength.mean()) if len(strength) else None,
        "max_abs": float(strength.max()) if len(strength) else None,
        "histogram": {"edges": [round(float(edge), 2) for edge in edges], "counts": counts.tolist()},
    }


def duplicate_bits(codes: Codes, correlation: Floats) -> dict[str, Any]:
    """Pairs of bits that say the same: |r| > 0.95. {threshold, num_pairs, num_bits, pairs: [{bits, r, relation}]}.

    The relation is `equal` or `complement` where it holds for every image, else `correlated`. `num_bits`: how many
    bits have such a twin of lower number, so how many could be left out. At most 100 pairs are listed, strongest first.
    """
    strength = np.triu(np.abs(np.nan_to_num(correlation)), k=1)
    first, second = np.nonzero(strength > DUPLICATE)
    order = np.argsort(-strength[first, second], kind="stable")
    pairs = []
    for a, b in zip(first[order[:MAX_PAIRS]].tolist(), second[order[:MAX_PAIRS]].tolist(), strict=True):
        num_equal = int((codes[:, a] == codes[:, b]).sum())
        relation = {len(codes): "equal", 0: "complement"}.get(num_equal, "correlated")
        pairs.append({"bits": [a, b], "r": float(correlation[a, b]), "relation": relation})
    return {
        "threshold": DUPLICATE,
        "num_pairs": len(first),
        "num_bits": len(np.unique(second)),
        "pairs": pairs,
    }


def block_entropies(codes: Codes) -> dict[str, Any]:
    """Joint entropy of contiguous blocks of 8 bits, in bits; bits behind the last whole block are left out.

    {bits, num_blocks, raw_mean, corrected_mean, maximum, raw: [...], corrected: [...]}. `raw` is the plug-in estimate,
    which is too low by about (values that occur - 1) / (2 N ln 2) bits; `corrected` adds that (Miller 1955), up to 8.
    `maximum` is what N images can show at most: log2 N, up to 8.
    """
    count, num_blocks = len(codes), codes.shape[1] // BLOCK_BITS
    raw, corrected = [], []
    for block in range(num_blocks):
        values = np.packbits(codes[:, block * BLOCK_BITS : (block + 1) * BLOCK_BITS], axis=1).ravel()
        shares = np.bincount(values, minlength=1 << BLOCK_BITS) / count
        raw.append(float(plogp(shares).sum()))
        bias = (np.count_nonzero(shares) - 1) / (2 * count * math.log(2))
        corrected.append(min(float(BLOCK_BITS), raw[-1] + bias))
    return {
        "bits": BLOCK_BITS,
        "num_blocks": num_blocks,
        "raw_mean": float(np.mean(raw)) if raw else None,
        "corrected_mean": float(np.mean(corrected)) if corrected else None,
        "maximum": min(float(BLOCK_BITS), math.log2(count)),
        "raw": raw,
        "corrected": corrected,
    }
