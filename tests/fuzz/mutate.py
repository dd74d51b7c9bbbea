"""Damages files: bytes anywhere, and the parts a format is made of, put together again so that its checks pass."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MAX_BYTES = 1 << 16  # mutants do not grow for ever

Join = Callable[[list[bytes]], bytes]


def mutate(random: Random, originals: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One of the originals, damaged one to four times; `words` are what the format itself would say."""
    content = random.choice(originals)
    for _ in range(random.randint(1, 4)):
        parts = split(content) if random.randint(0, 1) else None
        if parts is not None and parts[0]:
            content = _reorder(random, parts[0], parts[1], originals, words)
        else:
            content = _damage(random, content, originals, words)
    return content[:MAX_BYTES]


def _damage(random: Random, content: bytes, originals: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    start = random.randint(0, len(content))
    end = min(len(content), start + random.choice((0, 1, 2, 4, 30, 300)))
    kind = random.randint(0, 6)
    if kind == 0:
        return content[:start]
    if kind == 1 and content:
        at = min(start, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << random.randint(0, 7)]) + content[at + 1 :]
    if kind == 2:
        code = random.choice(("<B", "<H", ">H", "<I", ">I"))
        number = random.choice(NUMBERS) & (256 ** struct.calcsize(code) - 1)
        return content[:start] + struct.pack(code, number) + content[start + struct.calcsize(code) :]
    if kind == 3:
        return content[:start] + content[start:end] * random.choice((0, 2, 5)) + content[end:]
    if kind == 4:
        other = random.choice(originals)
        at = random.randint(0, len(other))
        return content[:start] + other[at : at + random.choice((4, 40, 400))] + content[end:]
    if kind == 5 and words:
        return content[:start] + random.choice(words) + content[end:]
    return content[:start] + bytes(random.randint(0, 255) for _ in range(random.randint(0, 8))) + content[end:]


def _reorder(
    random: Random, parts: list[bytes], join: Join, originals: Sequence[bytes], words: Sequence[bytes]
) -> bytes:
    """Parts swapped, dropped, repeated, or one of them damaged."""
    parts, one, two = list(parts), random.randrange(len(parts)), random.randrange(len(parts))
    kind = random.randint(0, 4)
    if kind == 0:
        parts[one], parts[two] = parts[two], parts[one]
    elif kind == 1:
        del parts[one]
    elif kind == 2:
        parts.insert(two, parts[one])
    else:
        parts[one] = _damage(random, parts[one], originals, words)
    return join(parts)


def split(content: bytes) -> tuple[list[bytes], Join] | None:
    """The parts of a file, and what makes a file of parts; None where only bytes are known."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _chunks(content[8:], ">"), _join_png
    if content.startswith(b"RIFF"):
        return _chunks(content[12:], "<"), _join_webp
    if content.startswith(b"\xff\xd8"):
        return re.split(rb"(?=\xff[\xc0-\xfe])", content), b"".join
    if content.startswith(b"II*\0"):
        return _tags(content)
    if content.startswith(b"PK\3\4"):
        return _members(content)
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        end = 8 + int.from_bytes(content[:8], "little")
        pieces = re.split(rb"(?<=[,{}\[\]:])|(?=[,{}\[\]:])", content[8:end])
        return pieces, lambda parts: _with_length(b"".join(parts)) + content[end:]
    if b"\0" not in content:
        return re.split(rb"(?<=\n)", content), b"".join
    return None


def _chunks(content: bytes, order: str) -> list[bytes]:
    """PNG's and RIFF's chunks, each as its name and its content."""
    chunks, at = [], 0
    while at + 8 <= len(content):
        first, second = content[at : at + 4], content[at + 4 : at + 8]
        name, length = (second, first) if order == ">" else (first, second)
        size = struct.unpack(f"{order}I", length)[0]
        chunks.append(name + content[at + 8 : at + 8 + size])
        at += 8 + size + (4 if order == ">" else size % 2)
    return chunks


def _join_png(parts: list[bytes]) -> bytes:
    chunks = (struct.pack(">I", max(0, len(p) - 4)) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _join_webp(parts: list[bytes]) -> bytes:
    chunks = [p[:4] + struct.pack("<I", max(0, len(p) - 4)) + p[4:] + bytes(len(p) % 2) for p in parts]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tags(content: bytes) -> tuple[list[bytes], Join] | None:
    """The entries of a TIFF's first directory."""
    at = int.from_bytes(content[4:8], "little")
    if at + 2 > len(content):
        return None
    start = at + 2
    end = start + 12 * int.from_bytes(content[at:start], "little")
    tags = [content[place : place + 12] for place in range(start, min(end, len(content)), 12)]

    def join(parts: list[bytes]) -> bytes:  # where the pixels lie must stay true: the directory goes to the end
        place = struct.pack("<I", len(content))
        return content[:4] + place + content[8:] + struct.pack("<H", len(parts)) + b"".join(parts) + bytes(4)

    return tags, join


def _members(content: bytes) -> tuple[list[bytes], Join] | None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            members = [archive.read(name) for name in names]
    except Exception:  # damaged before
        return None

    def join(parts: list[bytes]) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, part in zip(names, parts, strict=False):
                archive.writestr(name, part)
        return stream.getvalue()

    return members, join


def _with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header
