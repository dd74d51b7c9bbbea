"""`adaptkit resume`: go on where a run stopped."""

from __future__ import annotations

import click

from adaptkit.cli.execute import error_of, execute
from adaptkit.cli.launch import check_gpus, gpus_option
from adaptkit.cli.options import as_json, quiet


@click.command("resume", short_help="Go on where a run stopped.")
@click.argument("run")
@gpus_option
@as_json
@quiet
def resume_command(run: str, gpus: int | None, as_json: bool, quiet: bool) -> None:
    """Go on where the run in the folder RUN stopped. Its recipe says everything; there is nothing to retype.

    Images, labels and weights must be those it began with. What else differs is noted, and kept in manifest.json.
    """
    from adaptkit.run import Run, read_status  # here, because `adaptkit --help` needs none of it

    check_gpus(gpus)
    opened = Run.open(run)
    report = opened.read_json("report.json")
    if report is None:
        opened.claim()
    elif read_status(opened.path).get("state") != "done":  # killed between report and record
        unwanted = error_of(report)
        opened.status("done", unwanted.exit_code if unwanted else 0, report["message"])
    execute(opened, as_json, quiet, gpus)
