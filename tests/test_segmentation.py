"""Segmentation on drawn textures where the answer is known, against double loops, and on hostile folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_scenes import Scene, quartered_scene, save_mask, textured_scene, write_pairs
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from adaptkit.backbones import load_backbone
from adaptkit.dense import segmentation
from adaptkit.dense.masks import read_mask
from adaptkit.dense.pairs import open_pairs
from adaptkit.dense.segmentation import Head, count_pixels, patch_labels, segmentation_scores
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.probes.linear import predict
from adaptkit.probes.measure import Measurement, compare


def measured(
    backbone: str | Path, data: Path, queries: Path | None = None, seed: int = 0, **options: object
) -> Measurement:
    keywords = {"precision": "fp32", "batch_size": 8, "workers": 0, "device": torch.device("cpu")} | options
    return segmentation.measure(load_backbone(str(backbone)), data, queries, seed=seed, **keywords)  # type: ignore[arg-type]


def quarters(numbers: Iterable[int], px: int = 64, is_true: bool = True) -> list[Scene]:
    return [quartered_scene(number, px, num_classes=4, is_true=is_true) for number in numbers]


@pytest.mark.long
def test_textures_are_learnt(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", quarters(range(12)))
    write_pairs(tmp_path / "test", quarters(range(50, 58)))
    scores = measured("nano", tmp_path).scores
    assert scores["miou"].value > 90
    assert scores["pixel_accuracy"].value > 95
    assert scores["miou"].ci95 is not None
    assert scores["miou"].ci95[0] <= scores["miou"].value <= scores["miou"].ci95[1]


@pytest.mark.long
def test_labels_that_say_nothing_give_chance(vit: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", quarters(range(24), px=32, is_true=False))
    write_pairs(tmp_path / "test", quarters(range(50, 74), px=32, is_true=False))
    scores = measured(vit, tmp_path).scores
    assert 10 < scores["pixel_accuracy"].value < 40  # four classes
    assert scores["miou"].value < 30


def test_a_comparison_is_paired_and_the_same_backbone_gives_the_same(vit: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, [textured_scene(number, 32, num_classes=3) for number in range(8)])
    before, after = measured(vit, tmp_path), measured(vit, tmp_path, batch_size=3)
    deltas = compare(before, after)
    assert deltas.keys() == {"miou", "pixel_accuracy"}
    for delta in deltas.values():
        assert delta is not None
        assert (delta.value, delta.lo, delta.hi) == (0, 0, 0)


def slow_miou(found: list[NDArray[np.uint8]], truth: list[NDArray[np.uint8]]) -> tuple[float, float]:
    """By pixels, one at a time: mean IoU over classes in the truth, and accuracy."""
    both: dict[int, int] = {}
    either: dict[int, int] = {}
    shown: set[int] = set()
    right = total = 0
    for ours, theirs in zip(found, truth, strict=True):
        for row in range(ours.shape[0]):
            for column in range(ours.shape[1]):
                a, b = int(ours[row, column]), int(theirs[row, column])
                if b == 255:
                    continue
                shown.add(b)
                total, right = total + 1, right + (a == b)
                for each in {a, b}:
                    either[each] = either.get(each, 0) + 1
                if a == b:
                    both[a] = both.get(a, 0) + 1
    ious = [both.get(each, 0) / either[each] for each in shown]
    return 100 * sum(ious) / len(ious), 100 * right / total


def test_scores_are_those_of_a_double_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 4, shape).astype(np.uint8) for shape in ((7, 9), (5, 4), (6, 6))]
    truth = [rng.choice([0, 1, 2, 255], ours.shape).astype(np.uint8) for ours in found]  # 3 is found, never true
    truth[0][:] = np.where(truth[0] == 2, 1, truth[0])
    scores = segmentation_scores(np.stack([count_pixels(o, t, 5) for o, t in zip(found, truth, strict=True)]))
    for drawn in ([0, 1, 2], [0, 0, 0], [2, 1, 2]):
        miou, accuracy = slow_miou([found[i] for i in drawn], [truth[i] for i in drawn])
        of_miou, of_accuracy = scores["miou"].of_images, scores["pixel_accuracy"].of_images
        assert of_miou is not None
        assert of_accuracy is not None
        assert of_miou(np.array(drawn)) == pytest.approx(miou)
        assert of_accuracy(np.array(drawn)) == pytest.approx(accuracy)
    assert scores["miou"].value == pytest.approx(slow_miou(found, truth)[0])


def test_a_patch_has_the_class_of_most_of_its_pixels() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, 255, 255], (10, 13)).astype(np.uint8)
    labels = patch_labels(mask, 3, 4, 3)
    for row in range(3):
        for column in range(4):
            inside = [
                int(mask[y, x]) for y in range(10) for x in range(13) if (y * 3 // 10, x * 4 // 13) == (row, column)
            ]
            votes = [inside.count(each) for each in range(3)]
            expected = votes.index(max(votes)) if 2 * inside.count(255) < len(inside) else -1
            assert labels[row, column] == expected
    assert set(np.unique(labels)) > {-1, 0}


def test_classes_are_the_largest_of_bilinear_logits_in_bands_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(6), torch.rand(6) + 0.5, torch.randn(7, 4))
    grid = torch.randn(3, 5, 6)
    flat = predict(((grid - head.mean) / head.scale).reshape(-1, 6), head.weight)
    logits = flat.reshape(3, 5, 4).permute(2, 0, 1)[None]
    expected = F.interpolate(logits, size=(29, 31), mode="bilinear", align_corners=False)[0].argmax(dim=0).numpy()
    assert (head.classes(grid, (29, 31)) == expected).all()
    monkeypatch.setattr(segmentation, "LOGITS_AT_ONCE", 2 * 31 * 4)
    assert (head.classes(grid, (29, 31)) == expected).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_and_with_palettes_are_class_numbers(bits: int, tmp_path: Path) -> None:
    mask = (np.arange(48).reshape(6, 8) % min(2**bits, 6)).astype(np.uint8)
    save_mask(mask, tmp_path / "palette.png", palette=True)
    assert (read_mask(tmp_path / "palette.png") == mask).all()
    grey = Image.fromarray(mask) if bits == 8 else Image.fromarray(mask * (255 // (2**bits - 1)))
    grey = grey.convert("1") if bits == 1 else grey
    grey.save(tmp_path / "grey.png", bits=bits) if bits in (1, 8) else write_grey(mask, bits, tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == mask).all()


def write_grey(mask: NDArray[np.uint8], bits: int, file: Path) -> None:
    """A grey PNG of 2 or 4 bits, which PIL does not write."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = mask.shape
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in mask]
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_a_mask_belongs_to_the_upright_image(vit: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, [textured_scene(number, 32, num_classes=2) for number in range(4)])
    wide = Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "images/turned.jpg", exif=exif)
    save_mask(np.zeros((48, 32), dtype=np.uint8), tmp_path / "masks/turned.png")
    measured(vit, tmp_path)
    save_mask(np.zeros((32, 48), dtype=np.uint8), tmp_path / "masks/turned.png")
    with pytest.raises(DataError, match=r"turned.png: is 48 x 32 px but turned.jpg 32 x 48"):
        measured(vit, tmp_path)


