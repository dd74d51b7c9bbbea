"""Near-duplicates: the hash survives what copies go through, and the groups equal those of a double loop."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from conftest import draw_image, picture
from PIL import Image, ImageEnhance
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from adaptkit.sources import dhash, near_duplicates


def slow_groups(hashes: list[int]) -> list[list[int]]:
    """Every pair compared, groups by painting."""
    colour = list(range(len(hashes)))
    for one in range(len(hashes)):
        for other in range(one):
            if (hashes[one] ^ hashes[other]).bit_count() <= 3:
                low, high = sorted((colour[one], colour[other]))
                colour = [low if value == high else value for value in colour]
    groups = [[index for index, value in enumerate(colour) if value == wanted] for wanted in sorted(set(colour))]
    return [group for group in groups if len(group) > 1]


def groups(hashes: list[int] | np.ndarray) -> list[list[int]]:
    return [group.tolist() for group in near_duplicates(hashes)]


def flipped(rng: np.random.Generator, code: int, num_bits: int) -> int:
    for bit in rng.choice(64, num_bits, replace=False).tolist():
        code ^= 1 << bit
    return code


@pytest.mark.parametrize("seed", range(6))
def test_groups_equal_those_of_a_double_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = [int(code) for code in rng.integers(0, 2**64, 40, dtype=np.uint64)]
    for _ in range(120):  # copies at every distance around the limit, copies of copies, equal ones
        hashes.append(flipped(rng, hashes[rng.integers(len(hashes))], int(rng.integers(0, 7))))
    hashes += [0, 1, 3, 0, 2**64 - 1, 2**64 - 8]
    order = rng.permutation(len(hashes)).tolist()
    hashes = [hashes[index] for index in order]
    assert groups(hashes) == slow_groups(hashes)


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_codes_that_share_most_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = [int(code) << 48 for code in rng.integers(0, 2**16, 150)] + [int(code) for code in rng.integers(0, 99, 30)]
    assert groups(hashes) == slow_groups(hashes)


def test_groups_that_grow_together_late_equal_those_of_a_graph() -> None:
    codes = np.random.default_rng(6).integers(0, 2**22, 5_000).astype(np.uint64) << np.uint64(30)
    num_set = np.array([bits.bit_count() for bits in range(2**16)], dtype=np.uint8)
    differing = (codes[:, None] ^ codes).view(np.uint16).reshape(5_000, 5_000, 4)
    near = sum(num_set[differing[..., part]] for part in range(4)) <= 3
    num_groups, group_of = connected_components(csr_matrix(near), directed=False)
    members = [np.flatnonzero(group_of == group).tolist() for group in range(num_groups)]
    assert groups(codes) == sorted(group for group in members if len(group) > 1)


@pytest.mark.parametrize("bits", [(0, 1, 2), (15, 16, 63), (31, 32, 33), (0, 20, 40), (5, 55, 60)])
def test_three_bits_are_near_and_four_are_not(bits: tuple[int, ...]) -> None:
    code = 0x0123_4567_89AB_CDEF
    three = code ^ sum(1 << bit for bit in bits)
    assert groups([code, 7, three]) == [[0, 2]]
    assert groups([code, 7, three ^ (1 << 48)]) == []


def test_few_or_no_hashes() -> None:
    assert groups([]) == []
    assert groups([5]) == []
    assert groups(np.array([2**64 - 1, 5, 2**64 - 1], dtype=np.uint64)) == [[0, 2]]


def test_twenty_thousand_take_seconds_also_when_many_are_alike() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    hashes[10_000:] = hashes[:10_000] ^ np.left_shift(np.uint64(1), rng.integers(0, 64, 10_000, dtype=np.uint64))
    start = time.perf_counter()
    assert groups(hashes) == [[index, index + 10_000] for index in range(10_000)]
    assert groups(np.zeros(20_000, dtype=np.uint64)) == [list(range(20_000))]
    video = np.left_shift(np.uint64(1), rng.integers(0, 64, (3, 20_000), dtype=np.uint64))
    assert groups(np.bitwise_xor.reduce(video)) == [list(range(20_000))]
    assert time.perf_counter() - start < 30  # 2 s on a free core


def test_hash_is_the_sign_of_the_horizontal_differences() -> None:
    levels = np.random.default_rng(3).integers(0, 256, (8, 9), dtype=np.uint8)
    bits = "".join("1" if row[x] < row[x + 1] else "0" for row in levels.tolist() for x in range(8))
    assert dhash(Image.fromarray(levels)) == int(bits, 2)
    assert dhash(Image.fromarray(levels.repeat(20, axis=0).repeat(30, axis=1)).convert("RGB")) == int(bits, 2)
    assert dhash(Image.new("RGB", (50, 40), "red")) == 0


def test_copies_are_near_and_other_images_are_not() -> None:
    image = draw_image(1, 1, px=160)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    copies = [image, Image.open(stream), image.resize((97, 120)), ImageEnhance.Brightness(image).enhance(0.8)]
    others = [draw_image(label, index, px=160) for label in range(4) for index in range(2, 8)] + [picture(90, 120)]
    assert groups([dhash(image) for image in copies + others])[0] == [0, 1, 2, 3]
    assert len(near_duplicates([dhash(image) for image in copies + others])) == 1
