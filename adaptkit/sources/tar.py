"""Where the files of a tar archive begin and end: headers of ustar, GNU and PAX archives, and nothing else.

Nothing is extracted: a name is only a name. Written for random access to shards of many small files, and for archives
that may be forged: every number is checked against the size of the archive before it is used, and nothing recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_NAME = 4_096
MAX_EXTENSION = 2**20  # bytes of one header's extended attributes
MAX_ZEROS = 2**24  # between two archives that were glued together; padding is shorter

NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
KIND, MAGIC, PREFIX = slice(156, 157), slice(257, 263), slice(345, 500)
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes; their size means nothing
LONG_NAME, SPARSE = b"L", b"S"
ATTRIBUTES = (b"x", b"X")  # of the next file: PAX, and Sun's older kind
SKIPPED = (b"g", b"K")  # attributes of all files, which name none; a long target of a link

Read = Callable[[int, int], bytes]


class DamagedTar(Exception):
    """No tar archive, or one that is cut off or damaged; says where."""


class _Window:
    """The part of an archive that was read last. Reads become longer as long as they follow on each other."""

    def __init__(self, read: Read, size: int, shortest: int, longest: int) -> None:
        self.read, self.size, self.shortest, self.longest = read, size, shortest, longest
        self.start, self.content, self.length = 0, b"", shortest

    def take(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, which never goes back. Raises `DamagedTar` where there are none."""
        first = start - self.start
        if first + length > len(self.content):
            skipped = first - len(self.content)
            self.length = min(2 * self.length, self.longest) if skipped <= self.length else self.shortest
            self.content = self.read(start, min(max(length, self.length), self.size - start))
            self.start = start
            first = 0
            if len(self.content) < length:
                raise DamagedTar(f"is cut off at byte {start + len(self.content)}")
        return self.content[first : first + length]


def members(read: Read, size: int, shortest: int, longest: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, bytes) of every regular file of an archive of `size` bytes, in its order.

    Links, devices and sparse files are left out. `read(start, length)` is asked for `shortest` to `longest` bytes, more
    as long as little lies between headers. Archives that were glued together count as one. Raises `DamagedTar`, also
    where the mark at the end is missing.
    """
    window = _Window(read, size, shortest, longest)
    position, num_zeros, is_over = 0, 0, False
    name, attributes = b"", dict[bytes, bytes]()
    while position < size and num_zeros <= MAX_ZEROS:
        header = window.take(position, min(BLOCK, size - position))
        if header == ZEROS[: len(header)]:
            num_zeros, is_over, position = num_zeros + BLOCK, True, position + BLOCK
            continue
        if not _is_header(header):
            if is_over:  # what follows the mark belongs to nothing
                return
            what = f"is cut off at byte {size}" if len(header) < BLOCK else f"is damaged at byte {position}"
            raise DamagedTar(what if position else "is not a tar file")
        num_zeros, is_over = 0, False
        kind, start = header[KIND], position + BLOCK
        if kind == SPARSE:
            start = _after_map(window, header, start)
        length = 0 if kind in WITHOUT_CONTENT else _length(header, kind, attributes, position)
        if start + length > size:
            raise DamagedTar(f"is cut off at byte {size}")
        if kind == LONG_NAME:
            name = _extension(window, start, length, position).partition(b"\0")[0]
        elif kind in ATTRIBUTES:
            attributes = _attributes(_extension(window, start, length, position), position)
        elif kind not in SKIPPED:
            if kind in REGULAR and not any(key.startswith(b"GNU.sparse.") for key in attributes):
                yield _short(attributes.get(b"path") or name or _name(header), position), start, length
            name, attributes = b"", {}
        position = start + length + -length % BLOCK
    if not is_over:
        raise DamagedTar(f"is cut off at byte {size} (no mark at the end)")


def _is_header(header: bytes) -> bool:
    """Whether the checksum is right; some old writers added signed bytes."""
    digits = header[CHECKSUM].strip(b" \0")
    if len(header) < BLOCK or not digits.isdigit() or digits.strip(b"01234567"):
        return False
    written = int(digits, 8)
    total = sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ")
    return written == total or written == total - 256 * sum(byte >= 128 for byte in header)


def _length(header: bytes, kind: bytes, attributes: dict[bytes, bytes], position: int) -> int:
    """Bytes of content in the archive: octal digits, a binary number after 0x80, or what an attribute says."""
    said = attributes.get(b"size")
    if said is not None and kind not in (LONG_NAME, *ATTRIBUTES, *SKIPPED):
        if said.isdigit() and len(said) < 20:
            return int(said)
        raise DamagedTar(f"is damaged at byte {position}")
    field = header[SIZE]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise DamagedTar(f"is damaged at byte {position}")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[NAME].partition(b"\0")[0]
    prefix = header[PREFIX].partition(b"\0")[0] if header[MAGIC] == b"ustar\0" else b""  # GNU keeps times there
    return prefix + b"/" + name if prefix else name


def _short(name: bytes, position: int) -> bytes:
    if len(name) > MAX_NAME:
        raise DamagedTar(f"has a name of {len(name)} bytes at byte {position}")
    return name


def _extension(window: _Window, start: int, length: int, position: int) -> bytes:
    if length > MAX_EXTENSION:
        raise DamagedTar(f"has attributes of {length} bytes at byte {position}")
    return window.take(start, length)


def _attributes(content: bytes, position: int) -> dict[bytes, bytes]:
    """PAX records, `LENGTH KEY=VALUE` and a line break, the length that of the whole record."""
    found = {}
    first = 0
    while first < len(content) and content[first]:
        space = content.find(b" ", first, first + 20)
        digits = content[first : max(space, first)]
        end = first + int(digits) if digits.isdigit() else 0
        if not first < space < end <= len(content) or content[end - 1] != ord("\n"):
            raise DamagedTar(f"is damaged at byte {position}")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        found[key] = value
        first = end
    return found


def _after_map(window: _Window, header: bytes, start: int) -> int:
    """Where the content of an old sparse file begins: after blocks that go on with the map of its holes."""
    has_more = header[482]
    while has_more:
        has_more = window.take(start, BLOCK)[504]
        start += BLOCK
    return start
