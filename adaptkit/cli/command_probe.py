"""`adaptkit probe`: evaluate a backbone on labelled images, or compare two."""

from __future__ import annotations

from typing import Any

import click

from adaptkit.cli.options import as_json, embedding_options, quiet, refuse_empty
from adaptkit.errors import UsageError

MOST_BACKBONES = 2
DEFAULTS = ("knn", "linear", "retrieval", "rank")  # a test compares them with the probes there are
NAMES = (
    *DEFAULTS,
    *("few-shot", "clustering", "alpha-req", "lidar", "drift"),
    *("segmentation", "objects", "video"),
)


@click.command("probe", short_help="Evaluate a backbone, or compare two.")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    required=True,
    metavar="NAME|FOLDER",
    help="Backbone to evaluate; given twice, the second is compared with the first, image by image.",
)
@click.option("--data", required=True, metavar="FOLDER|CSV", help="Labelled images: gallery and training set.")
@click.option("--queries", metavar="FOLDER|CSV", help="Labelled images to score.  [default: test/, or half of --data]")
@click.option(
    "--metric",
    "metrics",
    metavar="NAME,...",
    help=f"Probes to run, as in knn,retrieval ({', '.join(NAMES)}).  [default: {','.join(DEFAULTS)}]",
)
@click.option("--reference", metavar="FOLDER|CSV", help="Run the probes on these too: what the second has forgotten.")
@click.option("--cache", metavar="FOLDER", help="Keep embeddings here and use those that are there.")
@embedding_options
@as_json
@quiet
def probe_command(
    backbones: tuple[str, ...],
    data: str,
    queries: str | None,
    metrics: str | None,
    reference: str | None,
    cache: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evaluate a backbone on labelled images, with 95 % intervals; two --backbone are compared, paired.

    Labelled images are folders of class folders, or a CSV with the header `path,label`. With train/ and test/ inside
    --data, train is the gallery and test is scored; otherwise a stratified half is, chosen by the seed. The probes
    segmentation, objects and video read --data in layouts of their own, each in a command of its own.
    """
    refuse_empty()
    if len(backbones) > MOST_BACKBONES:
        raise UsageError(f"--backbone is given {len(backbones)} times; give one, or two to compare")
    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    if names == []:
        raise UsageError("--metric names no probe; write for example --metric knn,retrieval")
    from adaptkit.cli.console import RichReporter
    from adaptkit.cli.summary import print_document, print_probe

    options |= {"reference": reference, "cache": cache}
    given = {name: value for name, value in options.items() if value is not None}
    with RichReporter(quiet) as reporter:
        reporter.phase(f"probing {' and '.join(backbones)} on {data}")
        from adaptkit.evaluate import probe  # imports torch

        document = probe(backbones, data, queries=queries, metrics=names, **given).document
    if as_json:
        print_document(document)
    else:
        print_probe(document)
