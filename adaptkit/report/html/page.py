"""The report as a page. Everything shown is escaped; the page loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from adaptkit.report.html.charts import number, whisker, whisker_reach
from adaptkit.report.html.curves import draw_curves
from adaptkit.report.html.examples import draw_examples
from adaptkit.report.html.language import draw_language
from adaptkit.report.markdown import (
    INTERVALS,
    LABEL_FREE,
    SELECTION_RULE,
    is_original,
    loads_in_timm,
    metric_order,
    snippet,
    visible,
)
from adaptkit.report.numbers import MISSING, change_text, score_text, value_text

HERE = Path(__file__).parent
DIGITS = 1
MAX_BAD_SHOWN = 10
MAX_CANDIDATES_SHOWN = 40
VERDICTS = {
    "improved": "improved",
    "unchanged": "unchanged",
    "kept_original": "kept the original",
    "collapsed": "collapsed",
}
METRICS = {
    "knn_top1": "accuracy of a vote of the 20 nearest gallery images",
    "linear_top1": "accuracy of a linear classifier on the frozen embeddings",
    "retrieval_map": "mean average precision of ranking the gallery by cosine",
    "rankme": "effective directions: entropy of the singular values",
    "d_eff": "effective directions: (sum)² / sum of squares of the covariance's eigenvalues",
    "r_eff": "effective directions: entropy of the covariance's eigenvalues",
    "view_retrieval_top1": "how often a view of an image finds another view of it",
    "neighbour_overlap": "share of each image's 10 nearest that were so before",
    "selection_score": "view retrieval, with a small weight on the overlap",
}


@dataclass(frozen=True)
class Facts:
    """What the run directory holds; `resets` are steps, `notes` say what is missing or damaged."""

    name: str
    report: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]] = ()
    bad_images: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    resets: Sequence[int] = ()
    notes: Sequence[str] = ()
    codes: Mapping[str, Any] = field(default_factory=dict)
    codes_pictures: Mapping[str, Any] = field(default_factory=dict)


def render_html(facts: Facts) -> str:
    """The whole page; the same facts give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report, notes = facts.report, list(facts.notes)
    language = _language(facts, notes)
    backbone = visible(str((report.get("files") or {}).get("backbone", "backbone")))
    return environment.get_template("page.html.jinja").render(
        name=facts.name,
        notes=notes,
        style=_style("style.css", *(["language.css"] if language else [])),
        report=report,
        verdict=VERDICTS.get(report["verdict"], report["verdict"]),
        label_free=report.get("evidence") == "label_free",
        sentences={"intervals": INTERVALS, "label_free": LABEL_FREE, "rule": SELECTION_RULE},
        glance=_glance(report),
        rows=_rows(report),
        kept_original=is_original(report.get("selected")),
        selection_metric=report.get("selection_metric", report["primary_metric"]),
        guard_change=_parts(change_text((report.get("guard") or {}).get("delta"), DIGITS)),
        candidates=_candidates(report),
        curves=draw_curves(facts.log, facts.resets, report),
        examples=draw_examples(facts.pictures),
        language=language,
        bad_images=facts.bad_images[:MAX_BAD_SHOWN],
        data=_data(report, len(facts.bad_images)),
        speed=_speed(report.get("throughput") or {}, report.get("training") or {}),
        timings=_timings(report.get("timings") or {}),
        provenance=_provenance(report, facts.manifest),
        recipe=_lines(yaml.safe_dump(dict(report.get("recipe") or {}), sort_keys=False, allow_unicode=True, width=100)),
        snippet=_lines(snippet(f"RUN/{backbone}", loads_in_timm(report))),
        by_timm=loads_in_timm(report),
    )


def _language(facts: Facts, notes: list[str]) -> dict[str, Any] | None:
    """The section of the codes; a note where it cannot be made of what is there."""
    try:
        return draw_language(facts.codes, facts.codes_pictures)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        notes.append("codes.json is damaged.")
        return None


def _style(*names: str) -> Markup:
    return Markup("".join((HERE / name).read_text(encoding="utf-8") for name in names))


def _printable(value: Any) -> Any:
    """Control characters, reordering marks and undecodable bytes of names as escapes."""
    return value if isinstance(value, Markup) else visible(str(value))


def _lines(text: str) -> Markup:
    """A block of text that keeps its line breaks."""
    return Markup("\n").join(escape(visible(line)) for line in text.splitlines())


def _parts(text: str) -> dict[str, str]:
    """`60.8% [56.4, 65.2]` -> figure and interval."""
    figure, _, interval = text.partition(" [")
    return {"figure": figure, "interval": f"[{interval}" if interval else ""}


def _rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    probes, rows = report["probes"], []
    for name in metric_order(report):
        delta = probes["delta"].get(name)
        sides = {side: _parts(score_text(name, probes[side].get(name), DIGITS)) for side in ("before", "after")}
        change = _parts(change_text(delta, DIGITS))
        row = {"name": name, "primary": name == report["primary_metric"], "what": METRICS.get(name, "")}
        rows.append(row | sides | {"change": change, "whisker": whisker(delta)})
    return rows


