"""Images with boxes: `boxes.csv`, Pascal VOC's `Annotations/*.xml`, or COCO's `annotations/*.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from adaptkit.backbones.reading import line
from adaptkit.dense.boxes import Boxes
from adaptkit.errors import DataError, MachineError
from adaptkit.sources import BadImage, upright_size
from adaptkit.sources.lists import locate, read_table
from adaptkit.sources.source import shown

COLUMNS = ("path", "x0", "y0", "x1", "y1")
MAX_XML_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 30  # COCO's largest has 449 MB
SLACK_PX = 1.0  # boxes that reach this far out of their image were rounded: they are cut off at its edge

Box = tuple[float, float, float, float]
Listed = dict[str, tuple[Path, list[tuple[str, Box]]]]
"""By path as listed: the file, and every box with where it stands, for messages."""


@dataclass(frozen=True, eq=False)
class Boxed:
    """One image and what is in it."""

    name: str
    file: Path
    width: int  # of the upright image
    height: int
    boxes: Boxes  # (t, 4), t may be 0


def open_boxed(data: Path) -> tuple[list[Boxed], tuple[tuple[str, str], ...]]:
    """The images of `data` by name, and (name, reason) of those that cannot be read.

    Pixels count from 0 in the upright image; x1 and y1 lie just outside. VOC's count from 1 and are inclusive. In a
    CSV paths are relative to it, as everywhere; images it does not list are left out. Boxes of crowds (COCO) are left
    out. Of several layouts the first counts: CSV, VOC, COCO. Raises `DataError`, `MachineError`.
    """
    listed = _reader(data)(data)
    if not any(boxes for _, boxes in listed.values()):
        raise DataError(f"{shown(data)}: its {len(listed)} images have no box at all; nothing can be scored")
    images, failures = [], []
    for name, (file, boxes) in sorted(listed.items()):
        try:
            width, height = upright_size(file)
        except BadImage as bad:
            failures.append((name, bad.reason))
            continue
        inside = [_inside(box, width, height, where) for where, box in boxes]
        images.append(Boxed(name, file, width, height, np.array(inside, dtype=np.float64).reshape(-1, 4)))
    return images, tuple(failures)


def _reader(data: Path) -> Callable[[Path], Listed]:
    if not os.path.isdir(data):
        raise DataError(f"{shown(data)}: no such folder; it holds images and their boxes")
    if os.path.exists(data / "boxes.csv"):
        return _read_csv
    if _files(data / "Annotations", ".xml"):
        return _read_voc
    if _files(data / "annotations", ".json"):
        return _read_coco
    raise DataError(
        f"{shown(data)}: no boxes.csv ({','.join(COLUMNS)}), Annotations/*.xml (VOC) or annotations/*.json (COCO)"
    )


def _files(folder: Path, suffix: str) -> list[Path]:
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise MachineError(f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions") from None
    files = [folder / name for name in sorted(names) if name.lower().endswith(suffix) and not name.startswith(".")]
    return [file for file in files if os.path.isfile(file)]  # a pipe would be waited for


def _read_csv(data: Path) -> Listed:
    file, listed = data / "boxes.csv", Listed()
    for where, (path, *cells) in read_table(file, COLUMNS):
        if path not in listed:
            locate(path, data, data, where)
            listed[path] = data / path, []
        listed[path][1].append((where, _box(cells, where)))
    if not listed:
        raise DataError(f"{shown(file)}: lists no box")
    return listed


def _read_voc(data: Path) -> Listed:
    listed = Listed()
    for file in _files(data / "Annotations", ".xml"):
        root = _parse_xml(file)
        path = (root.findtext("filename") or f"{file.stem}.jpg").strip()
        if path in listed:
            raise DataError(f"{shown(file)}: {shown(path)[:200]!r} has a second file of boxes; keep one")
        listed[path] = _image(path, [data / "JPEGImages", data / "images"], shown(file)), []
        for number, element in enumerate(root.iter("object"), start=1):
            where = f"{shown(file)} object {number}"
            x0, y0, x1, y1 = (element.findtext(f"bndbox/{name}") or "" for name in ("xmin", "ymin", "xmax", "ymax"))
            box = _box((x0, y0, x1, y1), where, first=1)
            listed[path][1].append((where, box))
    return listed


def _parse_xml(file: Path) -> ElementTree.Element:
    """A document of its own type could define entities that grow without end, or that are files: it is refused."""
    try:
        if file.stat().st_size > MAX_XML_BYTES:
            raise DataError(f"{shown(file)}: is larger than {MAX_XML_BYTES} bytes; no image has so many boxes")
        text = file.read_text(encoding="utf-8-sig")
        if "<!DOCTYPE" in text:
            raise DataError(f"{shown(file)}: defines a document type; remove it, VOC's annotations have none")
        return ElementTree.fromstring(text)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{shown(file)}: cannot be read as VOC XML ({line(error)}); save it anew, as UTF-8") from None


def _read_coco(data: Path) -> Listed:
    file = _coco_file(data)
    document = _parse_json(file)
    folders = [data / "images", data / file.stem.rpartition("_")[2]]  # instances_val2017.json goes with val2017/
    listed, names = Listed(), dict[int, str]()
    for number, image in enumerate(_entries(document, "images", file)):
        where = f"{shown(file)} images[{number}]"
        path, key = image.get("file_name"), image.get("id")
        if not isinstance(path, str) or type(key) is not int:
            raise DataError(f"{where}: needs a file_name and a whole number as id")
        if path in listed or key in names:
            raise DataError(f"{where}: {shown(path)[:200]!r} or id {str(key)[:40]} is listed twice; keep one")
        names[key] = path
        listed[path] = _image(path, folders, where), []
    for number, entry in enumerate(_entries(document, "annotations", file)):
        where = f"{shown(file)} annotations[{number}]"
        values, key = entry.get("bbox"), entry.get("image_id")
        if type(key) is not int or key not in names:
            raise DataError(f"{where}: image_id {shown(repr(key))[:40]} is none of the images")
        if not isinstance(values, list) or len(values) != 4:
            raise DataError(f"{where}: bbox must be x, y, width, height")
        if not entry.get("iscrowd"):
            x, y, width, height = (_number(value, where) for value in values)
            listed[names[key]][1].append((where, _box((x, y, x + width, y + height), where)))
    return listed


def _coco_file(data: Path) -> Path:
    files = _files(data / "annotations", ".json")
    instances = [file for file in files if file.name.startswith("instances_")]
    chosen = files if len(files) == 1 else instances
    if len(chosen) != 1:
        raise DataError(
            f"{shown(data / 'annotations')}: {len(files)} .json files, {len(instances)} of them instances_*; "
            "keep the one whose boxes are meant"
        )
    return chosen[0]


def _parse_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{shown(file)}: is larger than {MAX_JSON_BYTES} bytes; split it")
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown(file)}: cannot be read as COCO JSON ({line(error)}); save it anew") from None
    if not isinstance(document, dict):
        raise DataError(f"{shown(file)}: must hold an object with images and annotations")
    return document


def _entries(document: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{shown(file)}: {key} must be a list of objects")
    return entries


def _image(path: str, folders: list[Path], where: str) -> Path:
    """The file in the first of the folders that has it; a path must not lead out of them."""
    if not path or "\0" in path or os.path.isabs(path) or ".." in Path(path).parts:
        raise DataError(f"{where}: {shown(path)[:200]!r} is no file name inside {shown(folders[0])}")
    for folder in folders:
        if os.path.isfile(folder / path):
            return folder / path
    raise DataError(f"{where}: no such image {shown(folders[0] / path)[:300]}")


def _box(values: Iterable[object], where: str, first: int = 0) -> Box:
    """Numbers as written -> a box; `first`: what the first pixel is called, which makes the last one inclusive."""
    x0, y0, x1, y1 = (_number(value, where) for value in values)
    x0, y0 = x0 - first, y0 - first
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} is empty; x0 < x1 and y0 < y1 must hold")
    return x0, y0, x1, y1


def _number(value: object, where: str) -> float:
    text = str(value) if isinstance(value, str | int | float) else type(value).__name__
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise DataError(f"{where}: {shown(text[:40])!r} is no number of pixels")
    return number


def _inside(box: Box, width: int, height: int, where: str) -> Box:
    x0, y0, x1, y1 = box
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if max(abs(a - b) for a, b in zip(box, cut, strict=True)) > SLACK_PX or cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise DataError(f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} lies outside its image of {width} x {height} px")
    return cut