def _no_mask(root: Path) -> None:
    (root / "masks/001.png").unlink()


def _no_image(root: Path) -> None:
    (root / "images/001.png").unlink()


def _other_size(root: Path) -> None:
    save_mask(np.zeros((32, 16), dtype=np.uint8), root / "masks/001.png")


def _colours(root: Path) -> None:
    Image.new("RGB", (32, 32)).save(root / "masks/001.png")


def _deep(root: Path) -> None:
    Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(root / "masks/001.png")


def _jpeg(root: Path) -> None:
    Image.new("L", (32, 32)).save(root / "masks/001.png", format="JPEG")


def _damaged(root: Path) -> None:
    file = root / "masks/001.png"
    content = bytearray(file.read_bytes())
    content[-13] ^= 1  # of the checksum of the pixels
    file.write_bytes(content)


def _bad_image(root: Path) -> None:
    file = root / "images/001.png"
    file.write_bytes(file.read_bytes()[:-300])


def _text(root: Path) -> None:
    (root / "images/001.png").write_text("no image")


def _empty(root: Path) -> None:
    for file in [*root.glob("images/*"), *root.glob("masks/*")]:
        file.unlink()


def _one_class(root: Path) -> None:
    for file in root.glob("masks/*"):
        save_mask(np.where(read_mask(file) > 0, 255, 0).astype(np.uint8), file)


