"""`adaptkit report`: build the readable report of a finished run anew."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import as_json, quiet
from adaptkit.errors import UsageError

if TYPE_CHECKING:
    from adaptkit.run import Run


@click.command("report", short_help="Build the report of a run anew.")
@click.argument("run", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of report.json instead.")
@as_json
@quiet
def report_command(run: str | None, schema: bool, as_json: bool, quiet: bool) -> None:
    """Build report.html and report.md of the finished run in the folder RUN anew, and say where they are.

    No image and no backbone is needed: the pictures are those that the run took at its end.
    """
    if schema == (run is not None):
        raise UsageError("give the folder of a run, or --schema alone")
    from adaptkit.cli.console import StreamConsole
    from adaptkit.cli.listing import line
    from adaptkit.cli.summary import print_document
    from adaptkit.page import NAME, write_page
    from adaptkit.report import render_markdown
    from adaptkit.report.schema import report_schema
    from adaptkit.run import Run

    if run is None:
        print_document(report_schema())
        return
    opened = Run.open(run)
    report = read_report(opened)
    opened.write("report.md", render_markdown(report))
    write_page(opened, report)
    if as_json:
        print_document(report)
    else:
        for name in (NAME, "report.md"):
            line(StreamConsole(sys.stdout), f"report    {opened.path / name}")


def read_report(run: Run) -> dict[str, Any]:
    """`report.json` of a run. Raises `UsageError` when the run has not finished, or the file is damaged."""
    from adaptkit.report.document import SCHEMA

    report = run.read_json("report.json")
    if report is None:
        raise UsageError(
            f"{run.path}: has not finished, so there is no report yet; go on with `adaptkit resume {run.path}`"
        )
    if report.get("schema") != SCHEMA:
        raise UsageError(f"{run.path / 'report.json'}: no {SCHEMA} document; restore it, or repeat the run")
    return report
