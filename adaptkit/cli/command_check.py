"""`adaptkit check`: find what would spoil a run, before it begins."""

from __future__ import annotations

from typing import Any

import click

from adaptkit.cli.command_adapt import complete
from adaptkit.cli.failure import describe, report_failure
from adaptkit.cli.options import as_json, overrides, quiet, recipe_options
from adaptkit.recipe import load_recipe


@click.command("check", short_help="Find what would spoil a run, before it begins.")
@recipe_options
@as_json
@quiet
def check_command(recipe: str, assignments: tuple[str, ...], as_json: bool, quiet: bool, **flags: Any) -> None:
    """Look at everything that `adapt` with the same options would begin with, and write nothing.

    Images that cannot be used, are too small, or come twice; labelled images that training would see; the weights;
    the splits; steps, time and memory, measured; and facts for the question whether adaptation is worth it. Exit code
    0: a run can start, warnings or not. Otherwise the code it would end with. Of more than 5,000 images a sample is
    looked at.
    """
    resolved = complete(load_recipe(recipe, overrides(flags), assignments))
    from adaptkit.cli.check_page import print_check
    from adaptkit.cli.console import RichReporter
    from adaptkit.cli.launch import processes_here
    from adaptkit.cli.summary import print_document

    with RichReporter(quiet) as reporter:
        from adaptkit.preflight import check_recipe  # imports torch

        result = check_recipe(resolved, reporter, processes_here())
    if as_json:
        print_document(result.document)
    else:
        print_check(result.document)
    if result.error is not None:
        raise click.exceptions.Exit(report_failure(result.error, describe(result.error), as_json=False))
