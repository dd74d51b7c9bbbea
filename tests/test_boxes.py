"""Intersection over union, CorLoc and AP50 against loops; images with boxes in all layouts, sound and hostile."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import refused
from PIL import Image

from adaptkit.dense.annotations import open_boxed
from adaptkit.dense.boxes import Boxes, Found, ap50, iou, is_found, right_ones
from adaptkit.errors import DataError


def random_boxes(rng: np.random.Generator, count: int) -> Boxes:
    corner = rng.uniform(0, 6, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 6, (count, 2))], axis=1)


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Counted on a fine grid of points."""
    ticks = (np.arange(120) + 0.5) / 10
    inside = [((ticks >= c[0]) & (ticks < c[2]))[None] & ((ticks >= c[1]) & (ticks < c[3]))[:, None] for c in (a, b)]
    return float((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum())


def slow_ap50(images: list[Found]) -> float:
    """Every threshold of the score anew: match greedily, count, and read the precision at 101 recalls."""
    total = sum(len(image.truth) for image in images)
    points = []
    for threshold in sorted({float(score) for image in images for score in image.scores}):
        hits = misses = 0
        for image in images:
            free = list(range(len(image.truth)))
            for index in sorted(range(len(image.boxes)), key=lambda i: (-image.scores[i], i)):
                if image.scores[index] < threshold:
                    continue
                overlaps = [(iou(image.boxes[[index]], image.truth[[j]])[0, 0], -j) for j in free]
                if overlaps and max(overlaps)[0] >= 0.5:
                    free.remove(-max(overlaps)[1])
                    hits += 1
                else:
                    misses += 1
        points.append((hits, hits / (hits + misses)))
    best = [max((p for hits, p in points if 100 * hits >= r * total), default=0.0) for r in range(101)]
    return 100 * sum(best) / 101


def test_iou_against_counting_points() -> None:
    rng = np.random.default_rng(0)
    first, second = (np.round(random_boxes(rng, n), 1) for n in (3, 4))
    fast = iou(first, second)
    for i in range(3):
        for j in range(4):
            assert fast[i, j] == pytest.approx(slow_iou(first[i], second[j]), abs=1e-9)


def test_found_means_an_iou_above_a_half() -> None:
    truth = np.array([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    assert not is_found(np.array([[0.0, 0, 5, 10]]), truth)  # 0.5 exactly
    assert is_found(np.array([[0.0, 0, 6, 10]]), truth)
    assert not is_found(np.array([[0.0, 0, 6, 10]]), np.zeros((0, 4)))


def test_a_true_box_is_taken_once_and_by_the_best_score() -> None:
    truth = np.array([[0.0, 0, 10, 10]])
    found = Found(np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 5]]), np.array([0.2, 0.9, 0.1]), truth)
    assert right_ones(found).tolist() == [False, True, False]
    only_half = Found(found.boxes[2:], found.scores[2:], truth)
    assert right_ones(only_half).tolist() == [True]  # COCO takes 0.5 itself


def random_images(rng: np.random.Generator, levels: int) -> list[Found]:
    images = []
    for _ in range(12):
        truth = random_boxes(rng, int(rng.integers(0, 4)))
        boxes = np.concatenate([truth + rng.normal(0, 0.5, truth.shape), random_boxes(rng, int(rng.integers(0, 2)))])
        boxes = np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 0.1)], axis=1)
        images.append(Found(boxes, rng.integers(0, levels, len(boxes)) / levels, truth))
    return images


@pytest.mark.parametrize("levels", [3, 1000])
def test_ap50_against_a_slow_version_on_drawn_images(levels: int) -> None:
    """With three levels most scores are equal."""
    rng = np.random.default_rng(levels)
    images = random_images(rng, levels)
    fast = ap50(images)
    for _ in range(5):
        drawn = rng.integers(0, len(images), len(images))
        assert fast(drawn) == pytest.approx(slow_ap50([images[i] for i in drawn]))
    assert fast(np.arange(len(images))) == fast(np.arange(len(images))[::-1])


