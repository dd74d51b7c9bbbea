"""Near-duplicate images: a 64-bit difference hash, and the groups of images whose hashes are close."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE = 3
"""Bits in which the hashes of near-duplicates differ at most: recompressed, resized, slightly retouched copies."""

NUM_BANDS = MAX_DISTANCE + 1  # with one band more than there are differing bits, one band is equal
BAND_BITS = 64 // NUM_BANDS


def dhash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 cells is darker than its right neighbour. Images without texture hash alike."""
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    levels = np.asarray(grey)
    return int.from_bytes(np.packbits(levels[:, :-1] < levels[:, 1:]).tobytes(), "big")


def near_duplicates(hashes: Iterable[int]) -> list[NDArray[np.int64]]:
    """Groups of two or more positions, each sorted, that are connected by chains of hashes at most 3 bits apart.

    Memory is a few arrays of N; time grows with N as long as few hashes share 16 bits, at worst with N squared.
    """
    codes, code_of = np.unique(np.fromiter(hashes, dtype=np.uint64), return_inverse=True)
    groups = np.arange(len(codes))
    for band in range(NUM_BANDS):
        keys = codes >> np.uint64(band * BAND_BITS) & np.uint64((1 << BAND_BITS) - 1)
        order = np.argsort(keys, kind="stable")
        sorted_codes, sorted_keys = codes[order], keys[order]
        first, step = np.arange(len(codes)), 0
        while len(first):  # codes of one key stand together: compare each with the next, the next but one, ...
            step += 1
            first = first[first + step < len(codes)]
            first = first[sorted_keys[first] == sorted_keys[first + step]]
            near = first[_is_near(sorted_codes[first], sorted_codes[first + step])]
            groups = _joined(groups, order[near], order[near + step])
    by_group = np.argsort(groups[code_of], kind="stable")
    parts = np.split(by_group, np.flatnonzero(np.diff(groups[code_of][by_group])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))


def _is_near(codes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    differing = codes ^ others
    for _ in range(MAX_DISTANCE):
        differing &= differing - np.uint64(1)  # clears the lowest bit that is set; 0 stays 0
    near: NDArray[np.bool_] = differing == 0
    return near


def _joined(groups: NDArray[np.int64], ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups (each member holds the smallest member) after those of every pair have become one."""
    apart = groups[ones] != groups[others]
    if not apart.any():
        return groups
    groups = groups.copy()
    for one, other in zip(ones[apart].tolist(), others[apart].tolist(), strict=True):
        low, high = sorted((_root(groups, one), _root(groups, other)))
        groups[high] = low
    while (groups[groups] != groups).any():
        groups = groups[groups]
    return groups


def _root(groups: NDArray[np.int64], member: int) -> int:
    while groups[member] != member:
        member = int(groups[member])
    return member
