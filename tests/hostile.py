"""What the tables of hostile inputs share: one line with its exit code, no waiting for ever."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from adaptkit.cli.failure import describe
from adaptkit.errors import AdaptkitError

LONGEST_LINE = 600  # with the paths of the test in it


def assert_one_line(error: AdaptkitError) -> None:
    """What a terminal and `status.json` get: one printable line of bounded length."""
    line = describe(error).message
    assert line.isprintable()
    assert 0 < len(line) <= LONGEST_LINE, line


def refused(kind: type[AdaptkitError], exit_code: int, words: str, read: Callable[[], object]) -> str:
    """`read` ends with exactly this kind of error; returns its text."""
    with pytest.raises(AdaptkitError, match=words) as caught:
        read()
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert_one_line(caught.value)
    return str(caught.value)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what waits for ever. SystemExit, because nothing that reads files may swallow it."""

    def give_up(*_: object) -> None:
        raise SystemExit("it waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
