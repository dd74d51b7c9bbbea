"""Looking at image files as training will: each is read whole, and what could spoil a run is remembered."""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from adaptkit.sources import BadImage, FolderSource, ImageFacts, dhash, evenly_spaced, image_facts

MAX_IMAGES = 5_000  # decoding a million takes hours: beyond this many, an evenly spaced sample is looked at
MAX_THREADS = 8  # PIL decodes without holding Python's lock
MIN_BITS = 8  # of 64: hashes with fewer ones or zeros come from smooth images, which all hash alike
THUMBNAIL_PX = 16


@dataclass(frozen=True)
class Look:
    """What one file turned out to be. Without `facts` it is no image; with a `reason` it cannot be used."""

    position: int  # in the source
    path: str
    facts: ImageFacts | None = None
    reason: str = ""
    code: int = 0  # dhash
    thumbnail: bytes = b""  # 16 x 16 grey levels
    digest: bytes = b""  # of the content; empty when no other file looked at has the same size
    levels: int = 256  # from the 1st to the 99th percentile, of 256; measured only of more than 8 bits

    @property
    def short_side(self) -> int:
        """Pixels; 0 for no image."""
        return min(self.facts.width, self.facts.height) if self.facts else 0

    @property
    def has_texture(self) -> bool:
        """Whether its hash tells it from other images."""
        return MIN_BITS <= self.code.bit_count() <= 64 - MIN_BITS


@dataclass(frozen=True)
class Scan:
    """The looks at a source of `num_images`: at all of them, or at a sample."""

    num_images: int
    looks: tuple[Look, ...]

    @property
    def usable(self) -> list[Look]:
        return [look for look in self.looks if not look.reason]

    @property
    def unusable(self) -> list[Look]:
        return [look for look in self.looks if look.reason]

    @property
    def is_sample(self) -> bool:
        return len(self.looks) < self.num_images

    @property
    def expected_unusable(self) -> int:
        """In the whole source, as the sample suggests."""
        return round(len(self.unusable) * self.num_images / max(1, len(self.looks)))


def scan(source: FolderSource) -> Scan:
    """Read every image of a source, or 5,000 evenly spaced ones."""
    positions = evenly_spaced(len(source), MAX_IMAGES)
    sizes = source.sizes[positions]
    values, counts = np.unique(sizes, return_counts=True)
    twins = np.isin(sizes, values[counts > 1])  # only files of one size can have one content
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    with warnings.catch_warnings():  # decoding silences them for a while: threads would not put back what was there
        warnings.simplefilter("ignore")
        try:
            looks = tuple(pool.map(lambda job: look_at(source, *job), zip(positions.tolist(), twins, strict=True)))
        finally:
            pool.shutdown(cancel_futures=True)
    return Scan(len(source), looks)


def look_at(source: FolderSource, position: int, has_twin: bool) -> Look:
    """Read one image; nothing that is wrong with it is an error."""
    path, facts = source.path(position), None
    try:
        content = source.content(position)
        facts = image_facts(source.file(position), content)
        image = source.read(position)
        if has_twin:
            content = source.file(position).read_bytes() if content is None else content
        digest = hashlib.blake2b(content or b"").digest() if has_twin else b""
    except BadImage as bad:
        return Look(position, path, facts, bad.reason)
    except OSError as error:  # gone since it was decoded
        return Look(position, path, facts, error.strerror or "cannot be read")
    grey = image.convert("L")
    thumbnail = grey.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).tobytes()
    levels = _levels(grey) if facts.bits > 8 else 256
    return Look(position, path, facts, "", dhash(grey), thumbnail, digest, levels)


def _levels(grey: Image.Image) -> int:
    low, high = np.percentile(np.asarray(grey), (1, 99))
    return int(high - low) + 1
