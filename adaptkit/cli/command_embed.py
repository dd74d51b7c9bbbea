"""`adaptkit embed`: embeddings and binary codes of a folder of images, as a file for other tools."""

from __future__ import annotations

from typing import Any

import click

from adaptkit.cli.options import METAVARS, as_json, embedding_options, quiet, refuse_empty


@click.command("embed", short_help="Write embeddings and binary codes to a file.")
@click.option("--backbone", required=True, metavar="NAME|FOLDER|RUN", help="Backbone, or the folder of a finished run.")
@click.option("--data", multiple=True, required=True, metavar=METAVARS["data"], help="Images to embed; repeatable.")
@click.option("--output", required=True, metavar="FILE", help="To write: .parquet, .npy or .safetensors.")
@click.option("--codes", is_flag=True, help="Add the binary codes that the run's head makes, packed into bytes.")
@click.option("--overwrite", is_flag=True, help="Replace the output.")
@embedding_options
@as_json
@quiet
def embed_command(
    backbone: str, data: tuple[str, ...], output: str, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Embed all images with a backbone's own preprocessing.

    Parquet has the columns path, label (images in class folders), vector and, with --codes, code. A command that was
    stopped goes on where it was when it is given again. Images that cannot be read are left out and counted.
    """
    refuse_empty()
    from adaptkit.cli.console import RichReporter
    from adaptkit.cli.summary import print_document, print_embedded

    given = {name: value for name, value in options.items() if value is not None}
    with RichReporter(quiet) as reporter:
        reporter.phase("loading the backbone")
        from adaptkit.vectors import embed_files  # imports torch

        document = embed_files(backbone, data, output, reporter=reporter, **given).document
    if as_json:
        print_document(document)
    else:
        print_embedded(document)
