"""`adaptkit adapt`: resolve the recipe, make the run directory, then import torch and go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from adaptkit.cli.execute import execute
from adaptkit.cli.launch import check_gpus, gpus_option, processes_here
from adaptkit.cli.options import as_json, overrides, quiet, recipe_options
from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.requirement import check_wishes


@click.command("adapt", short_help="Adapt a backbone to a folder of images.")
@recipe_options
@gpus_option
@click.option("--output", metavar="FOLDER", help="The run directory.  [default: runs/ and a name from the data]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and how long it would take; write nothing.")
@as_json
@quiet
def adapt_command(
    output: str | None,
    recipe: str,
    assignments: tuple[str, ...],
    gpus: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Adapt a backbone to a folder of unlabelled images.

    The original backbone is probed first; the adapted one is exported only where it is better on images that
    neither training nor selection has seen. Labels, if given, are never trained on.

    Precedence: defaults, then the recipe, then options and --set. A run is repeated with `--recipe RUN/recipe.yaml`.
    """
    resolved = complete(load_recipe(recipe, overrides(flags), assignments))
    if output == "":
        raise UsageError("--output is empty; give it a folder, or leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and output is None:
        raise UsageError("several processes need one run directory; give --output FOLDER")
    check_wishes(resolved)
    check_gpus(gpus)
    folder = Path(output) if output is not None else None
    if dry_run:
        rehearse(resolved, folder, overwrite, as_json, quiet, gpus)
        return
    from adaptkit.run import Run  # here, because `adaptkit --help` needs none of it

    execute(Run.create(resolved, folder, overwrite), as_json, quiet, gpus)


def rehearse(
    recipe: Recipe, output: Path | None, overwrite: bool, as_json: bool, quiet: bool, gpus: int | None
) -> None:
    """Everything that `adapt` checks before its first step, and a forecast instead of the steps."""
    from adaptkit.cli.console import RichReporter
    from adaptkit.cli.summary import print_document, print_forecast
    from adaptkit.run import check_output

    if output is not None:
        check_output(output, overwrite)
    with RichReporter(quiet) as reporter:
        from adaptkit.estimate import dry_run  # imports torch

        document = dry_run(recipe, reporter, processes_here(gpus))
    if as_json:
        print_document(document)
    else:
        print_forecast(document)


def complete(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that it means the same from anywhere. Raises UsageError when the backbone
    or the images are not given."""
    if not recipe.backbone:
        raise UsageError("no backbone; give --backbone NAME, or `backbone:` in the recipe")
    if not recipe.data.path:
        raise UsageError("no images; give --data FOLDER, or `data:` in the recipe")
    return recipe.with_absolute_paths()
