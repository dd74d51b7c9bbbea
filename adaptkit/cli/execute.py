"""What `adapt` and `resume` share: carry the run out, record how it ended, show the result."""

from __future__ import annotations

from dataclasses import asdict
from logging import DEBUG
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.failure import describe, recorded, report_failure
from adaptkit.cli.launch import count_processes, is_launched, launch
from adaptkit.cli.verbose import LOG
from adaptkit.errors import AdaptkitError, Collapsed, GainNotMet, UsageError

if TYPE_CHECKING:
    from adaptkit.run import Run


def execute(run: Run, as_json: bool, quiet: bool, gpus: int | None) -> None:
    """Carry out the run and print its result; with more than one GPU, have processes do so.

    A complete run whose result is not what was asked for (exit codes 5 and 6) is shown like any other; its error
    follows on stderr, and with `as_json` stands inside the one document.
    """
    from adaptkit.cli.console import RichReporter, is_main_process  # here, because `adaptkit --help` needs none of it

    finished, unwanted = run.read_json("report.json"), None
    if finished is not None:  # the report is written last: only showing it is left to do
        _show(run, finished, error_of(finished), as_json)
        return
    try:
        with recorded(run), RichReporter(quiet) as reporter:
            if not is_launched():  # else whoever launched it knows
                reporter.start(run.path)
            if is_main_process():
                run.status("running", None, "started")
            processes = count_processes(run, gpus)  # imports torch: the run directory exists by now
            if processes > 1:
                reporter.phase(f"starting {processes} processes")
                exit_code = launch(
                    run, processes, ["--json"] * as_json + ["--quiet"] * quiet + ["--verbose"] * LOG.isEnabledFor(DEBUG)
                )
            else:
                from adaptkit.train import run_adaptation

                report = run_adaptation(run, reporter).report
    except (GainNotMet, Collapsed) as error:
        written = run.read_json("report.json")
        if written is None:
            raise
        report, unwanted = written, error
    if processes > 1:  # which have shown it
        raise click.exceptions.Exit(exit_code)
    _show(run, report, unwanted, as_json)


def error_of(report: dict[str, Any]) -> AdaptkitError | None:
    """The error that a finished run ended with, if any."""
    try:
        verdict, message, required = report["verdict"], report["message"], report.get("require_gain")
        if verdict == "collapsed":
            return Collapsed(message)
        return GainNotMet(message) if required and not required["met"] else None
    except (KeyError, TypeError):
        raise UsageError("report.json: damaged; run again with `adaptkit adapt --overwrite`") from None


def _show(run: Run, report: dict[str, Any], unwanted: AdaptkitError | None, as_json: bool) -> None:
    from adaptkit.cli.summary import print_document, print_run

    failure = describe(unwanted) if unwanted else None
    if as_json:
        print_document(report | ({"error": asdict(failure)} if failure else {}))
    else:
        print_run(report, run.path)
    if unwanted and failure:
        raise click.exceptions.Exit(report_failure(unwanted, failure, as_json=False))
