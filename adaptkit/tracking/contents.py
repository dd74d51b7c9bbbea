"""What is sent: numbers of the log, the recipe as parameters, the report, and pictures as contact sheets."""

from __future__ import annotations

import io
import json
import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adaptkit.page import PICTURES
from adaptkit.recipe import Recipe
from adaptkit.run import Run
from adaptkit.tracking.tracker import DONE, FAILED, INTERRUPTED, Result, Scalar

FILES = ("report.html", "report.json", "report.md")
CELL_PX, GAP_PX = 96, 4
NO_PICTURE = "RGB", (CELL_PX, CELL_PX), "lightgrey"


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` under its names; an evaluation's under that of its metric.

    Null, which is what the log has for a number that is not finite, is left out.
    """
    if line.get("kind") == "evaluation":
        metric = line["metric"]
        return _score(metric, {"value": line["value"]}) | _score(f"{metric}_delta", line["delta"])
    if line.get("kind") == "train":
        return {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
    return {}


def _score(name: str, score: Mapping[str, Any]) -> dict[str, float]:
    """`{value, ci95}` -> name, name_lower, name_upper."""
    values = (score["value"], *(score.get("ci95") or ()))
    named = zip((name, f"{name}_lower", f"{name}_upper"), values, strict=False)
    return {key: value for key, value in named if value is not None and math.isfinite(value)}


def parameters_of(recipe: Recipe) -> dict[str, Scalar]:
    """The recipe by dotted key; lists and null as JSON writes them."""
    return _flat(recipe.model_dump(mode="json"), "")


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = value is None or isinstance(value, list)
            flat[prefix + key] = json.dumps(value, ensure_ascii=False) if text else value
    return flat


def result_of(run: Run, status: Mapping[str, Any]) -> Result:
    """The end of a run, from its files. A process that ends without having said so has failed."""
    state = status.get("state")
    if state != DONE:
        state = state if state == INTERRUPTED else FAILED
        code = status.get("exit_code")
        code = code if isinstance(code, int) else 1
        return Result(state, code, summary={"state": state, "exit_code": code, "message": str(status.get("message"))})
    report = run.read_json("report.json") or {}
    probes = report["probes"]
    numbers: dict[str, float] = {}
    for part in ("before", "after", "delta"):
        for metric, score in probes[part].items():
            numbers |= _score(f"probes/{part}/{metric}", score) if score else {}
    summary = {"state": state} | {key: status[key] for key in ("exit_code", "message")}
    summary |= {key: report[key] for key in ("verdict", "evidence", "primary_metric")}
    summary |= {f"selected_{key}": value for key, value in report["selected"].items()}
    summary |= _score("primary_delta", probes["delta"].get(report["primary_metric"]) or {"value": None})
    files = tuple(file for name in FILES if (file := run.path / name).is_file())
    pictures = contact_sheets(run.read_json(PICTURES) or {})
    return Result(DONE, status["exit_code"], report["training"]["steps"], summary, numbers, files, pictures)


def contact_sheets(pictures: Mapping[str, Any]) -> dict[str, Image.Image]:
    """`pictures.json` -> a sheet each of views (an image and its crops a row) and neighbours (a query and its own)."""
    images, sheets = pictures.get("images") or [], {}
    if views := pictures.get("views"):
        sheets["views"] = _sheet([[view["jpeg"], *view["global"], *view["local"]] for view in views])
    neighbours = pictures.get("neighbours") or {}
    for side in ("before", "after"):
        if found := neighbours.get(side):
            rows = [[query, *row] for query, row in zip(neighbours["queries"], found, strict=True)]
            sheets[f"neighbours_{side}"] = _sheet([[images[index]["jpeg"] for index in row] for row in rows])
    return sheets


def _sheet(rows: Sequence[Sequence[str | None]]) -> Image.Image:
    """Rows of JPEG in base64, each enlarged to one side; a picture that could not be taken is grey."""
    pitch = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (pitch * max(map(len, rows)) - GAP_PX, pitch * len(rows) - GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, jpeg in enumerate(row):
            cell = Image.open(io.BytesIO(b64decode(jpeg))) if jpeg else Image.new(*NO_PICTURE)
            sheet.paste(cell.convert("RGB").resize((CELL_PX, CELL_PX)), (pitch * x, pitch * y))
    return sheet


def log_lines(file: Path) -> list[str]:
    """The whole lines of a log."""
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
