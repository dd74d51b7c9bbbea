"""`report.html` of a run, from the files in its directory alone: no image is read, no backbone loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptkit.errors import UsageError
from adaptkit.report.markdown import render_markdown
from adaptkit.run import Run
from adaptkit.schedules import Plan

NAME = "report.html"
PICTURES = "pictures.json"
CODES, CODES_PICTURES = "codes.json", "codes_pictures.json"  # of `adaptkit codes`; runs do without


def write_page(run: Run, report: Mapping[str, Any]) -> None:
    """Write `report.html`. What is missing or damaged in the run directory is said on the page.

    Raises `MachineError` when the file cannot be written.
    """
    from adaptkit.report.html import Facts, render_html  # here, because training needs no templates

    notes: list[str] = []
    facts = Facts(
        name=run.path.name,
        report=report,
        log=_records(run.path / "metrics.jsonl", notes),
        bad_images=_records(run.path / "bad_images.jsonl", notes),
        manifest=_document(run, "manifest.json", notes),
        pictures=_document(run, PICTURES, notes),
        codes=_document(run, CODES, notes, wanted=False),
        codes_pictures=_document(run, CODES_PICTURES, notes, wanted=False),
        resets=_resets(run, report),
        notes=notes,
    )
    run.write(NAME, render_html(facts))


def write_reports(run: Run, report: dict[str, Any], note: Callable[[str], None]) -> None:
    """`report.md`, `report.html`, and last `report.json`: its presence means finished."""
    run.write("report.md", render_markdown(report))
    try_page(run, report, note)
    run.write_json("report.json", report)


def try_page(run: Run, report: dict[str, Any], note: Callable[[str], None]) -> None:
    """`write_page` at the end of a run: a page that fails is taken out of the report's `files`, and the user told."""
    try:
        write_page(run, report)
    except Exception as error:  # the run itself has succeeded
        report["files"].pop("html", None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        note(f"{NAME} could not be made ({reason}); all else is there, and `adaptkit report {run.path}` tries again")


def _document(run: Run, name: str, notes: list[str], wanted: bool = True) -> dict[str, Any]:
    """A JSON file of the run; empty, with a note, when it is damaged or `wanted` and not there."""
    try:
        document = run.read_json(name)
    except (UsageError, OSError):
        notes.append(f"{name} is damaged.")
        return {}
    if document is None and wanted:
        notes.append(f"{name} is not there.")
    return document or {}


def _records(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a log that can be read; the others are counted in a note."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        notes.append(f"{file.name} is not there.")
        return []
    records = [record for line in lines if isinstance(record := _parsed(line), dict)]
    if len(records) < len(lines):
        notes.append(f"{file.name}: {len(lines) - len(records):,} damaged lines are left out.")
    return records


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _resets(run: Run, report: Mapping[str, Any]) -> list[int]:
    """The steps before which the schedule drew the head anew, the first draw left out."""
    num_images = (report.get("data") or {}).get("train") or 0
    steps = (report.get("training") or {}).get("steps") or 0
    if num_images < run.recipe.batch_size:
        return []
    plan = Plan.make(run.recipe, num_images)
    return [step for step in range(1, steps) if plan.is_reset(step)]
