"""Tar files for the tests: as python's tarfile writes them, and forged header by header."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

END = bytes(1024)


def write_tar(file: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with these (name, content)."""
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_shards(folder: Path, images: Path, count: int) -> str:
    """`folder/00.tar` and on: the files below `images`, dealt out, each with a label beside it; their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in images.rglob("*") if path.is_file())
    for number in range(count):
        members = []
        for path in files[number::count]:
            name = path.relative_to(images).as_posix()
            members += [(name, path.read_bytes()), (f"{name.rpartition('.')[0]}.cls", b"3")]
        write_tar(folder / f"{number:02d}.tar", members)
    return f"{folder}/{{00..{count - 1:02d}}}.tar"


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", prefix: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """One header with its checksum; `size` as a number, or the 12 bytes of its field."""
    field = b"%011o\0" % size if isinstance(size, int) else size
    fields = [name.ljust(100, b"\0"), b"0000644\0" + b"0000000\0" * 2, field, b"0" * 11 + b"\0", b" " * 8, kind]
    block = b"".join([*fields, bytes(100), magic, bytes(64) + b"0000000\0" * 2, prefix]).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One attribute of a PAX header."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest
