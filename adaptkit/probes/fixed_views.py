"""Two views of every image, fixed independently of any recipe, and whether a backbone tells whose they are."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import DataError
from adaptkit.loading import start_worker
from adaptkit.probes.views import view_retrieval
from adaptkit.settings import ViewSettings
from adaptkit.sources import BadImage, ImageSource
from adaptkit.views import MultiCrop, photometric

# The views of the label-free measures are part of the measure: no recipe changes them.
FIXED_VIEWS = ViewSettings(
    num_global=2,
    num_local=0,
    global_scale=(0.3, 1.0),
    brightness=0.3,
    contrast=0.3,
    saturation=0.2,
    hue=0.05,
    grey=0.1,
    blur=(0.5, 0.5, 0.0),
)


class FixedViews(Dataset[tuple[Tensor, Tensor] | None]):
    """Two views of every image, decided by the image's path alone."""

    def __init__(self, source: ImageSource, image_px: int) -> None:
        self.source, self.multicrop = source, MultiCrop(FIXED_VIEWS, image_px, image_px)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        try:
            image = self.source.read(index)
        except BadImage:
            return None
        path = self.source.path(index).encode(errors="surrogateescape")
        views = self.multicrop(image, np.random.default_rng(list(hashlib.blake2b(path, digest_size=16).digest())))
        return views.global_crops, views.factors


def _stack(items: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    good = [item for item in items if item is not None]
    return (torch.stack([g[0] for g in good]), torch.stack([g[1] for g in good])) if good else None


def retrieve_views(backbone: Backbone, source: ImageSource, embedder: Embedder) -> Tensor:
    """(N,) 0 or 1: whether each image's second view finds its first among all images' first views.

    Unreadable images are left out.
    """
    return view_retrieval(*embed_views(backbone, source, embedder).unbind(dim=1))


@torch.inference_mode()
def embed_views(backbone: Backbone, source: ImageSource, embedder: Embedder) -> Tensor:
    """(N, 2, D) float32, CPU: both views of every readable image, in float32 where the backbone is.

    Raises DataError when no image is readable.
    """
    dataset = FixedViews(source, backbone.image_px)
    loader = DataLoader(
        dataset,
        batch_sampler=embedder.share.batches(len(dataset), embedder.batch_size),  # type: ignore[arg-type]  # ranges
        collate_fn=_stack,
        num_workers=embedder.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
    )
    training, device = backbone.module.training, next(backbone.module.parameters()).device
    backbone.module.eval()
    embedded: list[list[Tensor]] = []  # of each batch both sides, or nothing when all its images were bad
    for batch in loader:
        sides: list[Tensor] = []
        for side in range(2 if batch is not None else 0):
            pixels, factors = batch[0][:, side].to(device), batch[1][:, side].to(device)
            x = photometric(pixels, factors, backbone.mean, backbone.std, dataset.multicrop.parts)
            sides.append(backbone.module(x).float().cpu().clone())  # not a view that holds all tokens of the batch
        embedded.append(sides)
    backbone.module.train(training)
    batches = [torch.stack(sides, dim=1) for sides in embedder.share.gather(embedded) if sides]
    if not batches:
        raise DataError(f"none of the {len(source)} images could be read; check the data")
    return torch.cat(batches)
