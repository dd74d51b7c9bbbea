"""Files in, patch tokens out: one pass of a frozen backbone over images of any sizes, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor  # type: ignore[import-untyped, unused-ignore]

from adaptkit.backbones import Backbone
from adaptkit.dense.patches import fitting_size, patch_size, patch_tokens
from adaptkit.embedding import AUTOCAST, exact_float32, frozen
from adaptkit.errors import DataError, DeviceMemoryError, NotFinite, UsageError, did_you_mean
from adaptkit.loading import start_worker
from adaptkit.sources import BadImage, decode_sized, upright_size
from adaptkit.sources.source import shown

READ_AT_ONCE = 32  # decoded images that a worker hands over together


@dataclass(frozen=True)
class Tokens:
    """What a backbone says about one image, patch by patch."""

    grid: Tensor  # (h, w, D) float32, on the device
    size: tuple[int, int]  # height and width of the image in its file, upright


@dataclass(frozen=True)
class Fit:
    """To which sizes images are resized, see `fitting_size`."""

    patch: tuple[int, int]
    least: int
    most: int
    interpolation: str


@dataclass(frozen=True)
class _Read:
    pixels: Tensor  # (3, H, W) uint8
    size: tuple[int, int]


class _Files(Dataset[_Read | BadImage]):
    """Decoded and resized images; a bad one is handed on, because raising would end the worker."""

    def __init__(self, files: Sequence[Path], fit: Fit) -> None:
        self.files, self.fit = files, fit

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Read | BadImage:
        file, fit = self.files[index], self.fit
        try:
            size = upright_size(file)[::-1]
            image, _ = decode_sized(file, max(fit.least, fit.most))
        except BadImage as bad:
            return bad
        height, width = fitting_size(*size, fit.patch, least=fit.least, most=fit.most)
        resized = image.resize((width, height), str_to_pil_interp(fit.interpolation))
        return _Read(pil_to_tensor(resized), size)


@dataclass(frozen=True)
class TokenReader:
    """How files become tokens: the short side becomes its own length, at least the backbone's own, at most `most`."""

    backbone: Backbone
    most: int  # pixels
    precision: str
    batch_size: int  # images of the backbone's own size: of larger ones fewer pass at once
    workers: int
    device: torch.device

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The backbone on the device, in evaluation mode, in exact float32; afterwards everything as it was.

        Raises UsageError for an unknown precision, BackboneError for a network without tokens.
        """
        if self.precision not in AUTOCAST:
            hint = did_you_mean(self.precision, list(AUTOCAST))
            raise UsageError(f"unknown precision {self.precision!r}, use one of {', '.join(AUTOCAST)}{hint}")
        patch_size(self.backbone)
        try:
            with torch.compiler.set_stance("force_eager"), frozen(self.backbone.module, self.device), exact_float32():
                yield
        except torch.OutOfMemoryError as error:
            advice = f"out of memory for the tokens of {self.batch_size} images at once; use a smaller batch size"
            raise DeviceMemoryError(f"{self.device}: {advice}") from error

    def __call__(self, files: Sequence[Path]) -> Iterator[Tokens]:
        """Tokens of each file, in order; inside `ready()`. Raises DataError for one that cannot be read, NotFinite."""
        interpolation = str(self.backbone.pretrained_cfg["interpolation"])
        fit = Fit(patch_size(self.backbone), self.backbone.image_px, self.most, interpolation)
        loader: Iterable[Any] = DataLoader(
            _Files(files, fit),
            batch_size=min(self.batch_size, READ_AT_ONCE),
            collate_fn=list,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),  # own: else a pass would draw from the global one
        )
        for batch in loader:
            bad = next((item for item in batch if isinstance(item, BadImage)), None)
            if bad is not None:
                raise DataError(f"{shown(bad.path)}: {bad.reason}; mend the file, or take it and its mask away")
            for _, group in groupby(batch, key=lambda read: tuple(read.pixels.shape)):
                yield from self._tokens(list(group))

    def _tokens(self, images: list[_Read]) -> Iterator[Tokens]:
        """Of images that were resized to the same size."""
        at_once = max(self.batch_size * self.backbone.image_px**2 // images[0].pixels[0].numel(), 1)
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            pixels = torch.stack([read.pixels for read in part]).to(self.device)
            grids = patch_tokens(self.backbone, pixels, self.precision)
            if not bool(torch.isfinite(grids).all()):
                raise NotFinite("the tokens contain NaN or infinity; the weights are damaged or training diverged")
            for grid, read in zip(grids, part, strict=True):
                yield Tokens(grid, read.size)
