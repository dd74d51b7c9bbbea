"""Segmentation: a linear head on frozen patch tokens, scored by the overlap of its classes with the true ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adaptkit.backbones import Backbone
from adaptkit.dense.masks import IGNORED, check_size, read_mask
from adaptkit.dense.pairs import Pair, open_pairs
from adaptkit.dense.patches import patch_size
from adaptkit.dense.tokens import TokenReader, Tokens
from adaptkit.errors import DataError
from adaptkit.probes.linear import choose_strength, fit, predict
from adaptkit.probes.measure import Measurement
from adaptkit.probes.score import Score, whole_score

GRID = 32
"""Patches along the short side of a large image: 512 px for patches of 16, 448 for 14; smaller ones keep their size."""
MAX_PATCHES = 1 << 16  # that the head is fitted to: 400 MB of tokens of 1,536 numbers
HELD_OUT = 5  # every fifth training image chooses the strength of the head's decay
LOGITS_AT_ONCE = 1 << 24  # 64 MB


def measure(
    backbone: Backbone,
    data: Path,
    queries: Path | None,
    *,
    seed: int,
    precision: str,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Measurement:
    """`miou` and `pixel_accuracy`, percent, of a linear head fitted to `data` and scored on `queries`.

    Folders hold images/ and masks/ (see `open_pairs`); without `queries`, `data` has train/ and test/ or is halved by
    `seed`, which also draws the patches. Raises `DataError`, `BackboneError`, `UsageError`.
    """
    pairs = open_pairs(data, queries, seed)
    most = GRID * max(patch_size(backbone))
    reader = TokenReader(backbone, most, precision, batch_size, workers, device)
    with reader.ready():
        patches = collect_patches(reader, pairs.train, pairs.num_classes, seed)
        head = Head.fitted(patches, pairs.num_classes)
        counts = [
            count_pixels(head.classes(tokens.grid.cpu(), tokens.size), mask, pairs.num_classes)
            for tokens, mask in _with_masks(reader, pairs.test)
        ]
    return Measurement(segmentation_scores(np.stack(counts)))


@dataclass(frozen=True, eq=False)
class Patches:
    """P labelled patches of several images."""

    tokens: Tensor  # (P, D) float32
    labels: Tensor  # (P,) the class of most of the patch's pixels
    images: Tensor  # (P,) which image a patch is of


def collect_patches(reader: TokenReader, pairs: Sequence[Pair], num_classes: int, seed: int) -> Patches:
    """At most `MAX_PATCHES` patches, as many of each image, drawn by `seed`. Raises `DataError` when there is none."""
    quota = max(MAX_PATCHES // len(pairs), 1)
    generator = torch.Generator().manual_seed(seed)
    tokens, labels, images = [], [], []
    for number, (seen, mask) in enumerate(_with_masks(reader, pairs)):
        rows, columns = seen.grid.shape[:2]
        truth = torch.from_numpy(patch_labels(mask, rows, columns, num_classes)).flatten()
        known = (truth >= 0).nonzero().flatten()
        drawn = known[torch.randperm(len(known), generator=generator)[:quota]].sort().values
        tokens.append(seen.grid.flatten(0, 1)[drawn.to(seen.grid.device)].cpu())
        labels.append(truth[drawn])
        images.append(torch.full_like(drawn, number))
    patches = Patches(torch.cat(tokens), torch.cat(labels), torch.cat(images))
    if not len(patches.labels):
        raise DataError(f"no patch of the {len(pairs)} training images has a class; their masks ignore nearly all")
    return patches


def _with_masks(reader: TokenReader, pairs: Sequence[Pair]) -> Iterator[tuple[Tokens, NDArray[np.uint8]]]:
    """Tokens and mask of each pair, one at a time."""
    for pair, tokens in zip(pairs, reader([pair.image for pair in pairs]), strict=True):
        mask = read_mask(pair.mask)
        check_size(mask, pair.mask, tokens.size, pair.image)
        yield tokens, mask


def patch_labels(mask: NDArray[np.uint8], rows: int, columns: int, num_classes: int) -> NDArray[np.int64]:
    """(H, W) classes -> (rows, columns): the class of most of a patch's pixels, -1 where half of them are ignored."""
    height, width = mask.shape
    down, right = (np.arange(side) * count // side for side, count in ((height, rows), (width, columns)))
    classes = np.where(mask == IGNORED, num_classes, mask).astype(np.int64)
    cells = (down[:, None] * columns + right) * (num_classes + 1) + classes
    votes = np.bincount(cells.ravel(), minlength=rows * columns * (num_classes + 1)).reshape(rows, columns, -1)
    is_known = 2 * votes[..., num_classes] < votes.sum(axis=-1)
    return np.where(is_known, votes[..., :num_classes].argmax(axis=-1), -1)


@dataclass(frozen=True, eq=False)
class Head:
    """Multinomial logistic regression on standardised tokens: one linear layer, no norm."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D + 1, classes); the last row is the bias

    @classmethod
    def fitted(cls, patches: Patches, num_classes: int) -> Head:
        """To the minimum, by L-BFGS; every fifth image chooses how strongly the weights are held down."""
        tokens, labels = patches.tokens, patches.labels
        mean, std = tokens.mean(dim=0), tokens.std(dim=0, correction=0)
        scale = torch.where(std > 1e-6 * (1e-6 + mean.abs()), std, 1.0)  # a constant dimension says nothing
        inputs = (tokens - mean) / scale
        held_out = patches.images % HELD_OUT == HELD_OUT - 1  # whole images: neighbouring patches are alike
        is_usable = bool(held_out.any()) and not bool(held_out.all())  # else single patches choose
        strength, start = choose_strength(inputs, labels, num_classes, held_out if is_usable else None)
        return cls(mean, scale, fit(inputs, labels, num_classes, strength, start=start))

    def classes(self, grid: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
        """(h, w, D) tokens -> (H, W): the class with the largest of the logits, drawn out to `size` bilinearly."""
        logits = predict(((grid - self.mean) / self.scale).flatten(0, 1), self.weight).reshape(*grid.shape[:2], -1)
        down, right = (_stretching(old, new) for old, new in zip(grid.shape[:2], size, strict=True))
        wide = torch.einsum("hwc,Ww->hcW", logits, right)
        rows = max(LOGITS_AT_ONCE // (size[1] * wide.shape[1]), 1)  # a large mask of many classes would take gigabytes
        parts = [
            torch.einsum("hcW,Hh->HcW", wide, down[top : top + rows]).argmax(dim=1) for top in range(0, size[0], rows)
        ]
        return torch.cat(parts).to(torch.uint8).numpy()


def _stretching(old: int, new: int) -> Tensor:
    """(new, old): bilinear interpolation of one side, as `interpolate` does it."""
    stretched: Tensor = F.interpolate(torch.eye(old)[None], size=new, mode="linear")
    return stretched[0].T


def count_pixels(found: NDArray[np.uint8], truth: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """(H, W) and (H, W) -> (3, classes): pixels of the class in both, in `found` and in `truth`, where that counts."""
    known = truth != IGNORED
    pairs = found[known].astype(np.int64) * num_classes + truth[known]
    table = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return np.stack([table.diagonal(), table.sum(axis=1), table.sum(axis=0)])


def segmentation_scores(counts: NDArray[np.int64]) -> dict[str, Score]:
    """(N, 3, classes) pixels of `count_pixels` -> scores over all images together, with intervals over images.

    The IoU of a class is of the pixels of all images; `miou` is the mean over classes that the images show (Everingham
    et al. 2010). In a draw for an interval classes that no drawn image shows are left out.
    """

    def summed(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        times = np.bincount(drawn, minlength=len(counts)).astype(np.float64)
        total: NDArray[np.float64] = np.tensordot(times, counts, axes=1)
        return total

    def miou(drawn: NDArray[np.int64]) -> float:
        both, found, truth = summed(drawn)
        shown = truth > 0
        return float(100 * (both[shown] / (found + truth - both)[shown]).mean()) if shown.any() else float("nan")

    def accuracy(drawn: NDArray[np.int64]) -> float:
        both, _, truth = summed(drawn)
        return float(100 * both.sum() / truth.sum()) if truth.any() else float("nan")

    if not counts[:, 2].any():
        raise DataError("no pixel of the test masks has a class; there is nothing to score")
    return {"miou": whole_score(miou, len(counts)), "pixel_accuracy": whole_score(accuracy, len(counts))}
