"""Several processes at the same moment: one of them writes a run, all of them share a cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
from conftest import picture, write_folder
from PIL import Image
from tiny_runs import adapt, assert_same_run, environment, flags, read

from adaptkit import schedules
from adaptkit.recipe import load_recipe

pytestmark = pytest.mark.long

TOGETHER = 4
ROUNDS = 12

CREATE = """
import sys
from pathlib import Path
from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe
from adaptkit.run import Run

number, overwrite = int(sys.argv[1]), sys.argv[2] == "overwrite"
print("ready", flush=True)
for line in sys.stdin:
    try:
        Run.create(Recipe(data="/images", backbone="vit", seed=number, batch_size=16), Path(line.strip()), overwrite)
        print("mine", flush=True)
    except UsageError as error:
        print(error, flush=True)
"""

READ = """
import sys
from hashlib import blake2b
from pathlib import Path
from random import Random
from adaptkit.sources import DecodeCache

number, folder, images = int(sys.argv[1]), Path(sys.argv[2]), sorted(Path(sys.argv[3]).iterdir())
print("ready", flush=True)
for line in sys.stdin:
    cache, random, digests = DecodeCache.make(folder / line.strip()), Random(number), {}
    for _ in range(3):
        for file in random.sample(images, len(images)):
            image = cache.read(file, "range")
            digests.setdefault(file.name, set()).add(blake2b(image.tobytes(), digest_size=8).hexdigest())
        if number == 0:  # it also takes away and damages what the others are about to read
            for entry in sorted(cache.folder.rglob("??????????????????????????????????????"))[::2]:
                random.choice([entry.unlink, lambda: entry.write_bytes(b"cut off")])()
    print(sorted((name, *found) for name, found in digests.items()), flush=True)
"""

RUN = """
import sys
import torch
import adaptkit.train
from adaptkit import schedules
from adaptkit.cli import main

schedules.MIN_REFIT_STEPS = 2
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:], prog_name="adaptkit")
"""


@contextmanager
def processes(script: str, arguments: list[list[object]]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each list of arguments; all have said that they are ready."""
    with ExitStack() as stack:
        started = []
        for words in arguments:
            command = [sys.executable, "-c", script, *map(str, words)]
            process = subprocess.Popen(
                command, env=environment(), text=True, stdin=-1, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert stream(process.stdout).readline() == "ready\n", stream(process.stderr).read()
        yield started


def stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def answers(started: list[subprocess.Popen[str]], line: object) -> list[str]:
    """What each says when all are given the same line at once."""
    for process in started:
        stream(process.stdin).write(f"{line}\n")
        stream(process.stdin).flush()
    return [stream(process.stdout).readline().strip() for process in started]


@pytest.mark.parametrize("how", ["new", "overwrite"])
def test_of_those_that_begin_a_run_at_once_exactly_one_does(how: str, tmp_path: Path) -> None:
    winners = set()
    with processes(CREATE, [[number, how] for number in range(TOGETHER)]) as started:
        for index in range(ROUNDS):
            run = tmp_path / "runs" / str(index)
            said = answers(started, run)
            assert said.count("mine") == 1, said
            winner = said.index("mine")
            winners.add(winner)
            expected = f"still running as process {started[winner].pid}" if how == "overwrite" else "not empty"
            assert all(expected in line for line in said if line != "mine"), said
            assert sorted(path.name for path in run.iterdir()) == ["recipe.yaml", "status.json"]
            assert load_recipe(run / "recipe.yaml").seed == winner
            assert read(run, "status.json")["pid"] == started[winner].pid


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images that are large enough to be kept, and one that is not."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(6):
        picture(90, 110, index).resize((880 + index, 720), Image.Resampling.BICUBIC).save(root / f"{index}.jpg")
    picture(40, 40).save(root / "small.png")
    return root


def test_processes_that_share_a_cache_see_the_same_pixels(photos: Path, tmp_path: Path) -> None:
    with processes(READ, [[number, tmp_path, photos] for number in range(TOGETHER)]) as started:
        alone = answers(started[1:2], "alone")[0]
        assert alone.count("jpg") == 6
        for name in ("one", "two", "three"):
            assert answers(started, name) == [alone] * TOGETHER
            assert not list((tmp_path / name).rglob("*.part"))
            assert json.loads((tmp_path / name / "adaptkit-cache.json").read_text()) == {"format": "adaptkit.cache/1"}


@pytest.mark.slow
def test_whole_runs_that_share_a_cache_and_two_that_want_one_folder(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with the same output and one beside them: two are done, and end as one that was alone."""
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    data = write_folder(tmp_path / "data", classes=2, per_class=12, px=660)
    alone = adapt(vit, data, tmp_path / "alone", data__cache="on").run

    def words(output: str) -> list[object]:
        where = ["--backbone", vit, "--data", data, "--output", tmp_path / output, "--cache", tmp_path / "cache"]
        return ["adapt", *where, *flags(), "--quiet"]

    with processes(RUN, [words("same"), words("same"), words("other")]) as started:
        for process in started:
            stream(process.stdin).write("\n")
            stream(process.stdin).flush()
        errors = [process.communicate(timeout=300)[1] for process in started]
        codes = [process.returncode for process in started]
    assert (sorted(codes[:2]), codes[2]) == ([0, 2], 0), errors
    loser = errors[codes.index(2)]
    assert loser.startswith(f"error: {tmp_path / 'same'}: not empty; add --overwrite")
    assert loser.count("\n") == 1
    for name in ("same", "other"):
        assert read(tmp_path / name, "status.json")["state"] == "done"
        assert not list((tmp_path / name).rglob("*.part"))
        assert_same_run(alone, tmp_path / name)
    assert not list((tmp_path / "cache").rglob("*.part"))
