"""Object discovery: do the patches of a frozen backbone tell objects from background, without any training?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor  # type: ignore[import-untyped, unused-ignore]

from adaptkit.backbones import Backbone
from adaptkit.dense.annotations import Boxed, open_boxed
from adaptkit.dense.boxes import Found, ap50, is_found
from adaptkit.dense.cut import Segment, box_of, find_one, find_several
from adaptkit.dense.keys import patch_keys
from adaptkit.dense.patches import patch_size
from adaptkit.embedding import AUTOCAST, exact_float32, frozen
from adaptkit.errors import DataError, DeviceMemoryError, NotFinite, UsageError, did_you_mean
from adaptkit.loading import start_worker
from adaptkit.probes import Score
from adaptkit.probes.measure import Measurement
from adaptkit.probes.score import percent_score, whole_score
from adaptkit.sources import BadImage
from adaptkit.sources.decoding import decode_sized
from adaptkit.sources.source import shown

LONG_SIDE_PX = 480  # MaskCut's images are squares of this side
MAX_PATCHES = 3600  # of 8 px in 480 x 480: the matrices of the cut grow with the square of their number

Item = tuple[int, Tensor | tuple[str, str]]
"""An index with its pixels (3, H, W) uint8, or with (name, reason) of a bad image."""


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
    """`corloc` (one object an image, TokenCut) and `ap50` (up to three, MaskCut), percent, of images with boxes.

    Nothing is learnt, so there is no gallery and `queries` must be None. Images are taken one by one, each at its own
    size, and nothing is drawn: `batch_size` and `seed` change nothing. Images without any box count in `ap50` only.
    Raises `DataError`, `BackboneError`, `UsageError`, `DeviceMemoryError`.
    """
    if precision not in AUTOCAST:
        raise UsageError(f"unknown precision {precision!r}{did_you_mean(precision, list(AUTOCAST))}")
    if queries is not None:
        raise UsageError("objects: nothing is fitted, so there are no queries apart from the data; leave --queries out")
    patch = patch_size(backbone)
    images, unreadable = open_boxed(data)
    failures, one, several = list(unreadable), list[Found](), list[Found]()
    try:
        with frozen(backbone.module, device), exact_float32(), torch.inference_mode():
            for index, pixels in _loader(images, patch, workers, pin=device.type == "cuda"):
                if not isinstance(pixels, Tensor):
                    failures.append(pixels)
                    continue
                keys = patch_keys(backbone, pixels[None].to(device, non_blocking=True), precision)[0]
                if not bool(keys.isfinite().all()):
                    raise NotFinite(f"{shown(images[index].name)}: its keys contain NaN or infinity")
                one.append(found_in(images[index], [find_one(keys)]))
                several.append(found_in(images[index], find_several(keys)))
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{device}: out of memory while cutting an image; free some of its memory") from error
    if not any(len(found.truth) for found in one):
        first = f"; the first: {shown(failures[0][0])}: {failures[0][1]}" if failures else ""
        raise DataError(f"{shown(data)}: none of the images with boxes could be read{first}; check the data")
    return Measurement(object_scores(one, several), failures=tuple(failures))


def object_scores(one: Sequence[Found], several: Sequence[Found]) -> dict[str, Score]:
    """What was found in each image, one box and any number of boxes -> `corloc` and `ap50`."""
    hits = [float(is_found(found.boxes, found.truth)) for found in one if len(found.truth)]
    return {"corloc": percent_score(torch.tensor(hits)), "ap50": whole_score(ap50(several), len(several))}


def found_in(image: Boxed, segments: Sequence[Segment]) -> Found:
    """Segments of the patch grid, which spans the whole image, as boxes beside the true ones."""
    boxes = [box_of(segment.mask, image.width, image.height) for segment in segments]
    scores = np.array([segment.score for segment in segments], dtype=np.float64)
    return Found(np.array(boxes, dtype=np.float64).reshape(-1, 4), scores, image.boxes)


def working_size(width: int, height: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels at which an image is cut: its own, whole patches (rows, columns of pixels), bounded.

    The long side is at most `LONG_SIDE_PX` and there are at most `MAX_PATCHES`; nothing is enlarged but to one patch.
    """
    rows, columns = patch
    scale = min(1.0, LONG_SIDE_PX / max(width, height), (MAX_PATCHES * rows * columns / (width * height)) ** 0.5)
    across, down = (max(1, int(side * scale / step + 1e-9)) for side, step in ((width, columns), (height, rows)))
    return across * columns, down * rows


class _Pictures(Dataset[Item]):
    """Decoded and resized images; a bad one is handed on, because raising would end the worker."""

    def __init__(self, images: Sequence[Boxed], patch: tuple[int, int]) -> None:
        self.images, self.patch = images, patch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        entry = self.images[index]
        try:
            image = decode_sized(entry.file, LONG_SIDE_PX)[0]
        except BadImage as bad:
            return index, (entry.name, bad.reason)
        size = working_size(entry.width, entry.height, self.patch)  # a large JPEG is reduced already
        return index, pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))


def _loader(images: Sequence[Boxed], patch: tuple[int, int], workers: int, pin: bool) -> Iterable[Item]:
    loader: Iterable[Item] = DataLoader(
        _Pictures(images, patch),
        batch_size=None,  # of different sizes
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),  # else it draws from the global one
    )
    return loader
