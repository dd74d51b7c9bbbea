"""What `adaptkit check` found, as a page of 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.padding import Padding
from rich.text import Text

from adaptkit.cli.console import StreamConsole, pace, size, spell
from adaptkit.cli.failure import one_line
from adaptkit.cli.listing import line, table
from adaptkit.report.numbers import score_text


def print_check(document: Mapping[str, Any]) -> None:
    """Sections that were reached, warnings, and whether a run can start."""
    console = StreamConsole(sys.stdout)
    sections = {"backbone": _backbone, "data": _data, "labels": _labels, "plan": _plan, "worth": _worth}
    rows = []
    for name, describe in sections.items():
        if document[name] is not None:
            first, *others = describe(document[name])
            rows += [("worth it?" if name == "worth" else name, first), *(("", text) for text in others)]
    line(console, "")
    table(console, ("", ""), rows)
    warnings = document["warnings"]
    if warnings:
        line(console, f"{len(warnings)} warning{'s' * (len(warnings) != 1)}", "bold yellow")
        for warning in warnings:
            text = Text(one_line(f"{warning['kind']}: {warning['message']}"))
            text.stylize("bold", 0, len(warning["kind"]) + 1)
            console.print(Padding(text, (0, 0, 0, 2)))
        line(console, "")
    if document["ok"]:
        worth = document["worth"]
        line(console, f"A run can start. {worth['sentence']}", "bold", wrap=True)
        if worth["command"]:
            line(console, "")
            line(console, f"    {worth['command']}")


def _backbone(found: Mapping[str, Any]) -> list[str]:
    weights = found["weights"]
    facts = f"{found['embed_dim']}-dimensional, {found['image_px']} px, readout {found['readout']}"
    lines = [f"{found['name']}: {facts}, {found['parameters'] / 1e6:.1f} M parameters"]
    if weights is None:
        return [*lines, "no weights: drawn at random"]
    counts = [f"{weights['matched']} parameters matched"]
    counts += [f"{len(weights[key])} {key}" for key in ("missing", "unexpected", "resampled") if weights[key]]
    sha256 = f"sha256 {weights['sha256'][:12]}, " if weights["sha256"] else ""
    return [*lines, f"{weights['source']}", sha256 + ", ".join(counts)]


def _data(found: Mapping[str, Any]) -> list[str]:
    some = f", {found['looked_at']:,} of them looked at" if found["looked_at"] < found["num_images"] else ""
    lines = [f"{found['num_images']:,} images in {found['path']}{some}"]
    lines.append(f"{found['train']:,} to train on, {found['selection']:,} to select, {found['report']:,} to report")
    if found["short_side"]:
        bits = ", ".join(f"{count:,} of {bits} bits" for bits, count in found["bits"].items() if bits != "8")
        formats = ", ".join(f"{count:,} {name}" for name, count in found["formats"].items())
        side = found["short_side"]
        spread = f"{side['min']} to {side['max']} px, median {side['median']}"
        spread = f"{side['min']} px" if side["min"] == side["max"] else spread
        lines.append(f"{formats}; {bits + '; ' if bits else ''}short side {spread}")
    return [*lines, f"{found['unusable']:,} cannot be used"]


def _labels(found: Mapping[str, Any]) -> list[str]:
    classes = sorted(found["classes"].items(), key=lambda item: -item[1])
    queries = f"{found['selection']:,} queries to select, {found['report']:,} to report"
    lines = [f"{found['gallery']:,} gallery images, {queries}, in {found['path']}"]
    (most, many), (least, few) = classes[0], classes[-1]
    sizes = f", from {few:,} images ({least}) to {many:,} ({most})" if few < many else f" of {many:,} images"
    left_out = found["left_out_of_training"]
    shared = f"{left_out:,} also in the data, left out of training" if left_out else "none left out of training"
    return [*lines, f"{len(classes)} classes{sizes}", f"{found['unusable']:,} cannot be used; {shared}"]


def _plan(found: Mapping[str, Any]) -> list[str]:
    memory = f"about {size(found['peak_bytes'])}" if found["peak_bytes"] else "not known here"
    whole = f" of {size(found['device_bytes'])}" if found["device_bytes"] else ""
    several = f" in {found['num_processes']} processes" if found["num_processes"] > 1 else ""
    return [
        f"{found['steps']:,} steps of {found['batch_size']} images{several} ({found['epochs']:.1f} epochs)",
        f"about {spell(found['seconds'])} on {found['device']} in {found['precision']}, "
        f"{pace(found['step_seconds'])}; memory {memory}{whole}",
        found["trained"],
    ]


def _worth(found: Mapping[str, Any]) -> list[str]:
    views, rank = (score_text(name, found[name]) for name in ("view_retrieval_top1", "rankme"))
    share = round(100 * found["changed_share"])
    return [
        f"frozen, on {found['measured_images']:,} held-out images: view_retrieval_top1 {views}, rankme {rank}",
        f"{found['queries']:,} queries give {found['metric']} to about +-{found['score_half_width']:.1f} points at "
        f"worst, and its change to about +-{found['gain_half_width']:.1f} if {share} % of the answers change: "
        "a smaller gain cannot be shown",
    ]
