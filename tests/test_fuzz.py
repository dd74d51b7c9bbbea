"""A short form of tests/fuzz: damaged files of every kind, the same ones every time."""

from __future__ import annotations

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from fuzz.mutate import mutate, split
from fuzz.targets import Target, all_targets, images, told, weights
from fuzz.watch import attack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptkit.errors import DataError, UsageError

FEW = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LINES = b"seed: 1\nepochs: 2\n"
NAMES = ("recipe", "labels", "images", "weights", "checkpoints")


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    with TemporaryDirectory() as folder:
        return all_targets(Path(folder))


def attack_silently(target: Target, content: bytes, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but a result or one line, and not a word on the terminal."""
    attack(target, content, base)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_sound_files_are_read_in_silence(
    name: str, targets: dict[str, Target], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert set(targets) == set(NAMES)
    for content in targets[name].originals:
        attack_silently(targets[name], content, tmp_path, capfd)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_give_a_result_or_one_line(
    name: str, targets: dict[str, Target], tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    target = targets[name]

    @FEW
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        content = mutate(Random(seed), target.originals, target.words)
        attack_silently(target, content, tmp_path_factory.mktemp("fuzz"), capfd)

    run()


@pytest.mark.parametrize("content", [*images()[:2], images()[7], *weights()[:4:3], LINES], ids=range(6))
def test_files_come_apart_and_together_again(content: bytes) -> None:
    parts = split(content)
    assert parts is not None
    assert len(parts[0]) >= 2
    again = split(parts[1](parts[0]))
    assert again is not None
    assert again[0] == parts[0]


def test_what_is_no_error_of_ours_is_found() -> None:
    def fail() -> None:
        raise ValueError("unforeseen")

    def shout() -> None:
        raise DataError("x" * 1000)

    with pytest.raises(ValueError, match="unforeseen"):
        told(DataError, fail)
    with pytest.raises(AssertionError):
        told(DataError, shout)
    with pytest.raises(DataError):
        told(UsageError, shout)


def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    def litter(content: bytes, folder: Path) -> None:
        Path("ran").touch()

    with pytest.raises(AssertionError, match=r"wrote \['ran'\]"):
        attack(Target([b""], litter), b"", tmp_path)
