"""What `--data` may name, read off the text: folders and lists of files, tar shards, URLs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from adaptkit.errors import DataError, UsageError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
PASSWORD = re.compile(r"://[^/@:]*:(?!\d+/)[^@]*@")
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_SHARDS = 100_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

FILES, TAR = "folders and lists", "tar shards"


def scheme(place: str) -> str:
    """`s3` of `s3://bucket/images`; empty for what is no URL."""
    match = URL.match(place)
    return match[1].lower() if match else ""


def absolute(place: str | os.PathLike[str]) -> str:
    """The place as seen from anywhere; links, URLs and braces stay. Raises as `refuse_secrets`."""
    text = os.fspath(place)
    if scheme(text):
        refuse_secrets(text)
        return text
    return os.path.abspath(text)


def refuse_secrets(url: str) -> None:
    """Raise `UsageError` for a URL that recipes and messages must not repeat, or that is several in one."""
    start = f"{scheme(url)}://..."
    if PASSWORD.search(url) or "?" in url:
        raise UsageError(
            f"{start}: holds a password or a query, which the run directory would keep; "
            "leave it out, and give credentials in the environment"
        )
    if "::" in url:
        raise UsageError(f"{start}: chained URLs (::) are not supported; name the images or the tar shards themselves")


def kind_of(places: Sequence[str]) -> tuple[str, str]:
    """(scheme, or empty; `FILES` or `TAR`) of all the places.

    Raises `DataError` when they are of several kinds, and as `refuse_secrets`.
    """
    for url in filter(scheme, places):
        refuse_secrets(url)
    kinds = {place: (scheme(place), TAR if shards_of(place) else FILES) for place in places}
    first = places[0]
    for place, kind in kinds.items():
        if kind != kinds[first]:
            words = (f"{_word(*kinds[first])} and {_word(*kind)}", "images must be of one kind")
            raise DataError(f"{_line(first)}, {_line(place)}: are {words[0]}; {words[1]}, so leave one out")
    return kinds[first]


def shards_of(place: str) -> list[str]:
    """The names of tar files that a place stands for, sorted; none when it is something else.

    `{000..099}` is a range, with as many digits as its longer end if one of them begins with 0; `{a,b}` are
    alternatives. Raises `UsageError` for more than 100,000 names.
    """
    if not scheme(place) and os.path.isdir(place):
        return []
    names = [place] if not scheme(place) and os.path.exists(place) else expand(place)
    return names if all(name.lower().endswith((".tar", *COMPRESSED)) for name in names) else []


def expand(pattern: str) -> list[str]:
    """Every text that the braces of a pattern allow, once each, sorted."""
    found, pending = set[str](), [pattern]
    while pending:
        text = pending.pop()
        match = BRACES.search(text)
        if match is None:
            found.add(text)
            continue
        choices = [choice for part in match[1].split(",") for choice in _choices(part, pattern)]
        if len(choices) + len(pending) + len(found) > MAX_SHARDS:
            raise _too_many(pattern)
        pending += [text[: match.start()] + choice + text[match.end() :] for choice in choices]
    return sorted(found)


def common_folder(folders: Sequence[str]) -> str:
    """The folder, or URL, that all of these lie in or are."""
    if len(set(folders)) == 1:
        return folders[0]
    if scheme(folders[0]):
        start = common_start(folders)
        return start if "://" in start else f"{scheme(folders[0])}://"  # buckets have no common parent
    return os.path.commonpath([os.path.abspath(folder) for folder in folders])


def common_start(paths: Sequence[str]) -> str:
    """The parts between slashes that all of the paths begin with."""
    parts = [path.split("/") for path in paths]
    count = next((i for i, each in enumerate(zip(*parts, strict=False)) if len({*each}) > 1), min(map(len, parts)))
    return "/".join(parts[0][:count])


def short_name(place: str) -> str:
    """The last part of a place; of a pattern of shards that of their folder."""
    path = Path(URL.sub("", place))
    return path.parent.name if BRACES.search(path.name) else path.name


def _choices(part: str, pattern: str) -> list[str]:
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise _too_many(pattern)
    is_padded = any(len(end) > 1 and end.startswith("0") for end in match.groups())
    width = max(map(len, match.groups())) if is_padded else 0
    return [f"{number:0{width}d}" for number in range(min(first, last), max(first, last) + 1)]


def _too_many(pattern: str) -> UsageError:
    return UsageError(f"{_line(pattern)}: stands for more than {MAX_SHARDS:,} files; check the braces")


def _word(protocol: str, kind: str) -> str:
    return kind if not protocol else f"{protocol}:// {kind if kind == TAR else 'images'}"


def _line(place: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in place)[:200]
