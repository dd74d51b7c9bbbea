"""Examples for the report, taken once at the end of a run: neighbours, maps, views, what bits mean.

All but the views show one pool of held-out images, evenly spaced by path: of the labelled report queries, or without
labels of the target's report split. Their embeddings are those of the verdict, so no backbone runs again here.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embeddings
from adaptkit.errors import AdaptkitError, DataError
from adaptkit.loading import ViewDataset
from adaptkit.outcome import Outcome
from adaptkit.page import PICTURES
from adaptkit.probes.knn import nearest
from adaptkit.run import Run
from adaptkit.select import Judge
from adaptkit.session import Session
from adaptkit.sources import BadImage, FolderSource, evenly_spaced
from adaptkit.views import MultiCrop, photometric

SCHEMA = "adaptkit.pictures/1"
THUMB_PX, QUALITY = 96, 80
MAX_POOL = 240
NUM_QUERIES, NUM_NEIGHBOURS = 6, 5
NUM_VIEWED = 4
NUM_BITS, IMAGES_PER_BIT = 4, 6
MIN_SHARE = 0.1  # of the pool, of a bit's rarer value: a bit that hardly ever changes shows nothing


@dataclass(frozen=True)
class Seen:
    """What the run knows at its end: embeddings of held-out images, a head that fits them, and how views are made."""

    held_out: FolderSource
    before: Embeddings | None  # of its readable images
    after: Embeddings | None  # None: the original was exported
    head: nn.Module | None  # None: the objective has no bits
    original: Backbone
    train: FolderSource
    multicrop: MultiCrop
    seed: int


@dataclass(frozen=True)
class Pool:
    """N images with their embeddings before and after, and the thumbnails asked for so far."""

    source: FolderSource
    before: Embeddings
    after: Embeddings | None
    thumbs: dict[int, str | None] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Positions in the source by path: images that could not be read have no row here."""
        return {self.source.path(index): index for index in range(len(self.source))}

    def show(self, rows: Iterable[int]) -> list[int]:
        """The rows as they are; their images get thumbnails."""
        shown = list(rows)
        for row in shown:
            if row not in self.thumbs:
                self.thumbs[row] = thumbnail_of(self.source, self.numbers[self.before.paths[row]])
        return shown

    def to_json(self) -> list[dict[str, Any]]:
        """[{path, class, jpeg}]; the class is null without labels, the thumbnail where nothing shows the image."""
        names, labels = self.before.class_names, self.before.labels
        classes = [names[label] for label in labels.tolist()] if names and labels is not None else []
        return [
            {"path": path, "class": classes[row] if classes else None, "jpeg": self.thumbs.get(row)}
            for row, path in enumerate(self.before.paths)
        ]


def save_pictures(
    run: Run, s: Session, judge: Judge, outcome: Outcome, head: nn.Module, note: Callable[[str], None]
) -> None:
    """Write `pictures.json`. Never raises; what goes wrong is noted, and the page says so too."""
    inputs = judge.inputs
    seen = Seen(
        held_out=inputs.scored.report if inputs.scored else inputs.report,
        before=judge.original_report.queries,
        after=outcome.after.queries if outcome.selected is not None else None,
        head=head if s.recipe.objective.name == "bits" else None,
        original=s.backbone,
        train=s.source,
        multicrop=s.multicrop,
        seed=s.recipe.seed,
    )
    pictures = take_pictures(seen)
    for name, reason in pictures["missing"].items():
        note(f"the report has no {name}: {reason}")
    try:
        run.write(PICTURES, json.dumps(pictures, separators=(",", ":"), allow_nan=False) + "\n")
    except (AdaptkitError, OSError, ValueError) as error:
        note(f"the report has no pictures: {error}")


def take_pictures(seen: Seen) -> dict[str, Any]:
    """`pictures.json`: {schema, images, views, neighbours, maps, bits, missing}.

    Never raises: a part that fails is null, and `missing` says why, by the part's name.
    """
    missing: dict[str, str] = {}

    def part(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # a finished run is worth more than any picture of it
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())
            return None

    shown: dict[str, Any] = {"views": part("views", lambda: views(seen))}
    pool = part("images", lambda: open_pool(seen))
    if pool is not None:
        shown["neighbours"] = part("neighbours", lambda: neighbours(pool))
        shown["maps"] = part("maps", lambda: maps(pool))
        shown["bits"] = part("bits", lambda: bits(pool, seen.head) if seen.head is not None else None)
    return {"schema": SCHEMA, "images": pool.to_json() if pool else [], **shown, "missing": missing}


def open_pool(seen: Seen) -> Pool:
    """The held-out images that are shown. Raises `DataError`."""
    before, after = seen.before, seen.after
    if before is None or len(before.paths) < 2 or (after is not None and after.paths != before.paths):
        raise DataError("fewer than two images of the report split could be read, or they changed meanwhile")
    rows = evenly_spaced(len(before.paths), MAX_POOL)
    return Pool(seen.held_out, _subset(before, rows), _subset(after, rows) if after is not None else None)


def _subset(embeddings: Embeddings, rows: NDArray[np.int64]) -> Embeddings:
    return replace(
        embeddings,
        vectors=embeddings.vectors[rows],
        labels=None if embeddings.labels is None else embeddings.labels[rows],
        paths=tuple(embeddings.paths[row] for row in rows),
    )