def test_ap50_of_nothing() -> None:
    truth, none = np.array([[0.0, 0, 10, 10]]), Found(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4)))
    fast = ap50([none, Found(none.boxes, none.scores, truth), Found(truth, np.ones(1), truth)])
    assert math.isnan(fast(np.array([0, 0])))
    assert fast(np.array([1])) == 0
    assert fast(np.array([2])) == 100
    assert fast(np.array([0, 1, 2])) == pytest.approx(100 * 51 / 101)  # recalls 0 to 50 %


def write_images(folder: Path, *names: str, size: tuple[int, int] = (40, 30)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, "grey").save(folder / name)


def write_csv(data: Path, *rows: str) -> Path:
    write_images(data / "images", "a.png", "b.png")
    (data / "boxes.csv").write_text("\n".join(["path,x0,y0,x1,y1", *rows]) + "\n", encoding="utf-8")
    return data


VOC = "<annotation><filename>a.png</filename>{}</annotation>"
OBJECT = (
    "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_voc(data: Path, text: str, encoding: str = "utf-8") -> Path:
    write_images(data / "JPEGImages", "a.png")
    (data / "Annotations").mkdir()
    (data / "Annotations" / "a.xml").write_text(text, encoding=encoding)
    return data


def write_coco(data: Path, document: object) -> Path:
    write_images(data / "val2017", "a.png", "b.png")
    (data / "annotations").mkdir()
    text = document if isinstance(document, str) else json.dumps(document)
    (data / "annotations" / "instances_val2017.json").write_text(text, encoding="utf-8")
    (data / "annotations" / "captions_val2017.json").write_text("{}", encoding="utf-8")
    return data


def coco(*annotations: dict[str, object]) -> dict[str, object]:
    return {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "annotations": list(annotations),
    }


def test_the_three_layouts_say_the_same(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "csv", "images/a.png,1,2,11,12", "images/a.png,20,5,40.5,29.5")
    voc = write_voc(tmp_path / "voc", VOC.format(OBJECT.format(2, 3, 11, 12) + OBJECT.format(21, 6, 40.5, 29.5)))
    boxes = [{"image_id": 7, "bbox": [1, 2, 10, 10]}, {"image_id": 7, "bbox": [20, 5, 20.5, 24.5]}]
    crowd = {"image_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    documents = write_coco(tmp_path / "coco", coco(*boxes, crowd))
    for data in (table, voc, documents):
        images, failures = open_boxed(data)
        assert failures == ()
        assert (images[0].width, images[0].height, images[0].file.name) == (40, 30, "a.png")
        assert images[0].boxes.tolist() == [[1, 2, 11, 12], [20, 5, 40, 29.5]]  # half a pixel outside is cut off
    assert [len(image.boxes) for image in open_boxed(documents)[0]] == [2, 0]


def test_boxes_belong_to_the_upright_image(tmp_path: Path) -> None:
    data = write_csv(tmp_path, "images/c.jpg,1,2,28,39")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(data / "images" / "c.jpg", exif=exif)
    (image,), _ = open_boxed(data)
    assert (image.width, image.height) == (30, 40)


def test_an_unreadable_image_is_left_out(tmp_path: Path) -> None:
    data = write_csv(tmp_path, "images/a.png,1,2,11,12", "images/b.png,1,2,11,12")
    (data / "images" / "a.png").write_bytes(b"no image")
    images, failures = open_boxed(data)
    assert [image.name for image in images] == ["images/b.png"]
    assert failures == (("images/a.png", "not a readable image file"),)


def with_pipe(data: Path, name: str) -> Path:
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(data / name)
    return data


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]>' + VOC.format("&c;")


@pytest.mark.parametrize(
    ("words", "write"),
    [
        ("no such folder", lambda data: data),
        ("no boxes.csv", lambda data: (data.mkdir(), data)[1]),
        ("line 2: the box 1,2,1,12 is empty", lambda data: write_csv(data, "images/a.png,1,2,1,12")),
        ("lies outside its image of 40 x 30 px", lambda data: write_csv(data, "images/a.png,1,2,42,12")),
        ("lies outside its image", lambda data: write_csv(data, "images/a.png,-3,2,11,12")),
        ("lies outside its image", lambda data: write_csv(data, "images/a.png,40,2,41,12")),
        ("no such file", lambda data: write_csv(data, "images/c.png,1,2,11,12")),
        ("'wide' is no number of pixels", lambda data: write_csv(data, "images/a.png,1,2,wide,12")),
        ("'nan' is no number", lambda data: write_csv(data, "images/a.png,1,2,nan,12")),
        ("'1e999' is no number", lambda data: write_csv(data, "images/a.png,1,2,1e999,12")),
        ("lists no box", lambda data: write_csv(data)),
        ("needs a path and a x0", lambda data: write_csv(data, "images/a.png,1,2")),
        ("boxes.csv: is a pipe or a device", lambda data: with_pipe(data, "boxes.csv")),
        ("no boxes.csv", lambda data: with_pipe(data, "Annotations/a.xml")),
        ("no boxes.csv", lambda data: with_pipe(data, "annotations/a.json")),
        ("have no box at all", lambda data: write_voc(data, VOC.format(""))),
        ("defines a document type", lambda data: write_voc(data, BOMB)),
        ("cannot be read as VOC XML", lambda data: write_voc(data, BOMB, encoding="utf-16")),
        ("save it anew, as UTF-8", lambda data: write_voc(data, VOC[:30])),
        ("cannot be read as VOC XML", lambda data: write_voc(data, VOC.format("\0"))),
        ("cannot be read as VOC XML", lambda data: write_voc(data, VOC.format("&lol;"))),
        ("larger than", lambda data: write_voc(data, VOC.format(" " * (1 << 20)))),
        ("no file name inside", lambda data: write_voc(data, VOC.format("").replace("a.png", "../a.png"))),
        ("no such image", lambda data: write_voc(data, VOC.format("").replace("a.png", "b.png"))),
        ("object 1: '' is no number", lambda data: write_voc(data, VOC.format("<object/>"))),
        ("object 1: the box 8,2,5,12 is empty", lambda data: write_voc(data, VOC.format(OBJECT.format(9, 3, 5, 12)))),
        ("cannot be read as COCO JSON", lambda data: write_coco(data, "{")),
        ("cannot be read as COCO JSON", lambda data: write_coco(data, "[" * 200_000)),
        ("must hold an object", lambda data: write_coco(data, [])),
        ("images must be a list", lambda data: write_coco(data, {"annotations": []})),
        ("id 7 is listed twice", lambda data: write_coco(data, coco() | {"images": coco()["images"] * 2})),
        ("image_id 8 is none", lambda data: write_coco(data, coco({"image_id": 8, "bbox": [1, 2, 3, 4]}))),
        ("image_id True is none", lambda data: write_coco(data, coco({"image_id": True, "bbox": [1, 2, 3, 4]}))),
        ("bbox must be", lambda data: write_coco(data, coco({"image_id": 7, "bbox": [1, 2, 3]}))),
        ("'list' is no number", lambda data: write_coco(data, coco({"image_id": 7, "bbox": [1, 2, 3, []]}))),
        ("is empty", lambda data: write_coco(data, coco({"image_id": 7, "bbox": [1, 2, 0, 4]}))),
        ("is no number", lambda data: write_coco(data, coco({"image_id": 7, "bbox": [1, 2, 10**400, 4]}))),
        ("have no box at all", lambda data: write_coco(data, coco())),
        ("needs a file_name", lambda data: write_coco(data, coco() | {"images": [{"id": 1, "file_name": 3}]})),
        ("no such image", lambda data: write_coco(data, coco() | {"images": [{"id": 1, "file_name": "z.png"}]})),
    ],
)
def test_hostile_data_is_refused_in_one_line(tmp_path: Path, words: str, write: Callable[[Path], Path]) -> None:
    data = write(tmp_path / "data")
    refused(DataError, 3, words, lambda: open_boxed(data))
