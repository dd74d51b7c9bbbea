"""What is known of images beside their pixels: classes, and a table of attributes, as yes-or-no properties."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.errors import DataError
from adaptkit.language.images import Collection
from adaptkit.probes.codes import Codes
from adaptkit.probes.gain import LEVEL, NUM_SHUFFLES, family_gains, usable
from adaptkit.sources.lists import read_table, refuse_pipe
from adaptkit.sources.source import shown

MAX_VALUES = 200  # of a column of words; more are names of single images
MAX_COLUMNS, MAX_PROPERTIES = 1_000, 2_000  # each property takes part in every shuffle
MAX_HEADER = 1 << 20  # characters
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Properties:
    """N images of a collection, and which of A properties each has."""

    images: Collection
    names: tuple[str, ...]
    has: Codes  # (N, A) bool
    unmatched: int = 0  # rows of the table of no image that is described


def class_properties(images: Collection) -> Properties:
    """One class against all others, for every class."""
    names = sorted({name for name in images.classes if name is not None})
    has = np.array([[each == name for name in names] for each in images.classes])
    return Properties(images, tuple(f"class {name}" for name in names), has)


def read_attributes(file: str | Path, images: Collection) -> Properties:
    """A CSV with a column `path` (as in a list of images) and one or more of attributes.

    A column of numbers with more than two values becomes "above" its quartiles, any other one property for each value.
    Raises `DataError` when there is no such column, a gap, an image listed twice, no listed image among those that are
    described, words that nearly every image has for itself, or more columns or properties than can be tested.
    """
    file = Path(file)
    columns = attribute_names(file)
    row_of = {name: row for row, name in enumerate(images.files)}
    cells: dict[int, Sequence[str]] = {}
    unmatched, seen = 0, set()
    for where, (path, *values) in read_table(file, ("path", *columns)):
        place = os.path.abspath(file.parent / path)
        if place in seen:
            raise DataError(f"{where}: {shown(path)} is listed twice; keep one")
        seen.add(place)
        if place in row_of:
            cells[row_of[place]] = values
        else:
            unmatched += 1
    if not cells:
        raise DataError(
            f"{shown(file)}: none of its {unmatched} images is among the {len(images)} that are described; "
            "paths are relative to the table's folder, and large sets are sampled"
        )
    rows = sorted(cells)
    found: dict[str, Codes] = {}
    for number, column in enumerate(columns):
        found |= _split(file, column, [cells[row][number] for row in rows])
        if len(found) > MAX_PROPERTIES:
            raise DataError(f"{shown(file)}: makes more than {MAX_PROPERTIES:,} properties; leave out some columns")
    if not found:
        raise DataError(f"{shown(file)}: every attribute is the same for all {len(rows)} images described")
    has = np.stack(list(found.values()), axis=1)
    return Properties(images.subset(np.array(rows)), tuple(found), has, unmatched)


def attribute_names(file: Path) -> list[str]:
    """The header without `path`; `read_table` then says what is wrong with the rest."""
    refuse_pipe(file)
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            header = [word.strip() for word in next(csv.reader([lines.readline(MAX_HEADER)]), [])]
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(file)}: cannot be read as a table of attributes ({reason}); save it as .csv") from None
    columns = [word for word in header if word and word != "path"]
    if "path" not in header or not columns:
        raise DataError(f"{shown(file)}: needs the header path,ATTRIBUTE,... with one attribute or more")
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{shown(file)}: has {len(columns):,} attributes, at most {MAX_COLUMNS:,} can be tested; leave some out"
        )
    return columns


def _split(file: Path, column: str, values: Sequence[str]) -> dict[str, Codes]:
    """(N,) cells -> (N,) bool for each property that some images have and some have not."""
    distinct = sorted(set(values))
    numbers = _as_numbers(values)
    if numbers is not None and len(distinct) > 2:
        cuts = sorted({float(np.quantile(numbers, share)) for share in QUARTILES})
        split = {f"{column} > {text}": numbers > cut for cut, text in zip(cuts, _apart(cuts), strict=True)}
    elif len(distinct) > MAX_VALUES:
        raise DataError(
            f"{shown(file)}: column {shown(column)} has {len(distinct)} different words, at most {MAX_VALUES} can be "
            "properties; leave it out or group them"
        )
    else:
        words = np.array(values, dtype=object)
        split = {f"{column} {value}": words == value for value in distinct}
    return {name: has for name, has in split.items() if 0 < has.sum() < len(has)}


def _apart(cuts: Sequence[float]) -> list[str]:
    """Each with 4 digits, or in full where these do not tell them apart."""
    short = [f"{cut:.4g}" for cut in cuts]
    return short if len(set(short)) == len(cuts) else [repr(cut) for cut in cuts]


def _as_numbers(values: Sequence[str]) -> np.ndarray | None:
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def best_properties(properties: Properties, families: int, seed: int) -> tuple[dict[str, Any], list[Any]]:
    """(facts of the family, of each bit {name, gain, p, ones_with, ones_without} of the property it tells most about).

    With `families` tables of properties each gets its share of the 5 %.
    """
    enough = usable(properties.has)
    facts: dict[str, Any] = {
        "num_images": len(properties.images),
        "unmatched": properties.unmatched,
        "num_properties": int(enough.sum()),
        "left_out": [name for name, kept in zip(properties.names, enough, strict=True) if not kept],
        "shuffles": NUM_SHUFFLES,
    }
    codes = properties.images.codes
    if not enough.any():
        return facts | {"threshold": None, "num_significant": 0}, [None] * codes.shape[1]
    names = [name for name, kept in zip(properties.names, enough, strict=True) if kept]
    has = properties.has[:, enough]
    gains = family_gains(codes, has, seed, level=LEVEL / families)
    best = []
    for bit, choice in enumerate(gains.gain.argmax(axis=1).tolist()):
        one, with_it = codes[:, bit], has[:, choice]
        best.append(
            {
                "name": names[choice],
                "gain": float(gains.gain[bit, choice]),
                "p": min(1.0, families * float(gains.p[bit, choice])),
                "ones_with": float(one[with_it].mean()),
                "ones_without": float(one[~with_it].mean()),
            }
        )
    significant = sum(each["p"] <= LEVEL for each in best)
    return facts | {"threshold": gains.threshold, "num_significant": significant}, best