def _glance(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, detail): the few facts under the verdict."""
    name, probes = report["primary_metric"], report["probes"]
    before, after = (
        score_text(name, {"value": (probes[side].get(name) or {}).get("value")}) for side in ("before", "after")
    )
    selected, training, data = (report.get(key) or {} for key in ("selected", "training", "data"))
    change = probes["delta"].get(name)
    kept = is_original(selected)
    return [
        (name, f"{before} → {after}", f"change {change_text(change, DIGITS)}"),
        (
            "exported",
            "the original" if kept else f"step {selected['step']:,}",
            "" if kept else f"alpha {selected['alpha']:g}",
        ),
        ("images", _count(data.get("num_images")), f"{_count(data.get('train'))} trained on"),
        (
            "training",
            f"{_count(training.get('steps'))} steps",
            f"{_duration((report.get('timings') or {}).get('total'))} in all",
        ),
    ]


def _candidates(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """At most about 40, evenly spaced, and the selected one."""
    metric, selected = report.get("selection_metric", report["primary_metric"]), report.get("selected") or {}
    every = report.get("candidates") or []
    reach = whisker_reach([candidate.get("delta") for candidate in every])
    rows = []
    for index, candidate in enumerate(every):
        is_selected = (candidate["step"], candidate["alpha"]) == (selected.get("step"), selected.get("alpha"))
        if not is_selected and index % -(-len(every) // MAX_CANDIDATES_SHOWN):
            continue
        row = {"step": f"{candidate['step']:,}", "alpha": f"{candidate['alpha']:g}", "selected": is_selected}
        row["value"] = value_text(metric, candidate.get("value"), DIGITS)
        row["change"] = _parts(change_text(candidate.get("delta"), DIGITS))
        rows.append(row | {"whisker": whisker(candidate.get("delta"), reach)})
    return rows


def _data(report: Mapping[str, Any], num_listed: int) -> dict[str, Any]:
    """Counts by what the images are for, the labels, and how many are bad."""
    data = report.get("data") or {}
    labels = data.get("labels") or {}
    parts = [
        ("trained on", data.get("train")),
        ("held out to select", data.get("selection")),
        ("held out to report", data.get("report")),
        ("left out, as they are labelled too", data.get("left_out") or None),
    ]
    sizes = [
        ("gallery, to search and to fit on", labels.get("gallery")),
        ("queries to select", labels.get("selection")),
        ("queries to report", labels.get("report")),
    ]
    sizes.append(("left out, as the gallery lacks their class", labels.get("without_gallery") or None))
    return {
        "path": data.get("path", ""),
        "total": _count(data.get("num_images")),
        "parts": [(what, _count(count)) for what, count in parts if count is not None],
        "labels": labels.get("path"),
        "num_classes": _count(labels.get("num_classes")),
        "label_parts": [(what, _count(count)) for what, count in sizes if count is not None],
        "num_bad": data.get("bad_images") or 0,
        "num_listed": num_listed,
    }


def _speed(speed: Mapping[str, Any], training: Mapping[str, Any]) -> list[tuple[str, str]]:
    rate, wait, compiled = (speed.get(key) for key in ("images_per_second", "data_wait_percent", "compile_seconds"))
    facts = [
        ("images a second", MISSING if rate is None else number(rate, 100)),
        ("waiting for images", MISSING if wait is None else f"{wait:.1f} % of the time"),
        (
            "where",
            f"{speed.get('device')}, {speed.get('precision')}, processes: {speed.get('num_processes')}",
        ),
        ("trained", f"{_count(training.get('steps'))} steps, {number(training.get('epochs') or 0.0, 10)} epochs"),
    ]
    facts += [("compiling took", _duration(compiled))] if compiled is not None else []
    return facts + ([("stopped early", training["stopped"])] if training.get("stopped") else [])


def _timings(timings: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every phase with its share of the whole."""
    total = timings.get("total") or sum(timings.values()) or 1.0
    return [
        {"phase": phase.replace("_", " "), "time": _duration(seconds), "percent": round(100 * seconds / total, 1)}
        for phase, seconds in timings.items()
        if phase != "total"
    ]


def _provenance(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    backbone, data = report.get("backbone") or {}, report.get("data") or {}
    made_of = f"{backbone.get('architecture') or 'a module of your own'}, readout {backbone.get('readout', MISSING)}, "
    made_of += f"{backbone.get('embed_dim', MISSING)} dimensions, {backbone.get('image_px', MISSING)} px"
    facts = [
        ("backbone", f"{backbone.get('name', MISSING)} ({made_of})"),
        ("weights", backbone.get("source")),
        ("weights' SHA-256", manifest.get("weights_sha256") or backbone.get("sha256")),
        ("images' fingerprint", data.get("fingerprint")),
        ("labels' fingerprint", manifest.get("labels_fingerprint")),
        ("seed", manifest.get("seed")),
        ("command", " ".join(map(str, manifest.get("command") or ())) or None),
        ("versions", ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())),
        ("Python", manifest.get("python")),
        ("system", manifest.get("system")),
        ("device", manifest.get("device")),
    ]
    facts += [("resumed", f"from step {part.get('from_step')}, elsewhere") for part in manifest.get("resumed") or ()]
    return [(what, str(fact)) for what, fact in facts if fact not in (None, "")]


def _count(value: Any) -> str:
    return MISSING if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    """7.2 s, 3 min 5 s, 2 h 4 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
