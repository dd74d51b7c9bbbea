"""Counts the images of a run that cannot be read, writes them down, and stops when they are too many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from adaptkit.errors import DataError, MachineError
from adaptkit.sources.source import shown

ALWAYS_ACCEPTED = 5


class BadImages:
    """Unique bad paths of a run, each one line `{"path", "reason"}` of `bad_images.jsonl`.

    `max_bad` is a number (`12`) or a share of `num_images` (`1%`); five are always accepted. An existing file is read
    first, so that a resumed run goes on counting. If it lists too many, it ended the run: they are counted anew, for
    those that nobody mended are found again. Of several processes that count the same, one `writes`. Raises
    `DataError` when more are bad, `MachineError` when the file cannot be read or written.
    """

    def __init__(self, file: Path | None, num_images: int, max_bad: str, writes: bool = True) -> None:
        self.paths: set[str] = set()
        self._listed: set[str] = set()
        self._file, self._writes = file, writes
        self._num_images = num_images
        self._max_bad = max_bad
        self._accepted = max(ALWAYS_ACCEPTED, _count(max_bad, num_images))
        self._first = ""
        if file is not None:
            for path, reason in _load(file):
                self._note(path, reason)
            self._listed = set(self.paths)
            if writes:
                _append(file, "")  # an empty list is there too: it says that no image was bad
            if len(self.paths) > self._accepted:
                self.paths, self._first = set(), ""

    def add(self, path: str, reason: str) -> None:
        """Count and write down one bad image; a path already known is not counted again."""
        if path in self.paths:
            return
        self._note(path, reason)
        if self._file is not None and self._writes and path not in self._listed:
            # ASCII: a name that is not UTF-8 becomes an escaped surrogate and reads back
            _append(self._file, json.dumps({"path": path, "reason": reason}) + "\n")
        self._check()

    def add_all(self, failures: Iterable[tuple[str, str]]) -> None:
        """`add` for every (path, reason)."""
        for path, reason in failures:
            self.add(path, reason)

    def _note(self, path: str, reason: str) -> None:
        self._first = self._first or f"{shown(path)} ({reason})"
        self.paths.add(path)

    def _check(self) -> None:
        if len(self.paths) > self._accepted:
            where = f"; all in {shown(self._file)}" if self._file is not None else ""
            raise DataError(
                f"{len(self.paths)} of {self._num_images} images cannot be used, {self._accepted} are accepted "
                f"(max_bad {self._max_bad}); first: {self._first}{where}; mend or remove them, or raise --max-bad"
            )


def _count(max_bad: str, num_images: int) -> int:
    # 1e-9: 2.3 % of 3,000 is 69, not 68.999...
    count = num_images * float(max_bad[:-1]) / 100 + 1e-9 if max_bad.endswith("%") else float(max_bad)
    return int(min(num_images, count))  # a number of 400 digits is infinite


def _load(file: Path) -> list[tuple[str, str]]:
    """The entries so far; a last line cut off by a crash is removed, for the next one must not be glued to it."""
    try:
        content = file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(file, complete)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MachineError(f"{shown(file)}: cannot be read ({error.strerror})") from error
    try:
        entries = [json.loads(line) for line in content[:complete].splitlines()]
        return [(str(entry["path"]), str(entry["reason"])) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{shown(file)}: damaged; delete it, bad images will be found again") from None


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="ascii") as lines:
            lines.write(text)
    except OSError as error:
        raise MachineError(f"{shown(file)}: cannot be written ({error.strerror})") from error
