"""`adaptkit demo`: `adapt` with the recipe `quick` on the embedded backbone and sample images, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import adaptkit
from adaptkit.cli.command_adapt import adapt_command
from adaptkit.cli.launch import gpus_option
from adaptkit.cli.options import as_json, quiet, setting

ASSETS = Path(adaptkit.__file__).parent / "assets"
SAMPLES = {"backbone": "nano", "data": (str(ASSETS / "eurosat"),), "labels": str(ASSETS / "eurosat_labelled")}


@click.command("demo", short_help="Adapt the embedded backbone to sample images, offline.")
@click.option("--output", metavar="FOLDER", help="The run directory.  [default: runs/eurosat-nano]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@gpus_option
@setting("weights")
@setting("pretrained")
@setting("seed")
@setting("precision")
@as_json
@quiet
@click.pass_context
def demo_command(ctx: click.Context, /, **options: Any) -> None:
    """Adapt the embedded backbone `nano` to 1,500 satellite images that come with adaptkit; a few minutes, offline.

    The same as: adaptkit adapt --recipe quick --backbone nano --data EUROSAT --labels EUROSAT_LABELLED
    """
    ctx.invoke(adapt_command, recipe="quick", **SAMPLES, **options)
