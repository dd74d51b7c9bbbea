"""`adaptkit codes`: what the binary language of a finished run says."""

from __future__ import annotations

from typing import Any

import click

from adaptkit.cli.options import METAVARS, PRECISIONS, Words, as_json, field_of, quiet, refuse_empty, setting


@click.command("codes", short_help="Say what the binary codes of a run mean.")
@click.argument("run")
@click.option("--data", multiple=True, metavar=METAVARS["data"], help="Images to describe.  [default: the run's own]")
@click.option(
    "--labels",
    metavar=METAVARS["labels"],
    help="Labelled images, to search and to explain bits by.  [default: the run's own, or class folders of --data]",
)
@click.option("--attributes", metavar="CSV", help="Table with a column path and one or more of attributes.")
@setting("seed", type=click.IntRange(min=0), default=0)
@click.option("--precision", type=Words(PRECISIONS), default="fp32", show_default=True, help="Of embeddings.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=field_of("probe.batch_size").default,
    show_default=True,
    help="Images per forward pass.",
)
@setting("workers", type=click.IntRange(min=0))
@as_json
@quiet
def codes_command(
    run: str,
    data: tuple[str, ...],
    labels: str | None,
    attributes: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the binary codes of the finished run in the folder RUN: entropy, duplicate bits, retrieval, meaning.

    Writes codes.json and a section of report.html in which one can look at every bit. At most 5,000 images, drawn by
    the seed, are embedded; labels and attributes only measure.
    """
    refuse_empty()
    from adaptkit.cli.codes_page import print_codes
    from adaptkit.cli.command_report import read_report
    from adaptkit.cli.console import RichReporter
    from adaptkit.cli.summary import print_document
    from adaptkit.page import write_page
    from adaptkit.run import Run

    opened = Run.open(run)
    report = read_report(opened)
    with RichReporter(quiet) as reporter:
        reporter.phase("loading the backbone")
        from adaptkit.language import describe  # imports torch

        language = describe(opened, data=data, labels=labels, attributes=attributes, reporter=reporter, **options)
        language.write(opened)
        write_page(opened, report)
    if as_json:
        print_document(language.document)
    else:
        print_codes(language.document, opened.path)
