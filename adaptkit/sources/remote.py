"""What lies behind URLs, by way of fsspec: one connection a process, asked again when it fails for a moment."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from adaptkit.errors import AdaptkitError, DataError, MachineError, UsageError
from adaptkit.places import scheme
from adaptkit.sources.source import BadImage, shown

PAUSES = (0.5, 2.0)  # seconds before asking again; most packages have tried several times themselves by then
THREADS = 16  # that ask at once for headers of shards
VERSION_KEYS = (  # what packages call it
    *("ETag", "etag", "md5Hash", "crc32c", "blob_id"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created"),
)
MAX_IMAGE_BYTES = 2**30  # one image out of a store is read whole

T = TypeVar("T")


class _Connection:
    """A file system of fsspec, made in the process that uses it: those that are asynchronous do not survive a fork."""

    def __init__(self, url: str) -> None:
        self.files: Any = url_to_fs(url)[0]
        self.is_down = False


@lru_cache(maxsize=8)
def _connect(url: str, process: int) -> _Connection:
    return _Connection(url)


@dataclass(frozen=True)
class Remote:
    """What can be reached like `url`; nothing is opened before the first question of a process."""

    url: str

    @classmethod
    def to(cls, urls: Sequence[str]) -> Remote:
        """What all of these can be reached by. Raises `DataError` when they lie on several servers, and as `stamp`."""
        first, *others = {url.split("/")[2]: url for url in urls}.values()
        for other in others:
            if cls(other)._options() != cls(first)._options():
                raise DataError(f"{shown(first)}, {shown(other)}: lie on two servers; name what lies on one")
        return cls(first)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Of an image: all of it, or bytes `start` to `stop`. Raises `BadImage`, after several tries."""
        try:
            return self._content(path, start, stop)
        except (AdaptkitError, MemoryError):  # the first comes from a signal handler
            raise
        except FileNotFoundError:
            raise BadImage(path, os.strerror(2)) from None
        except Exception as error:
            raise BadImage(path, f"cannot be reached ({_reason(error)})") from error

    def read_header(self, url: str, start: int, stop: int) -> bytes:
        """Bytes of a shard while it is indexed. Raises `DataError`, `MachineError`."""
        content = self._answer(url, lambda: self._content(url, start, stop))
        if len(content) > stop - start:
            raise MachineError(f"{shown(url)}: its server sends whole files only; copy the shards to a disk")
        return content

    def stamp(self, url: str) -> tuple[int, int]:
        """(what changes with the content, bytes) of one object. Raises `DataError`, `MachineError`, `UsageError`."""
        info: Mapping[str, Any] = self._answer(url, lambda: self._ask(lambda files: files.info(url)))
        if info.get("type") != "file" or not isinstance(info.get("size"), int):
            raise DataError(f"{shown(url)}: is not a file of known size; check the URL")
        known = repr([(key, str(info[key])) for key in VERSION_KEYS if info.get(key) is not None])
        version = int.from_bytes(blake2b(known.encode(), digest_size=8).digest(), "big", signed=True)
        return version, info["size"]

    def path(self, url: str) -> str:
        """The URL as the file system names it in its listings."""
        return str(self._answer(url, lambda: self._ask(lambda files: files._strip_protocol(url)))).rstrip("/")

    def files(self, url: str) -> Iterator[tuple[str, int]]:
        """(path, bytes) of all files below `url`, listed afresh. Raises `DataError`, `MachineError`, `UsageError`."""

        def find(files: Any) -> Mapping[str, Mapping[str, Any]]:
            files.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = files.find(url, detail=True)
            files.invalidate_cache()  # of a million files it would be a gigabyte
            return found

        for path, info in self._answer(url, lambda: self._ask(find)).items():
            if info.get("type") == "file":
                yield path, info.get("size") or 0

    def _options(self) -> object:
        return self._answer(self.url, lambda: _connect(self.url, os.getpid()).files.storage_options)

    def _content(self, path: str, start: int | None, stop: int | None) -> bytes:
        if stop is not None and start == stop:
            return b""  # no range that can be asked for
        return bytes(self._ask(lambda files: files.cat_file(path, start=start, end=stop)))

    def _ask(self, call: Callable[[Any], T]) -> T:
        """The answer of the file system; the last of several errors otherwise.

        After a failure the next question is asked once, until one is answered: when all is gone, a run ends in time.
        """
        connection = _connect(self.url, os.getpid())
        pauses = iter(() if connection.is_down else PAUSES)
        while True:
            try:
                answer = call(connection.files)
            except (AdaptkitError, FileNotFoundError, PermissionError, MemoryError):
                raise
            except Exception:
                pause = next(pauses, None)
                if pause is None:
                    connection.is_down = True
                    raise
                time.sleep(pause)
            else:
                connection.is_down = False
                return answer

    def _answer(self, url: str, question: Callable[[], T]) -> T:
        try:
            return question()
        except (AdaptkitError, MemoryError):
            raise
        except Exception as error:  # packages raise their own: botocore, aiohttp, ...
            raise _explained(url, error) from error


def _explained(url: str, error: Exception) -> AdaptkitError:
    name, place = scheme(url), shown(url)
    if isinstance(error, ImportError):
        package = (getattr(error.__cause__, "name", None) or error.name or name).partition(".")[0]
        return UsageError(f"{name}://...: needs {package}; pip install {package}")
    if name not in {*fsspec.available_protocols(), *fsspec.registry}:
        return UsageError(f"{name}://...: no such protocol; use s3://, gs://, hf:// or another one of fsspec")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{place}: no such place; check the URL")
    if isinstance(error, PermissionError):
        return MachineError(f"{place}: may not be read ({_reason(error)}); check the credentials")
    if isinstance(error, ValueError):
        return DataError(f"{place}: cannot be listed ({_reason(error)}); check the URL")
    return MachineError(f"{place}: cannot be reached ({_reason(error)}); check the network and the credentials")


def _reason(error: Exception) -> str:
    """One short line, without what a URL in it may hold of secrets."""
    text = re.sub(r"://[^/\s]*@", "://", re.sub(r"\?\S*", "", str(error)))
    text = shown(" ".join(text.split()))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
