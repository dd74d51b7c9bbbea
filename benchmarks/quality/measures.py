"""What a backbone is worth: by labels, and label-free on images of the target that no gradient saw.

Images are decoded once and every set is embedded once per backbone; of the frozen source everything is measured once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.checkpoints import load_tensors, with_prefix
from adaptkit.embedding import Embedder
from adaptkit.objectives.bits import Bits, bit_counts, bit_cross_entropy, bit_measures
from adaptkit.probes import alpha_req, lidar, neighbour_overlap, paired_bootstrap, view_retrieval
from adaptkit.probes.fixed_views import FixedViews
from adaptkit.probes.measure import Measurement, measure_labelled, selection_score
from adaptkit.probes.rank import rank_measures
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.sources import FolderSource, ImageSource, evenly_spaced, open_folder, open_labelled, split
from adaptkit.tuning import merged, plan_tuning, tune_
from adaptkit.views import photometric

METRICS = {"knn_top1": "knn", "linear_top1": "linear", "retrieval_map": "retrieval"}
MAX_HELD_OUT = 1_000
MAX_KEPT = (4_000, 2_000)  # gallery and queries of the images whose k-NN should not be forgotten
EMBEDDER = Embedder()  # no loader workers: what they decoded would end with them


@dataclass(eq=False)
class Memory:
    """Decoded images, as many as `max_bytes` hold; the others are decoded every time."""

    max_bytes: int = 2 << 30
    images: dict[Path, Image.Image] = field(default_factory=dict)
    num_bytes: int = 0

    def read(self, source: FolderSource, index: int) -> Image.Image:
        """The image; raises `BadImage`."""
        file = source.file(index)
        if file not in self.images:
            image = source.read(index)
            size = 3 * image.width * image.height
            if self.num_bytes + size > self.max_bytes:
                return image
            self.images[file], self.num_bytes = image, self.num_bytes + size
        return self.images[file]


MEMORY = Memory()


@dataclass(frozen=True)
class Decoded:
    """An image source whose images are decoded once: galleries and queries are embedded for many checkpoints."""

    source: FolderSource
    memory: Memory = MEMORY

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Image.Image:
        return self.memory.read(self.source, index)

    def path(self, index: int) -> str:
        return self.source.path(index)

    def label(self, index: int) -> int | None:
        return self.source.label(index)


@dataclass(frozen=True, eq=False)
class Scores:
    """The labelled probes of one backbone; `balanced_knn` is k-NN as the mean over classes, percent."""

    measurement: Measurement
    balanced_knn: float

    def values(self) -> dict[str, float]:
        return {name: score.value for name, score in self.measurement.scores.items()}

    def deltas(self, before: Scores) -> dict[str, list[float]]:
        """Of every metric: change, lower and upper end of its 95 % interval, paired by image."""
        intervals = {
            name: paired_bootstrap(before.measurement.scores[name].per_query, score.per_query)
            for name, score in self.measurement.scores.items()
        }
        return {name: [interval.value, interval.lo, interval.hi] for name, interval in intervals.items()}


class LabelledImages:
    """A gallery and queries with labels, and what the frozen source scores on them."""

    def __init__(self, original: Backbone, gallery: FolderSource, queries: FolderSource, probes: Sequence[str]) -> None:
        self.original, self.probes = original, probes
        self.gallery, self.queries = Decoded(gallery), Decoded(queries)

    @cached_property
    def frozen(self) -> Scores:
        return self.measure(self.original)

    def measure(self, backbone: Backbone) -> Scores:
        gallery, queries = EMBEDDER(backbone, self.gallery), EMBEDDER(backbone, self.queries)
        measurement = measure_labelled(gallery, queries, self.probes)
        right, labels = measurement.scores["knn_top1"].per_query, queries.labels
        balanced = torch.stack([right[labels == label].mean() for label in labels.unique()]).mean()
        return Scores(measurement, float(balanced))


class HeldOut:
    """Images of the target's train part that no gradient saw: plain, and cropped to their two fixed views."""

    def __init__(self, original: Backbone, source: ImageSource) -> None:
        self.original, self.source = original, source
        views = FixedViews(source, original.image_px)
        self.parts = views.multicrop.parts
        pairs = [pair for pair in (views[index] for index in range(len(views))) if pair is not None]
        self.crops = torch.stack([crops for crops, _ in pairs])  # (N, 2, 3, S, S) uint8
        self.factors = torch.stack([factors for _, factors in pairs])  # (N, 2, 8)

    @cached_property
    def before(self) -> Tensor:
        """The frozen source's embeddings (N, 3, D)."""
        return self._embed(self.original)

    @cached_property
    def frozen(self) -> dict[str, float | None]:
        return self._measures(self.before, self.original, None)

    def measure(self, backbone: Backbone, head: nn.Module | None) -> dict[str, float | None]:
        """Every label-free measure by name; those of the code for a `head` that gives bits."""
        return self._measures(self._embed(backbone), backbone, head)

    @torch.inference_mode()
    def _embed(self, backbone: Backbone) -> Tensor:
        """(N, 3, D): the plain image, its first and its second view."""
        views = []
        device = next(backbone.module.parameters()).device
        backbone.module.eval()
        for side in (0, 1):
            batches = zip(self.crops[:, side].split(128), self.factors[:, side].split(128), strict=True)
            views.append(torch.cat([self._forward(backbone, crops, factors, device) for crops, factors in batches]))
        return torch.stack([EMBEDDER(backbone, self.source).vectors, *views], dim=1)

    def _forward(self, backbone: Backbone, crops: Tensor, factors: Tensor, device: torch.device) -> Tensor:
        x = photometric(crops.to(device), factors.to(device), backbone.mean, backbone.std, self.parts)
        vectors: Tensor = backbone.module(x).float().cpu()
        return vectors

    def _measures(self, samples: Tensor, backbone: Backbone, head: nn.Module | None) -> dict[str, float | None]:
        plain, first, second = samples.unbind(1)
        original = self.before[:, 0]
        found, kept = view_retrieval(first, second), neighbour_overlap(original, plain)
        values = rank_measures(plain) | {
            "alpha_req": alpha_req(plain),
            "lidar": lidar(samples),
            "view_retrieval_top1": 100 * float(found.double().mean()),
            "neighbour_overlap": 100 * float(kept.double().mean()),
            "selection_score": 100 * float(selection_score(found, kept).double().mean()),
            "cosine_to_original": float(torch.cosine_similarity(original, plain).double().mean()),
            "weight_distance": weight_distance(self.original.module, backbone.module),
        }
        if head is not None:
            values |= code_measures(head, first, second)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@torch.inference_mode()
