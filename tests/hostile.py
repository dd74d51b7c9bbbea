"""What the tables of hostile inputs share: one line with its exit code, no waiting for ever, mutated bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adaptkit.cli.failure import describe
from adaptkit.errors import AdaptkitError

LONGEST_LINE = 600  # with the paths of the test in it

FEW = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


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


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals with pieces overwritten, cut out, repeated, or moved in from another."""
    content = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 4, 30, 300])))
        other = draw(st.sampled_from(originals))
        piece = draw(
            st.one_of(st.binary(max_size=8), st.just(content[start:end] * 2), st.just(other[start : end + 40]))
        )
        content = content[:start] + piece + content[end:]
    return content
