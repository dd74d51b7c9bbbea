"""`adaptkit resume`: go on where a run stopped."""

from __future__ import annotations

import click

from adaptkit.cli.execute import execute
from adaptkit.cli.options import as_json, quiet


@click.command("resume", short_help="Go on where a run stopped.")
@click.argument("run")
@as_json
@quiet
def resume_command(run: str, as_json: bool, quiet: bool) -> None:
    """Go on where the run in the folder RUN stopped. Its recipe says everything; there is nothing to retype.

    Images, labels and weights must be those it began with. What else differs is noted, and kept in manifest.json.
    """
    from adaptkit.run import Run  # here, because `adaptkit --help` needs none of it

    execute(Run.open(run), as_json, quiet)
