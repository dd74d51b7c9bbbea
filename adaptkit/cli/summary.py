"""What a command leaves on stdout: tables for people, one JSON document for pipelines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from adaptkit.cli.console import StreamConsole, is_main_process, pace, size, spell
from adaptkit.cli.failure import one_line, say
from adaptkit.cli.listing import line as _line
from adaptkit.cli.listing import table as _table
from adaptkit.report.markdown import INTERVALS, LABEL_FREE, is_original, loads_in_timm, metric_order, snippet
from adaptkit.report.numbers import REFERENCE, change_text, score_text

VERDICT_STYLES = {"improved": "bold green", "collapsed": "bold red"}


def print_document(document: Mapping[str, Any]) -> None:
    """The one JSON document on stdout. ASCII only, so that no file name and no locale can break it."""
    if not is_main_process():
        return
    say(json.dumps(document, indent=2, allow_nan=False), sys.stdout)


def print_run(report: Mapping[str, Any], run: Path) -> None:
    """The result of a run: verdict, table, where the export lies and how to load it."""
    console, probes = StreamConsole(sys.stdout), report["probes"]
    _line(console, "")
    _line(console, report["message"], VERDICT_STYLES.get(report["verdict"], "bold"), wrap=True)
    _line(console, "")
    rows = []
    for name in metric_order(report):
        before, after = (score_text(name, probes[side].get(name)) for side in ("before", "after"))
        rows.append((name, before, after, change_text(probes["delta"].get(name))))
    _table(console, ("metric", "before", "after", "change"), rows)
    _line(console, INTERVALS, "dim", wrap=True)
    if report["evidence"] == "label_free":
        _line(console, LABEL_FREE, "dim", wrap=True)
    _line(console, "")
    selected = report.get("selected") or {}
    original = is_original(selected)
    choice = "the original backbone" if original else f"step {selected['step']}, alpha {selected['alpha']:g}"
    _line(console, f"selected  {choice}")
    _line(console, f"export    {run / 'backbone'}")
    _line(console, f"report    {run / (report.get('files') or {}).get('html', 'report.md')}")
    _line(console, "")
    by_timm = loads_in_timm(report)
    for line in snippet(str(run / "backbone"), by_timm).splitlines():
        _line(console, f"    {line}" if line else "")
    if by_timm:
        _line(console, "")
        _line(console, "Without pretrained=True timm gives random weights.")


def print_probe(document: Mapping[str, Any]) -> None:
    """The result of `probe`: one backbone's scores, or two with the paired difference; then those on the reference."""
    console, other, reference = StreamConsole(sys.stdout), document.get("compared_with"), document.get("reference")
    _line(console, "")
    if other:
        _line(console, f"A  {document['backbone']}")
        _line(console, f"B  {other['backbone']}")
    else:
        _line(console, str(document["backbone"]))
    _line(console, "")
    _probe_tables(console, document, "")
    if document.get("verdict"):
        _line(console, str(document["verdict"]), "bold", wrap=True)
    for note in document.get("notes") or ():
        _line(console, f"{note[:1].upper()}{note[1:]}.", "dim", wrap=True)
    _line(console, f"{_probe_sizes(document)}, seed {document['seed']}. {INTERVALS}", "dim", wrap=True)
    if reference:
        _line(console, "")
        _line(console, f"On the reference data {reference['data']}", "bold")
        _line(console, f"{_probe_sizes(reference)}; in --json the names begin with {REFERENCE}", "dim", wrap=True)
        _line(console, "")
        _probe_tables(console, document, REFERENCE)


def _probe_tables(console: StreamConsole, document: Mapping[str, Any], prefix: str) -> None:
    """The metrics whose names begin with `prefix`, without it: that fits four columns into 80."""
    other, drift = document.get("compared_with"), document.get("drift") or {}
    header, rows = ["metric", "A", "B", "change, A to B"] if other else ["metric", "value"], []
    for name, score in _of_prefix(document["metrics"], prefix).items():
        row = [name, score_text(name, score)]
        if other:
            after, delta = (group.get(prefix + name) for group in (other["metrics"], document["delta"]))
            row += [score_text(name, after), change_text(delta, metric=name)]
        rows.append(row)
    if rows:
        _table(console, header, rows)
    if drifted := _of_prefix(drift, prefix):
        rows = [[name, score_text(name, score)] for name, score in drifted.items()]
        _table(console, ("drift", "kept, A to B"), rows)


def _of_prefix(scores: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """An empty prefix means those that are not of the reference."""
    return {
        name.removeprefix(prefix): score
        for name, score in scores.items()
        if (name.startswith(prefix) if prefix else not name.startswith(REFERENCE))
    }


def _probe_sizes(facts: Mapping[str, Any]) -> str:
    gallery, left_out = facts.get("num_gallery"), facts.get("num_without_gallery")
    sizes = f"{facts['num_queries']:,} queries" if gallery else f"{facts['num_queries']:,} images"
    sizes = f"{gallery:,} gallery images, {sizes}" if gallery else sizes
    if left_out:
        sizes += f" ({left_out:,} left out: no image of their class in the gallery)"
    return sizes + (f", {facts['num_classes']} classes" if facts.get("num_classes") else "")


def print_embedded(document: Mapping[str, Any]) -> None:
    """What `embed` wrote."""
    if "output" not in document:
        return  # the main process says it
    console, bits = StreamConsole(sys.stdout), document["num_bits"]
    codes = f", codes of {bits} bits" if bits else ""
    bad = f"; {document['num_bad']:,} could not be read" if document["num_bad"] else ""
    _line(console, f"{document['num_images']:,} images, {document['embed_dim']} numbers each{codes}{bad}", wrap=True)
    for file in document["output"]:
        _line(console, file)


def _several(plan: Mapping[str, Any]) -> list[str]:
    count = plan["num_processes"]
    share = plan["batch_size"] // count
    return [f"{count}, {share} images of a batch each; timed without messages between them"] if count > 1 else []


def print_forecast(document: Mapping[str, Any]) -> None:
    """What `adapt --dry-run` found: the recipe as YAML, and the plan."""
    console, plan, data = StreamConsole(sys.stdout), document["plan"], document["data"]
    for line in yaml.safe_dump(document["recipe"], sort_keys=False, allow_unicode=True).splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        console.print(Text(indent + one_line(line)), soft_wrap=True)
    _line(console, "")
    _line(console, "Dry run: nothing was written.", "bold")
    labels = data["labels"]
    memory = size(plan["peak_bytes"]) + (f" of {size(plan['device_bytes'])}" if plan["device_bytes"] else "")
    rows = [
        ("images", f"{data['train']:,} to train on, {data['selection']:,} to select, {data['report']:,} to report"),
        ("labels", f"{labels['gallery']:,} gallery, {labels['selection']:,} + {labels['report']:,} queries")
        if labels
        else ("labels", "none: the verdict will claim nothing about accuracy"),
        ("steps", f"{plan['steps']:,} of {plan['batch_size']} images ({plan['epochs']:.1f} epochs)"),
        *(("processes", text) for text in _several(plan)),
        ("head", f"drawn {plan['head_draws']} time{'s' * (plan['head_draws'] != 1)}"),
        ("backbone", plan["trained"]),
        ("time", f"about {spell(plan['seconds'])}, {pace(plan['step_seconds'])}"),
        ("memory", f"about {memory}" if plan["peak_bytes"] else "not known here"),
        ("device", f"{plan['device']}, {plan['precision']}"),
    ]
    _table(console, ("", ""), rows)
