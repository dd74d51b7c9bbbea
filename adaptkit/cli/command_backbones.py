"""`adaptkit backbones`: which backbones can be loaded by name."""

from __future__ import annotations

import sys

import click

from adaptkit.cli.options import as_json, quiet

SCHEMA = "adaptkit.backbones/1"
FIELDS = ("name", "timm_name", "image_px", "licence")


@click.command("backbones", short_help="List the backbones that can be loaded by name.")
@click.argument("pattern", required=False)
@as_json
@quiet
def backbones_command(pattern: str | None, as_json: bool, quiet: bool) -> None:
    """List `nano`, the names of the DINO family, and timm's names with pretrained weights that match PATTERN.

    PATTERN is a part of a name, or a glob: `adaptkit backbones 'convnext*'`. Without it timm's are only counted.
    """
    from adaptkit.cli.console import StreamConsole
    from adaptkit.cli.listing import line, table
    from adaptkit.cli.summary import print_document

    rows, others = find_rows(pattern)
    if as_json:
        listed = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        print_document({"schema": SCHEMA, "backbones": listed, "others": others})
        return
    console = StreamConsole(sys.stdout)
    shown = [
        (name if name == timm_name else f"{name} = {timm_name}", str(px), licence)
        for name, timm_name, px, licence in rows
    ]
    table(console, ("backbone", "px", "licence"), shown)
    if others and not quiet:
        line(console, f"and {others:,} more of timm's: adaptkit backbones PATTERN lists those that match;", "dim")
        line(console, "also hf-hub:org/name, a folder saved by timm or adaptkit, or --weights FILE", "dim")


def find_rows(pattern: str | None) -> tuple[list[tuple[str, str, int, str]], int]:
    """The rows to list, and how many more there are. Raises `BackboneError` when nothing matches."""
    from adaptkit.aliases import ALIASES, NANO
    from adaptkit.backbones.names import backbone_rows  # imports timm, and with it torch
    from adaptkit.errors import BackboneError, did_you_mean

    rows = backbone_rows(pattern)
    if pattern is None:
        ours = [row for row in rows if row[0] in (NANO, *ALIASES)]
        return ours, len(rows) - len(ours)
    if not rows:
        hint = did_you_mean(pattern.strip("*"), [row[0] for row in backbone_rows()])
        raise BackboneError(f"no backbone matches {pattern!r}{hint}; `adaptkit backbones` lists the usual ones")
    return rows, 0