def _nothing_known(root: Path) -> None:
    for file in root.glob("masks/*"):
        mask = np.full((32, 32), 255, dtype=np.uint8)
        mask[0, :2] = 0, 1
        save_mask(mask, file)


def _no_folder(root: Path) -> None:
    (root / "masks").rename(root / "labels")


def _twice(root: Path) -> None:
    Image.new("RGB", (32, 32)).save(root / "images/001.jpg")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_no_mask, r"images/001.png: has no mask masks/001.png"),
        (_no_image, r"masks/001.png: has no image of that name"),
        (_other_size, r"masks/001.png: is 16 x 32 px but 001.png 32 x 32"),
        (_colours, r"masks/001.png: is PNG RGB, but a mask is"),
        (_deep, r"masks/001.png: is PNG I;16, but a mask is"),
        (_jpeg, r"masks/001.png: is JPEG L, but a mask is"),
        (_damaged, r"masks/001.png: the pixels are damaged"),
        (_bad_image, r"images/001.png: .*; mend"),
        (_text, r"images/001.png: not a readable image file; mend"),
        (_empty, r"no pair of images/NAME.jpg and masks/NAME.png"),
        (_one_class, r"masks: the masks have only class 0"),
        (_nothing_known, r"no patch of the 3 training images has a class"),
        (_no_folder, r"masks: no such folder"),
        (_twice, r"images/001.png: 001.jpg has the same name"),
    ],
)
def test_hostile_folders_are_refused_in_one_line(
    break_it: Callable[[Path], None], message: str, vit: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path, [textured_scene(number, 32, num_classes=2) for number in range(6)])
    break_it(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        measured(vit, tmp_path)
    assert "\n" not in str(caught.value)


def test_test_masks_have_the_classes_of_the_training_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", [textured_scene(number, 32, num_classes=2) for number in range(4)])
    write_pairs(tmp_path / "test", [textured_scene(number, 32, num_classes=2) for number in range(4)])
    assert open_pairs(tmp_path, None, 0).num_classes == 2
    assert len(open_pairs(tmp_path / "train", tmp_path / "test", 0).test) == 4
    save_mask(np.full((32, 32), 7, dtype=np.uint8), tmp_path / "test/masks/002.png")
    with pytest.raises(DataError, match=r"002.png: has class 7, but those of the training masks are 0 to 1; "):
        open_pairs(tmp_path, None, 0)
    with pytest.raises(DataError, match="has train/ and test/ inside"):
        open_pairs(tmp_path, tmp_path / "test", 0)


def test_the_split_follows_the_seed_and_never_overlaps(tmp_path: Path) -> None:
    write_pairs(tmp_path, [textured_scene(number, 32, num_classes=2) for number in range(9)])
    one, same, other = (open_pairs(tmp_path, None, seed) for seed in (0, 0, 1))
    assert (one.train, one.test) == (same.train, same.test)
    assert one.train != other.train
    assert (len(one.train), len(one.test)) == (5, 4)
    assert not set(one.train) & set(one.test)


def test_wrong_options_and_networks_without_tokens_are_refused(vit: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, [textured_scene(number, 32, num_classes=2) for number in range(4)])
    with pytest.raises(UsageError, match=r"unknown precision 'fp23', use one of .*; did you mean"):
        measured(vit, tmp_path, precision="fp23")
    own = load_backbone(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4)))
    with pytest.raises(BackboneError, match="has no patch tokens"):
        segmentation.measure(
            own, tmp_path, None, seed=0, precision="fp32", batch_size=2, workers=0, device=torch.device("cpu")
        )
