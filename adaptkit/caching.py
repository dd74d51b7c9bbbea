"""Whether a run keeps its large training images decoded small, where, and until when."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adaptkit.errors import MachineError
from adaptkit.estimate import StepCost
from adaptkit.processes import on_main
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.session import Reporter
from adaptkit.sources import BadImage, DecodeCache, FolderSource, evenly_spaced, is_large
from adaptkit.space import require_space

FOLDER = "cache"  # in the run directory
SAMPLED_HEADERS, TIMED_READS = 32, 16
BYTES_PER_IMAGE = 200_000
SPARE = 2  # `auto` leaves as much room again to the rest of the run


def settle_cache(
    run: Run,
    plan: Plan,
    images: FolderSource,
    accelerator: Accelerator,
    workers: int,
    cost: Callable[[], StepCost],
    reporter: Reporter,
) -> tuple[Run, Plan]:
    """`data.cache: auto` becomes `on` or `off`, and the recipe keeps it: a resumed run does the same.

    On where decoding the training images takes longer than training on them, they come more than once, at least half
    of them are large, and there is room. `cost` is asked only if the rest holds. The main process decides for all.
    """
    recipe = plan.recipe
    if recipe.data.cache != "auto":
        return run, plan
    (is_possible,) = broadcast_object_list([_is_possible(run.path, plan, images)])
    word = "off"
    if is_possible:
        step = cost().fed_seconds / (plan.batch_size // accelerator.num_processes)
        read = _read_seconds(images) / max(1, workers)
        (word,) = broadcast_object_list(["on" if read > step else "off"])
        if word == "on" and accelerator.is_main_process:
            where = f"up to {len(images):,} images decoded small in {run.path / FOLDER}"
            reporter.note(f"keeping {where}: decoding takes {1000 * read:.1f} ms an image, training {1000 * step:.1f}")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": word})})
    on_main(lambda: run.replace_recipe(recipe))
    return Run(run.path, recipe), replace(plan, recipe=recipe)


def open_cached(run: Run, images: FolderSource, accelerator: Accelerator, reporter: Reporter) -> FolderSource:
    """The training images as the recipe wants them read. Raises `UsageError`, `MachineError` as `DecodeCache.make`."""
    word = run.recipe.data.cache
    if word == "off":
        return images
    cache = DecodeCache.make(run.path / FOLDER if word == "on" else Path(word))
    if accelerator.is_main_process:
        missing = round(_share(images, cache.lacks) * len(images))
        try:
            require_space(cache.folder, missing * BYTES_PER_IMAGE, cache.folder)
        except MachineError as error:
            reporter.note(f"{error}; images that find no room are decoded anew every time")
    return replace(images, cache=cache)


def drop_cache(run: Run) -> None:
    """Remove the cache in the run directory; a folder that several runs share stays."""
    if run.recipe.data.cache == "on":
        DecodeCache(run.path / FOLDER).remove()


def _is_possible(path: Path, plan: Plan, images: FolderSource) -> bool:
    """What costs nothing to find out: images come again, at least half of those looked at are large, there is room."""
    if plan.total_steps <= plan.steps_per_epoch:
        return False
    if _share(images, is_large) < 0.5:
        return False
    try:
        require_space(path, SPARE * len(images) * BYTES_PER_IMAGE, path)
    except MachineError:
        return False
    return True


def _share(images: FolderSource, is_so: Callable[[Path, bytes | None], bool]) -> float:
    """Of the images, those of which it is so, from 32 that are looked at."""
    indices = evenly_spaced(len(images), SAMPLED_HEADERS).tolist()
    count = 0
    for index in indices:
        with suppress(BadImage):
            count += is_so(images.file(index), images.content(index))
    return count / len(indices)


def _read_seconds(images: FolderSource) -> float:
    """Of one process, per image."""
    indices = evenly_spaced(len(images), TIMED_READS).tolist()
    started = time.perf_counter()
    for index in indices:
        with suppress(BadImage):
            images.read(index)
    return (time.perf_counter() - started) / len(indices)
