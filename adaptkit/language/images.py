"""The images that are described: a sample of the target, and labelled images where there are any."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptkit.embedding import Embeddings
from adaptkit.probes.codes import Codes
from adaptkit.recipe import Recipe
from adaptkit.sources import FolderSource, has_class_folders, open_images, open_labelled

MAX_IMAGES = 5_000  # of the target, and of the gallery
MAX_QUERIES = 2_000


@dataclass(frozen=True, eq=False)
class Coded:
    """N readable images of a source: embeddings, and the head's logits whose sign is the bit."""

    source: FolderSource
    embeddings: Embeddings
    logits: Tensor  # (N, B) float32

    @property
    def bits(self) -> Tensor:
        """(N, B) bool: the same bits as those of `adaptkit embed --codes`."""
        return self.logits > 0

    @cached_property
    def positions(self) -> list[int]:
        """Of each row in the source: images that could not be read have no row."""
        numbers = {self.source.path(index): index for index in range(len(self.source))}
        return [numbers[path] for path in self.embeddings.paths]

    @property
    def classes(self) -> list[str | None]:
        """The class of each row; None without labels."""
        names, labels = self.embeddings.class_names, self.embeddings.labels
        return [names[label] for label in labels.tolist()] if names and labels is not None else [None] * len(self)

    def __len__(self) -> int:
        return len(self.logits)


@dataclass(frozen=True, eq=False)
class Sets:
    """What is measured on: `target` for the code itself, `gallery` and `queries` for retrieval."""

    target: Coded
    gallery: Coded | None
    queries: Coded | None
    num_target: int  # images before sampling
    labels: str | None

    @property
    def everything(self) -> Collection:
        """All of them, each file once, the labelled ones first."""
        return Collection.of([each for each in (self.gallery, self.queries, self.target) if each is not None])


@dataclass(frozen=True, eq=False)
class Collection:
    """Images of several sets. `where` is (which set, its row) of each."""

    sets: tuple[Coded, ...]
    where: NDArray[np.int64]  # (N, 2)
    files: tuple[str, ...]  # absolute
    classes: tuple[str | None, ...]

    @classmethod
    def of(cls, sets: Sequence[Coded]) -> Collection:
        """Every file once, as the first set that holds it knows it."""
        where, files, classes = [], dict[str, None](), []
        for number, each in enumerate(sets):
            for row, (path, name) in enumerate(zip(each.embeddings.paths, each.classes, strict=True)):
                file = os.path.abspath(each.source.root / path)
                if file not in files:
                    files[file] = None
                    where.append((number, row))
                    classes.append(name)
        return cls(tuple(sets), np.array(where, dtype=np.int64), tuple(files), tuple(classes))

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def logits(self) -> Tensor:
        """(N, B)."""
        return torch.stack([self.sets[number].logits[row] for number, row in self.where.tolist()])

    @property
    def codes(self) -> Codes:
        """(N, B) bool."""
        codes: Codes = (self.logits > 0).numpy()
        return codes

    @property
    def labelled(self) -> Collection:
        """Those with a class."""
        return self.subset(np.flatnonzero([name is not None for name in self.classes]))

    def subset(self, rows: NDArray[np.int64]) -> Collection:
        """These rows, in this order."""
        files, classes = (tuple(values[row] for row in rows) for values in (self.files, self.classes))
        return Collection(self.sets, self.where[rows], files, classes)

    def drawn(self, limit: int, seed: int) -> Collection:
        """At most `limit` of them, drawn by the seed, in their order."""
        return self if len(self) <= limit else self.subset(draw(len(self), limit, seed))

    def path(self, row: int) -> str:
        """Relative to the root of its source."""
        number, place = self.where[row].tolist()
        path: str = self.sets[number].embeddings.paths[place]
        return path

    def place(self, row: int) -> tuple[FolderSource, int]:
        """The source and the position to read the image from."""
        number, place = self.where[row]
        return self.sets[number].source, self.sets[number].positions[place]


def open_sets(
    recipe: Recipe, data: Sequence[str], labels: str | None, seed: int, code: Callable[[FolderSource], Coded]
) -> Sets:
    """Sample and embed. Without `data` the run's own images; without `labels` see `_labels_of`. Raises `DataError`."""
    labels = labels or _labels_of(recipe, data)
    source = open_images(list(data) or list(recipe.data.path), recipe.data.scale)
    labelled = open_labelled(labels, scale=recipe.data.scale) if labels else None
    return Sets(
        target=code(_sample(source, MAX_IMAGES, seed)),
        gallery=code(_sample(labelled.gallery, MAX_IMAGES, seed)) if labelled else None,
        queries=code(_sample(labelled.queries, MAX_QUERIES, seed)) if labelled else None,
        num_target=len(source),
        labels=labels,
    )


def _labels_of(recipe: Recipe, data: Sequence[str]) -> str | None:
    """The run's own labels, unless other images were named; else the class folders of the images; else none."""
    if not data and recipe.labels:
        return str(recipe.labels)
    places = list(data) or list(recipe.data.path)
    if len(places) == 1 and Path(places[0]).is_dir() and has_class_folders(places[0]):
        return str(places[0])
    return None


def _sample(source: FolderSource, limit: int, seed: int) -> FolderSource:
    return source if len(source) <= limit else source.subset(draw(len(source), limit, seed))


def draw(count: int, limit: int, seed: int) -> NDArray[np.int64]:
    """`limit` of `count` positions, ascending, by the seed."""
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def known_again(known: Coded, source: FolderSource) -> Coded | None:
    """Images that are all among the known ones, as another source names and labels them; None when some are not.

    Those that could not be read are left out, and counted once, with the known ones.
    """
    before, files = _files(known.source), _files(source)
    if not set(files) <= set(before):
        return None
    row_of = {before[place]: row for row, place in enumerate(known.positions)}
    places = [place for place, file in enumerate(files) if file in row_of]
    rows, names = [row_of[files[place]] for place in places], source.class_names
    embeddings = Embeddings(
        vectors=known.embeddings.vectors[rows],
        labels=torch.tensor([source.label(place) for place in places]) if names else None,
        class_names=names,
        paths=tuple(source.path(place) for place in places),
    )
    return Coded(source, embeddings, known.logits[rows])


def _files(source: FolderSource) -> list[str]:
    return [os.path.abspath(source.root / source.path(index)) for index in range(len(source))]


@torch.inference_mode()
def logits_of(head: nn.Module, vectors: Tensor) -> Tensor:
    """(N, D) -> (N, B) float32 on the CPU."""
    logits: Tensor = head.to("cpu")(vectors.float())
    return logits
