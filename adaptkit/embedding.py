"""Images in, embeddings out: one pass of a frozen backbone over a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adaptkit.backbones import Backbone
from adaptkit.errors import DataError, DeviceMemoryError, UsageError, did_you_mean
from adaptkit.loading import start_worker
from adaptkit.processes import ALONE, Share
from adaptkit.sources import BadImage, ImageSource
from adaptkit.sources.source import shown

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What a backbone says about N readable images, in the order of their source."""

    vectors: Tensor  # (N, D) float32, CPU
    labels: Tensor | None  # (N,) int64, indices into class_names
    class_names: tuple[str, ...] | None
    paths: tuple[str, ...]  # N, relative to the source's root
    failures: tuple[tuple[str, str], ...] = ()  # (path, reason) of the images left out


@dataclass(frozen=True)
class _Batch:
    indices: list[int]
    pixels: Tensor | None  # (n, 3, H, W) uint8; None when every image of the batch was bad
    failures: list[tuple[str, str]]

    def pin_memory(self) -> _Batch:
        """Called by the DataLoader, which cannot look into classes it does not know."""
        return _Batch(self.indices, None if self.pixels is None else self.pixels.pin_memory(), self.failures)


@dataclass(frozen=True)
class _Embedded:
    indices: list[int]
    vectors: Tensor | None  # (n, D) float32, CPU
    failures: list[tuple[str, str]]


Item = tuple[int, Tensor | tuple[str, str]]
"""An index with its pixels (3, H, W) uint8, or with (path, reason) of a bad image."""


class _Images(Dataset[Item]):
    """Decoded and resized images as uint8; a bad one is handed on, because raising would end the worker."""

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        try:
            return index, self.transform(self.source.read(index))
        except BadImage as bad:
            return index, (self.source.path(index), str(bad.reason))


def embed(
    backbone: Backbone,
    source: ImageSource,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 0,
    precision: str = "fp32",
    share: Share = ALONE,
) -> Embeddings:
    """Embed every readable image of `source` with the backbone's own preprocessing.

    `device` None means where the backbone is; otherwise it is moved there and back. Modes of the modules and the
    global random state are left as they were. Unreadable images are left out and listed in `failures`. With a `share`
    this process embeds its batches only, all processes call this, and each gets everything, the same to the bit.
    Raises DataError when no image is readable, UsageError for an unknown precision, DeviceMemoryError.
    """
    if precision not in AUTOCAST:
        hint = did_you_mean(precision, list(AUTOCAST))
        raise UsageError(f"unknown precision {precision!r}, use one of {', '.join(AUTOCAST)}{hint}")
    home = _device_of(backbone.module)
    target = home if device is None else torch.device(device)
    batches = share.batches(len(source), batch_size)
    loader = _loader(backbone, source, batches, workers, pin=target.type == "cuda")
    embedded: list[_Embedded] = []
    try:
        # the teacher of a run may be compiled for the sizes and the precision of training, which are not these
        eager = torch.compiler.set_stance("force_eager")
        with eager, frozen(backbone.module, target), exact_float32(), torch.inference_mode():
            for batch in loader:
                vectors = None
                if batch.pixels is not None:
                    vectors = _forward(backbone, batch.pixels.to(target, non_blocking=True), precision)
                    vectors = vectors.cpu().clone()  # not a view that holds, and sends, all tokens of the batch
                embedded.append(_Embedded(batch.indices, vectors, batch.failures))
    except torch.OutOfMemoryError as error:
        advice = f"out of memory while embedding {batch_size} images at once; use a smaller batch size"
        raise DeviceMemoryError(f"{target}: {advice}") from error
    return _collect(source, share.gather(embedded))


def _loader(
    backbone: Backbone, source: ImageSource, batches: Sequence[Sequence[int]], workers: int, pin: bool
) -> Iterable[_Batch]:
    """The batches of these indices, in order. Workers run one torch thread each: the DataLoader sees to that itself."""
    images = _Images(source, backbone.eval_transform())
    # an own generator: otherwise every pass draws from the global one, and probing would change the training after it
    generator = torch.Generator().manual_seed(0)
    loader: Iterable[Any] = DataLoader(  # typed by the dataset's items, whatever collate_fn makes of them
        images,
        batch_sampler=batches,  # type: ignore[arg-type]  # not only of lists
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=start_worker,
        generator=generator,
    )
    return loader


def _collate(items: list[Item]) -> _Batch:
    good = [(index, item) for index, item in items if isinstance(item, Tensor)]
    pixels = torch.stack([item for _, item in good]) if good else None
    return _Batch([index for index, _ in good], pixels, [item for _, item in items if isinstance(item, tuple)])


def _forward(backbone: Backbone, pixels: Tensor, precision: str) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, D) float32."""
    mean = torch.tensor(backbone.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(backbone.std, device=pixels.device).view(1, 3, 1, 1)
    dtype = AUTOCAST[precision]
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype is not None):
        vectors: Tensor = backbone.module((pixels.float() / 255 - mean) / std)
    return vectors.float()


@contextmanager
def frozen(module: nn.Module, target: torch.device) -> Iterator[None]:
    """Evaluation mode on `target`; afterwards every module has its own mode and the old device back."""
    home, modes = _device_of(module), [(m, m.training) for m in module.modules()]
    try:
        module.to(target).eval()
        yield
    finally:
        module.to(home)
        for each, mode in modes:  # not module.train(): parts may have been frozen on purpose
            each.training = mode


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32: cuDNN rounds float32 convolutions to 10 bits by default, and training may have allowed it elsewhere."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _collect(source: ImageSource, batches: Sequence[_Embedded]) -> Embeddings:
    indices = [index for batch in batches for index in batch.indices]
    failures = [failure for batch in batches for failure in batch.failures]
    vectors = [batch.vectors for batch in batches if batch.vectors is not None]
    if not vectors:
        detail = f"; the first: {shown(failures[0][0])}: {failures[0][1]}" if failures else ""
        raise DataError(f"none of the {len(source)} images could be read{detail}; check the data")
    labels = [source.label(i) for i in indices]
    known = [label for label in labels if label is not None]
    return Embeddings(
        vectors=torch.cat(vectors),
        labels=torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None,
        class_names=source.class_names,
        paths=tuple(source.path(i) for i in indices),
        failures=tuple(failures),
    )


@dataclass(frozen=True)
class Embedder:
    """How images are embedded for the probes of a run.

    `shared`: the processes of a launch share the batches, so all have to call it. Not what only some of them do.
    """

    batch_size: int = 128
    workers: int = 0
    precision: str = "fp32"
    device: torch.device | None = None
    shared: bool = False

    @property
    def share(self) -> Share:
        """The batches this process takes."""
        return Share.mine() if self.shared else ALONE

    def __call__(self, backbone: Backbone, source: ImageSource) -> Embeddings:
        """Embeddings of every readable image of the source."""
        return embed(
            backbone,
            source,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            precision=self.precision,
            share=self.share,
        )