def neighbours(pool: Pool) -> dict[str, Any]:
    """{queries, before, after}: rows of the pool; per query its nearest by cosine, the query itself left out."""
    queries = evenly_spaced(len(pool.before.paths), NUM_QUERIES).tolist()
    shown: dict[str, Any] = {"queries": pool.show(queries)}
    for side, embeddings in (("before", pool.before), ("after", pool.after)):
        if embeddings is not None:
            found = nearest(embeddings.vectors, embeddings.vectors, NUM_NEIGHBOURS, exclude_self=True)
            index = torch.cat([block for _, _, block in found])
            shown[side] = [pool.show(index[query].tolist()) for query in queries]
    return shown


def maps(pool: Pool) -> dict[str, Any]:
    """{before, after: {points: [[x, y]], percent}}; `percent` of the variance lies in the plane that is shown.

    Principal components of the embeddings at length 1, as cosine sees them. The second plane is turned and mirrored
    to the first (orthogonal Procrustes), which changes nothing within it.
    """
    first, percent = principal_plane(pool.before.vectors)
    shown = {"before": {"points": _scaled(first), "percent": percent}}
    if pool.after is not None:
        second, percent = principal_plane(pool.after.vectors)
        left, _, right = torch.linalg.svd(second.T @ first)
        shown["after"] = {"points": _scaled(second @ (left @ right)), "percent": percent}
    return shown


def principal_plane(vectors: Tensor) -> tuple[Tensor, float]:
    """(N, D) -> (N, 2) float64 scores on the first two principal components, and their percent of the variance."""
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    x = x - x.mean(0)
    left, lengths, _ = torch.linalg.svd(x, full_matrices=False)
    scores = left[:, :2] * lengths[:2]
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()  # signs of components are arbitrary
    power = lengths**2
    return scores, 100 * float(power[:2].sum() / power.sum().clamp_min(1e-12))


def _scaled(points: Tensor) -> list[list[float]]:
    """Into [-1, 1], with one scale for both axes."""
    return [[round(value, 3) for value in row] for row in (points / points.abs().max().clamp_min(1e-12)).tolist()]


@torch.no_grad()
def bits(pool: Pool, head: nn.Module) -> dict[str, Any]:
    """{num_bits, num_usable, bits: [{bit, ones, zero, one}]}: the images with the lowest and the highest logits.

    The bits are evenly spaced among those whose rarer value at least a tenth of the pool has.
    """
    embeddings = pool.after or pool.before
    device = next(head.parameters()).device
    logits = head.eval()(embeddings.vectors.to(device)).float().cpu()  # (N, B)
    ones = (logits > 0).float().mean(0)
    usable = torch.minimum(ones, 1 - ones).ge(MIN_SHARE).nonzero().flatten()
    count = min(IMAGES_PER_BIT, len(logits) // 2)
    shown = []
    for bit in usable[torch.from_numpy(evenly_spaced(len(usable), NUM_BITS))].tolist() if len(usable) else []:
        order = logits[:, bit].argsort(stable=True).tolist()
        sides = {"zero": pool.show(order[:count]), "one": pool.show(order[::-1][:count])}
        shown.append({"bit": bit, "ones": float(ones[bit])} | sides)
    return {"num_bits": logits.shape[1], "num_usable": len(usable), "bits": shown}


def views(seen: Seen) -> list[dict[str, Any]]:
    """[{path, jpeg, global_px, local_px, global: [jpeg], local: [jpeg]}]: first views of evenly spaced images."""
    dataset = ViewDataset(seen.train, seen.multicrop, seen.seed)
    shown = []
    for index in evenly_spaced(len(seen.train), NUM_VIEWED).tolist():
        drawn, failures = dataset[0, index]
        if drawn is None or failures:  # these views would be of another image
            continue
        count = len(drawn.global_crops)
        parts = {"global": (drawn.global_crops, drawn.factors[:count])}
        parts["local"] = (drawn.local_crops, drawn.factors[count:])
        pictures = {name: [jpeg(view) for view in _as_seen(seen, *part)] for name, part in parts.items()}
        sides = {"global_px": seen.multicrop.global_px, "local_px": seen.multicrop.local_px}
        shown.append({"path": seen.train.path(index), "jpeg": thumbnail_of(seen.train, index)} | sides | pictures)
    return shown


def _as_seen(seen: Seen, crops: Tensor, factors: Tensor) -> list[Image.Image]:
    """(n, 3, S, S) uint8 crops -> what the backbone is given, with its normalisation undone."""
    if not len(crops):
        return []
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (seen.original.mean, seen.original.std))
    x = photometric(crops, factors, seen.original.mean, seen.original.std, seen.multicrop.parts) * std + mean
    return [F.to_pil_image(view) for view in (x.clamp(0, 1) * 255).round().to(torch.uint8)]


def thumbnail_of(source: FolderSource, index: int, px: int = THUMB_PX) -> str | None:
    """The centre square, about what a probe sees; None if the image cannot be read any more."""
    try:
        return jpeg(source.read(index), px)
    except BadImage:
        return None


def jpeg(image: Image.Image, px: int = THUMB_PX) -> str:
    """At most `px` a side, never enlarged; JPEG, base64."""
    side = min(px, *image.size)
    buffer = io.BytesIO()
    ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return b64encode(buffer.getvalue()).decode()