def code_measures(head: nn.Module, first: Tensor, second: Tensor) -> dict[str, float]:
    """(N, D) embeddings of two views -> how well the logits of each predict the other's code; its entropy."""
    logits = torch.stack([head(first), head(second)])  # (2, N, B)
    codes = (logits > 0).float()
    measures = bit_measures(bit_counts(logits, codes))
    chosen = {name: measures[name] for name in ("bit_entropy", "bit_information")}
    return {"bce": float(bit_cross_entropy(logits, codes))} | chosen


@torch.no_grad()
def weight_distance(original: nn.Module, adapted: nn.Module) -> float:
    """|w - w0| / |w0| over all parameters."""
    pairs = list(zip(original.parameters(), adapted.parameters(), strict=True))
    moved = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs)
    return math.sqrt(moved / sum(float(old.double().square().sum()) for old, _ in pairs))


def teachers(run: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(step, state dict) of every teacher that a run took as a candidate and of its last one, in order.

    The names of the candidates stand in the last checkpoint: a file may be left from before a collapse.
    """
    folder = run / "checkpoints"
    tensors, state = load_tensors(folder / "last.safetensors")
    last = state["train"]["step"]
    for step in (candidate["step"] for candidate in state["train"]["candidates"]):
        if step < last:
            yield step, load_tensors(folder / f"candidate-{step:08d}.safetensors")[0]
    yield last, with_prefix(tensors, "teacher.")


def backbone_of(teacher: dict[str, Tensor], original: Backbone, recipe: Recipe) -> Backbone:
    """The backbone of a teacher, LoRA matrices merged into it."""
    backbone, state = original.clone(), with_prefix(teacher, "backbone.")
    if any(".lora_A." in name for name in state):  # a candidate is merged already
        tune_(backbone.module, plan_tuning(original, recipe), recipe.seed)
    backbone.module.load_state_dict(state)
    return replace(backbone, module=merged(original.module, backbone.module))


def bits_head(recipe: Recipe, teacher: dict[str, Tensor], embed_dim: int) -> nn.Module | None:
    """The head of a teacher whose objective is bits, on the CPU; None for other objectives."""
    if recipe.objective.name != "bits":
        return None
    head = Bits(recipe.objective).build_head(embed_dim)
    head.load_state_dict(with_prefix(teacher, "head."))
    return head.eval()


def measure_teachers(
    run: Path, images: LabelledImages, source: str, target: Path, checkpoints: bool
) -> list[dict[str, Any]]:
    """Step, backbone, scores and label-free measures: of the frozen source and every teacher, or of the last alone."""
    recipe, original, measured = load_recipe(run / "recipe.yaml"), images.original, []
    held_out = held_out_of(source, target, recipe.data.split_by) if checkpoints else None
    if held_out:
        measured.append({"step": 0, "backbone": original, "scores": images.frozen, "label_free": held_out.frozen})
    for step, teacher in teachers(run) if checkpoints else list(teachers(run))[-1:]:
        if step == 0 and measured:  # stopped before a first step was saved
            continue
        backbone = backbone_of(teacher, original, recipe)
        row = {"step": step, "backbone": backbone, "scores": images.measure(backbone)}
        if held_out:
            row["label_free"] = held_out.measure(backbone, bits_head(recipe, teacher, original.embed_dim))
        measured.append(row)
    return measured


def forgetting(source: str, kept: str, backbone: Backbone) -> dict[str, Any]:
    """k-NN of the frozen source and of the last teacher on other images, with the paired change."""
    name, _, folder = kept.partition("=")
    images = kept_images(source, Path(folder))
    frozen, adapted = images.frozen, images.measure(backbone)
    delta = adapted.deltas(frozen)["knn_top1"]
    return {"name": name} | {"frozen": knn(frozen), "adapted": knn(adapted), "delta": delta}


def knn(scores: Scores) -> float:
    return scores.values()["knn_top1"]


@cache
def frozen_source(source: str) -> Backbone:
    """The source where it will be measured."""
    backbone = load_backbone(source)
    backbone.module.to("cuda" if torch.cuda.is_available() else "cpu")
    return backbone


@cache
def target_images(source: str, target: Path, share: int) -> LabelledImages:
    """Train as gallery and test as queries; of each, one image in `share`."""
    labelled = open_labelled(target)
    gallery, queries = (side.subset(np.arange(0, len(side), share)) for side in (labelled.gallery, labelled.queries))
    return LabelledImages(frozen_source(source), gallery, queries, [*METRICS.values()])


@cache
def kept_images(source: str, folder: Path) -> LabelledImages:
    """Evenly spaced images of a labelled folder."""
    labelled = open_labelled(folder)
    gallery, queries = (
        side.subset(evenly_spaced(len(side), limit))
        for side, limit in zip((labelled.gallery, labelled.queries), MAX_KEPT, strict=True)
    )
    return LabelledImages(frozen_source(source), gallery, queries, ["knn"])


@cache
def held_out_of(source: str, target: Path, split_by: Literal["file", "folder"]) -> HeldOut:
    """At most 1,000 images, evenly spaced, of the selection and report splits that a run makes of `target`'s train."""
    train = open_folder(target / "train")
    parts = split(train, split_by)
    held_out = np.sort(np.concatenate([parts.selection, parts.report]))
    return HeldOut(frozen_source(source), train.subset(held_out[evenly_spaced(len(held_out), MAX_HELD_OUT)]))
