"""Keeps large images decoded small, so that later epochs do not decode the originals again.

A large image is always seen through its small JPEG, whether that was kept or is made just now: what a run sees does
not depend on what lies in the folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import PIL
from PIL import Image, features

from adaptkit.errors import MachineError, UsageError
from adaptkit.sources.decoding import decode_sized, image_facts
from adaptkit.sources.pixels import Scale
from adaptkit.sources.scan import file_size
from adaptkit.sources.source import BadImage, shown

SMALL_SIDE = 512
LARGEST_KEPT_AS_IS = 640  # short side; below it the small image would save next to nothing
QUALITY = 95
MAX_JPEG_SIDE = 65_500  # libjpeg's limit
MARKER = "adaptkit-cache.json"
FORMAT = "adaptkit.cache/1"
MAGIC = b"adaptkc1"
DIGEST_BYTES = 16
MAX_ENTRY_BYTES = 2**28
GROUP, ENTRY = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{38}(\.[0-9a-f.]+\.part)?")

# Another Pillow or libjpeg may make other pixels from the same file: what it kept is made anew.
MAKER = f"{PIL.__version__} {features.version('libjpeg_turbo') or features.version('jpg')} {SMALL_SIDE} {QUALITY}"


@dataclass(frozen=True)
class DecodeCache:
    """A folder of small images, which several runs and processes may read and fill at once."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> DecodeCache:
        """A new cache or an existing one. Raises as `refuse_foreign`, and `MachineError` if it cannot be made."""
        refuse_foreign(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / MARKER).is_file():
                _write_whole(folder / MARKER, json.dumps({"format": FORMAT}).encode())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise _unusable(folder, error) from None
        return cls(folder)

    def read(self, file: Path, scale: Scale, content: bytes | None = None) -> Image.Image:
        """The image as `decode` gives it, a large one at 512 px short side and once through a JPEG. Raises `BadImage`.

        What cannot be stored, for want of room or permission, is not: the same pixels are made again the next time.
        With `content`, the bytes of an image out of a store, these and not `file` are what it is known by.
        """
        origin = _origin(file, scale, content)
        entry = self._entry(file, content)
        if origin and (kept := _load(entry, origin)) is not None:
            return kept
        image, short_side = decode_sized(file, SMALL_SIDE, scale=scale, content=content)
        if short_side <= LARGEST_KEPT_AS_IS or (small := _shrink(image)) is None:
            return image
        if origin:
            _store(entry, MAGIC + _digest(origin, small) + small)
        return decode_sized(file, SMALL_SIDE, content=small)[0]

    def lacks(self, file: Path, content: bytes | None = None) -> bool:
        """Whether `file` is a large image of which nothing is kept yet; only its header is read."""
        return is_large(file, content) and not self._entry(file, content).exists()

    def remove(self) -> None:
        """Delete what `make` and `read` have written, and the folder if nothing else lies in it."""
        for group in _listed(self.folder):
            if GROUP.fullmatch(group):
                for name in filter(ENTRY.fullmatch, _listed(self.folder / group)):
                    _delete(self.folder / group / name)
                with suppress(OSError):
                    (self.folder / group).rmdir()
            elif group.startswith(MARKER):
                _delete(self.folder / group)
        with suppress(OSError):
            self.folder.rmdir()

    def _entry(self, file: Path, content: bytes | None = None) -> Path:
        name = blake2b(_absolute(file) if content is None else content, digest_size=20).hexdigest()
        return self.folder / name[:2] / name[2:]


def refuse_foreign(folder: Path) -> None:
    """Raise `UsageError` for a folder that is neither empty nor a cache, `MachineError` if it cannot be looked at."""
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise UsageError(f"{shown(folder)}: is not a folder; give --cache a new or an empty one")
    try:
        if all(name.startswith(MARKER) and name.endswith(".part") for name in os.listdir(folder)):
            return  # empty, or another process is about to mark it
        marker = folder / MARKER
        is_ours = marker.is_file() and json.loads(marker.read_bytes()) == {"format": FORMAT}
    except OSError as error:
        raise _unusable(folder, error) from None
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise UsageError(
            f"{shown(folder)}: not empty, and no cache that this version made; give --cache a new or an empty folder"
        )


def is_large(file: Path, content: bytes | None = None) -> bool:
    """Whether a cache would keep the image small, by its header."""
    try:
        facts = image_facts(file, content)
    except BadImage:
        return False
    return min(facts.width, facts.height) > LARGEST_KEPT_AS_IS


def _unusable(folder: Path, error: OSError | ValueError) -> MachineError:
    reason = getattr(error, "strerror", None) or error
    return MachineError(f"{shown(folder)}: cannot be used as a cache ({reason}); choose another --cache")


def _absolute(file: Path) -> bytes:
    return os.fsencode(os.path.abspath(file))


def _origin(file: Path, scale: Scale, content: bytes | None = None) -> bytes | None:
    """Everything that decides the small image, or changes when it does; None when there is no such file."""
    if content is not None:
        return b"%b %b %b" % (blake2b(content).digest(), scale.encode(), MAKER.encode())
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return b"%d %d %b %b\0%b\0" % (
        status.st_size,
        status.st_mtime_ns,
        scale.encode(),
        MAKER.encode(),
        _absolute(file),
    )


def _shrink(image: Image.Image) -> bytes | None:
    """A JPEG of 512 px short side; None for the narrow image whose long side would then be beyond a JPEG."""
    factor = SMALL_SIDE / min(image.size)
    width, height = (round(side * factor) for side in image.size)
    if max(width, height) > MAX_JPEG_SIDE:
        return None
    stream = io.BytesIO()
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    small.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def _digest(origin: bytes, content: bytes) -> bytes:
    digest = blake2b(origin, digest_size=DIGEST_BYTES)
    digest.update(content)
    return digest.digest()


def _load(entry: Path, origin: bytes) -> Image.Image | None:
    """What is kept of this very original; None when that is missing, out of date, damaged, or something else."""
    size = file_size(os.fsencode(entry))  # opening a pipe would wait for ever
    if not size or size > MAX_ENTRY_BYTES:
        return None
    try:
        stored = entry.read_bytes()
    except OSError:
        return None
    start = len(MAGIC) + DIGEST_BYTES
    content = stored[start:]
    if stored[:start] != MAGIC + _digest(origin, content):
        return None
    try:
        image, short_side = decode_sized(entry, SMALL_SIDE, content=content)
    except BadImage:
        return None
    return image if short_side == SMALL_SIDE else None


def _store(entry: Path, stored: bytes) -> None:
    with suppress(OSError):
        entry.parent.mkdir(exist_ok=True)
        _write_whole(entry, stored)


def _write_whole(file: Path, content: bytes) -> None:
    """Whole or not at all, unless the machine stops: what is damaged then is found by its digest."""
    part = file.with_name(f"{file.name}.{os.getpid():x}.{os.urandom(4).hex()}.part")  # unique on several machines
    try:
        with part.open("xb") as stream:
            stream.write(content)
        os.replace(part, file)
    except BaseException:
        _delete(part)
        raise


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _delete(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)
