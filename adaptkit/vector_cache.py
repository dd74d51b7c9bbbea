"""Embeddings kept in the folder of `adaptkit probe --cache`, so that the next command need not compute them again.

An entry is found by everything that decides it, images and weights by their content, and is used only if its digest is
right and it fits the images at hand. The folder may be one that runs keep their small images in.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from PIL import features
from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.checkpoints import load_tensors, save_tensors
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError, MachineError, UsageError
from adaptkit.probes.fixed_views import FIXED_VIEWS, embed_views
from adaptkit.sources import DIGEST_BYTES, DecodeCache, FolderSource, image_digest

FOLDER = "embeddings"  # in the cache
FORMAT = "adaptkit.embeddings/1"
JPEG = features.version("libjpeg_turbo") or features.version("jpg")  # not every Pillow brings its own
MAKERS = (torch.__version__, timm.__version__, PIL.__version__, JPEG)


@dataclass(frozen=True, eq=False)
class VectorCache:
    """A folder of embeddings, which several commands may read and fill at once. Nothing is ever removed from it."""

    folder: Path
    contents: dict[FolderSource, str] = field(default_factory=dict)  # the digest of each, read once a command

    @classmethod
    def make(cls, folder: str | Path) -> VectorCache:
        """A new cache or an existing one. Raises `UsageError` for a folder of anything else, `MachineError`."""
        return cls(DecodeCache.make(Path(folder)).folder / FOLDER)

    def embeddings(self, backbone: Backbone, source: FolderSource, embedder: Embedder) -> Embeddings:
        """What the embedder gives, out of the cache if it is there. Raises as the embedder."""
        key = self._key("images", embedder.precision, backbone, source, embedder)
        if (entry := self._load(key, 2, backbone.embed_dim)) is not None:
            made = _restored(*entry, source)
            if made is not None:
                return made
        made = embedder(backbone, source)
        place = {source.path(index): index for index in range(len(source))}
        rows = torch.tensor([place[path] for path in made.paths], dtype=torch.int64)
        failures = [[place[path], reason] for path, reason in made.failures]
        self._store(key, {"vectors": made.vectors, "rows": rows}, {"failures": failures})
        return made

    def views(self, backbone: Backbone, source: FolderSource, embedder: Embedder) -> Tensor:
        """What `embed_views` gives, out of the cache if it is there. Raises as it does."""
        key = self._key(f"views {FIXED_VIEWS!r} of {_names(source)}", "fp32", backbone, source, embedder)
        if (entry := self._load(key, 3, backbone.embed_dim)) is not None:
            kept = entry[0]["vectors"]
            if kept.shape[1] == FIXED_VIEWS.num_global and 0 < len(kept) <= len(source):
                return kept
        made = embed_views(backbone, source, embedder)
        self._store(key, {"vectors": made}, {})
        return made

    def _key(self, what: str, precision: str, backbone: Backbone, source: FolderSource, embedder: Embedder) -> str:
        if source not in self.contents:
            self.contents[source] = content_digest(source)
        device = next(backbone.module.parameters()).device.type
        facts = [FORMAT, MAKERS, what, precision, embedder.batch_size, device, self.contents[source], source.scale]
        return blake2b(json.dumps([facts, backbone_facts(backbone)]).encode(), digest_size=20).hexdigest()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _load(self, key: str, ndim: int, dim: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is kept under the key; None when that is missing, damaged, or something else."""
        try:
            if not stat.S_ISREG(os.stat(self._file(key)).st_mode):  # a pipe would wait for ever
                return None
            tensors, state = load_tensors(self._file(key))
        except (OSError, DataError, MachineError):
            return None
        vectors = tensors.get("vectors")
        if state.get("key") != key or vectors is None or vectors.dtype != torch.float32:
            return None
        return (tensors, state) if vectors.ndim == ndim and vectors.shape[-1] == dim else None

    def _store(self, key: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Without room or permission, or with something in the way, nothing is kept: the next command computes anew."""
        own = self._file(f"{key}.{os.getpid():x}.{os.urandom(4).hex()}")  # another command may write the same entry
        with suppress(MachineError, UsageError, OSError):
            try:
                save_tensors(own, tensors, {"key": key} | state)
                os.replace(own, self._file(key))
            finally:
                own.unlink(missing_ok=True)


def _restored(tensors: dict[str, Tensor], state: dict[str, Any], source: FolderSource) -> Embeddings | None:
    """The embeddings as an embedder gives them; None when they do not fit the images."""
    rows, failures = tensors.get("rows"), state.get("failures")
    if rows is None or rows.dtype != torch.int64 or rows.shape != tensors["vectors"].shape[:1]:
        return None
    try:
        indices, bad = rows.tolist(), [(int(row), str(reason)) for row, reason in failures or ()]
    except (TypeError, ValueError):
        return None
    if sorted([*indices, *(row for row, _ in bad)]) != list(range(len(source))):
        return None
    labels = [source.label(index) for index in indices]
    known = [label for label in labels if label is not None]
    return Embeddings(
        vectors=tensors["vectors"],
        labels=torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None,
        class_names=source.class_names,
        paths=tuple(source.path(index) for index in indices),
        failures=tuple((source.path(row), reason) for row, reason in bad),
    )


def content_digest(source: FolderSource) -> str:
    """Of the bytes of every image, in order. File names and times do not count, so a moved folder is the same."""
    digest = blake2b(digest_size=20)
    for index in range(len(source)):
        digest.update(image_digest(source, index) or bytes(DIGEST_BYTES))
    return digest.hexdigest()


def _names(source: FolderSource) -> str:
    """Digest of the paths: they decide the views."""
    digest = blake2b(digest_size=20)
    for index in range(len(source)):
        digest.update(os.fsencode(source.path(index)) + b"\0")
    return digest.hexdigest()


def backbone_facts(backbone: Backbone) -> list[Any]:
    """Everything of a backbone that decides its embeddings: architecture, readout, preprocessing, and all tensors."""
    digest = blake2b(digest_size=20)
    for name, tensor in sorted(backbone.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    config = backbone.pretrained_cfg
    preprocessing = [config.get(name) for name in ("interpolation", "crop_pct", "crop_mode")]
    facts = [backbone.architecture, sorted(backbone.model_args.items()), backbone.readout, backbone.image_px]
    return [*map(repr, facts), backbone.mean, backbone.std, repr(preprocessing), digest.hexdigest()]
