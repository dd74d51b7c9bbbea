"""What a resumed run finds in `checkpoints/`: the checkpoint to go on from, and files that no checkpoint names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoints import LAST, PREVIOUS, candidate_file, load_state
from adaptkit.errors import DataError
from adaptkit.recipe import Recipe
from adaptkit.run import Run
from adaptkit.select import Candidate, best, choose
from adaptkit.session import Reporter, TrainState

SHOWN = 5


@dataclass(frozen=True)
class Found:
    """What a checkpoint names and says, but for its tensors."""

    candidates: tuple[Candidate, ...] = ()
    recipe: Any = None

    @classmethod
    def read(cls, file: Path) -> Found:
        """Raises `DataError` if the checkpoint is damaged."""
        state = load_state(file)
        train, _ = TrainState.read(file, state)
        try:
            return cls(tuple(map(Candidate.from_json, train.candidates)), state.get("recipe"))
        except (KeyError, TypeError):
            raise DataError(f"{file}: damaged checkpoint; start again with --overwrite") from None


def recover(run: Run, reporter: Reporter) -> None:
    """Leave a sound `last`, or no checkpoint where nothing was learnt, and no candidate that nothing names.

    `previous` takes the place of a damaged `last`. Raises `DataError` if there is none that is sound, or if a
    candidate that the end of the run will need is damaged. For the main process, before anything is computed.
    """
    last, previous = run.path / LAST, run.path / PREVIOUS
    before = _sound_previous(previous, reporter)
    try:
        found = Found.read(last) if before or last.exists() else Found()
    except DataError:
        if before is None:
            raise
        reporter.note(f"{last}: damaged checkpoint; going on from the one before")
        os.replace(previous, last)
        found = before
    if changed := recipe_changes(found.recipe, run.recipe):
        reporter.note(f"{run.path / 'recipe.yaml'}: {changed} since the last checkpoint")
    for step in {candidate.step for candidate in (best(found.candidates), choose(found.candidates)) if candidate}:
        load_state(candidate_file(last.parent, step))
    drop_orphans(last.parent, [*found.candidates, *(before.candidates if before else ())])


def drop_orphans(folder: Path, named: Iterable[Candidate]) -> None:
    """Remove the files of candidates that are not `named`, which a kill or a collapse left behind."""
    kept = {candidate_file(folder, candidate.step) for candidate in named}
    for file in folder.glob("candidate-*.safetensors"):
        if file not in kept:
            file.unlink(missing_ok=True)


def recipe_changes(before: Any, recipe: Recipe) -> str:
    """`steps 100 -> 10, ...`: settings may be edited, but nobody should get others by a file that was cut off.

    Empty when nothing changed, or for a checkpoint that does not say what it was made by.
    """
    if not isinstance(before, Mapping):
        return ""
    old, now = dict(_flat(before)), dict(_flat(recipe.model_dump(mode="json")))
    changed = [f"{key} {old[key]} -> {now[key]}" for key in now if key in old and old[key] != now[key]]
    return ", ".join(changed[:SHOWN] + ["..."] * (len(changed) > SHOWN))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sound_previous(previous: Path, reporter: Reporter) -> Found | None:
    """None if it is not there, or was damaged and therefore removed."""
    if not previous.exists():
        return None
    try:
        return Found.read(previous)
    except DataError:
        reporter.note(f"{previous}: damaged checkpoint; removed")
        previous.unlink()
        return None
