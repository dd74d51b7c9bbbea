"""`report.json` as `report.md`: the verdict first, then the evidence, then how to use and repeat it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adaptkit.report.card import header, own_class_snippet, timm_snippet, transformers_snippet
from adaptkit.report.numbers import MISSING, change_text, score_text, value_text

DIGITS = 2
SPECIAL = re.compile(r"([\\`*\[\]<>#|~&$]|(?<!\w)_|_(?!\w))")  # an underscore inside a word is only itself
INTERVALS = "Intervals are 95 %, over images, not over seeds: another seed can move a number further than they say."
LABEL_FREE = (
    "No labels were given. The selection score says how well views of an image are told apart and how much of the "
    "original's neighbourhoods is kept; how well classes are separated was not measured."
)

SELECTION_RULE = (
    "The original is kept unless a candidate is better on the selection images beyond doubt, that is, unless the "
    "lower end of its interval lies above 0. Candidates are checkpoints (alpha 1) and points on the straight line "
    "between the original (alpha 0) and an adapted backbone."
)


def render_markdown(report: Mapping[str, Any], repo: str | None = None) -> str:
    """The report (`adaptkit.report/1`) as Markdown, with the header of a model card.

    Sections whose facts are missing are left out. `repo` (`ORG/NAME`) is where on the hub the card will lie.
    """
    sections = [
        [f"# {escape(report['message'])}", f"Verdict: **{escape(report['verdict'])}**"],
        _probes(report),
        _selection(report),
        _guard(report),
        _data(report.get("data") or {}),
        _training(report),
        _loading(report, repo),
        _recipe(report.get("recipe") or {}),
    ]
    return header(report) + "\n\n".join("\n\n".join(section) for section in sections if section) + "\n"


def metric_order(report: Mapping[str, Any]) -> list[str]:
    """The metrics that were measured, the primary one first."""
    probes = report["probes"]
    names = [name for name in probes["before"] if name != report["primary_metric"]]
    return [report["primary_metric"], *names] if report["primary_metric"] in probes["before"] else names


def snippet(backbone: str, by_timm: bool = True) -> str:
    """Python that loads an export. Used by the report and the console, so that both stay true together."""
    if not by_timm:  # a module of the user's own class
        weights = repr(f"{backbone}/model.safetensors")
        return f"from safetensors.torch import load_file\nmodule.load_state_dict(load_file({weights}))"
    return f"import timm\nbackbone = timm.create_model({'local-dir:' + backbone!r}, pretrained=True, num_classes=0)"


def loads_in_timm(report: Mapping[str, Any]) -> bool:
    """Whether the export is a network of timm's, not a module of the user's own class."""
    return (report.get("backbone") or {}).get("architecture") != ""


def escape(text: object) -> str:
    """Text that Markdown shows as it is, in one line."""
    return SPECIAL.sub(r"\\\1", visible(str(text)))


def code(text: object) -> str:
    """A code span that holds any text, backticks included."""
    shown = visible(str(text))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def visible(text: str) -> str:
    """Line breaks, control characters and undecodable bytes of file names as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells must be escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def block(text: str, language: str) -> str:
    """A fenced block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _probes(report: Mapping[str, Any]) -> list[str]:
    probes = report["probes"]
    rows = []
    for name in metric_order(report):
        mark = f"**{code(name)}**" if name == report["primary_metric"] else code(name)
        before, after = (score_text(name, probes[side].get(name), DIGITS) for side in ("before", "after"))
        rows.append([mark, before, after, change_text(probes["delta"].get(name), DIGITS)])
    lines = ["## Before and after", table(["metric", "before", "after", "change"], rows)]
    percent = "Changes of metrics in percent are percentage points. "
    lines.append(f"{percent}{INTERVALS} The primary metric is in bold.")
    return [*lines, LABEL_FREE] if report.get("evidence") == "label_free" else lines


def _selection(report: Mapping[str, Any]) -> list[str]:
    selected, candidates = report.get("selected") or {}, report.get("candidates") or []
    metric = report.get("selection_metric", report["primary_metric"])
    if is_original(selected):
        choice = "Selected: **the original backbone**."
    else:
        choice = f"Selected: **step {selected['step']}, alpha {selected['alpha']:g}**."
    rows = []
    for candidate in candidates:
        chosen = (candidate["step"], candidate["alpha"]) == (selected.get("step"), selected.get("alpha"))
        value, change = candidate.get("value"), candidate.get("delta")
        cells = [str(candidate["step"]), f"{candidate['alpha']:g}", value_text(metric, value, DIGITS)]
        rows.append([*cells, change_text(change, DIGITS), "selected" if chosen else ""])
    lines = ["## What was selected, and why", f"{choice} {SELECTION_RULE}"]
    header = ["step", "alpha", f"{code(metric)} (selection images)", "change from the original", ""]
    return [*lines, table(header, rows)] if rows else [*lines, "There was no candidate."]


def is_original(selected: Mapping[str, Any] | None) -> bool:
    """Whether the selected backbone is the one that the run started from."""
    return not selected or not selected.get("alpha") or selected.get("step") is None


def _guard(report: Mapping[str, Any]) -> list[str]:
    guard = report.get("guard") or {}
    measured = change_text(guard.get("delta"), DIGITS)
    found = "" if measured == MISSING else f" There the selected backbone changed {measured}."
    if is_original(report.get("selected")) and not guard.get("fired"):
        text = "There was nothing to guard against: the original was selected."
    elif guard.get("fired"):
        text = (
            f"The guard **fired**: the selected backbone was worse on the report images; the original is kept.{found}"
        )
    else:
        text = f"The guard did not fire: the report images, which chose nothing, show no harm beyond doubt.{found}"
    return ["## Guard", text]


def _data(data: Mapping[str, Any]) -> list[str]:
    if not data:
        return []
    parts = {
        "for training": data.get("train"),
        "to select": data.get("selection"),
        "to report": data.get("report"),
        "left out because they are also labelled": data.get("left_out"),
    }
    counts = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count is not None)
    lines = [f"- Images: {code(data.get('path', ''))}: {data.get('num_images', 0):,}, of which {counts}."]
    bad = data.get("bad_images")
    if bad is not None:
        number = bad if isinstance(bad, int) else len(bad)
        lines.append(f"- Unreadable images: {number:,}" + (" (listed in `bad_images.jsonl`)." if number else "."))
    labels = data.get("labels")
    if labels:
        sizes = ", ".join(f"{labels[part]:,} {part}" for part in ("gallery", "selection", "report") if part in labels)
        if labels.get("without_gallery"):
            sizes += f"; {labels['without_gallery']:,} queries left out, as the gallery lacks their class"
        lines.append(f"- Labels: {code(labels.get('path', ''))}, {labels.get('num_classes')} classes; {sizes}.")
        lines.append("- Labels were used for scores only, never for a gradient.")
    if data.get("fingerprint"):
        lines.append(f"- Fingerprint: {code(data['fingerprint'])}")
    return ["## Images", "\n".join(lines)]


def _training(report: Mapping[str, Any]) -> list[str]:
    training, backbone = report.get("training") or {}, report.get("backbone") or {}
    speed, lines = report.get("throughput") or {}, []
    if backbone:
        facts = [f"{backbone['embed_dim']}-dimensional"] if "embed_dim" in backbone else []
        facts += [f"readout {escape(backbone['readout'])}"] if "readout" in backbone else []
        facts += [f"{backbone['image_px']} px"] if "image_px" in backbone else []
        name = f"{code(backbone.get('name', ''))} ({code(backbone.get('architecture', ''))})"
        sha256 = f", sha256 {code(backbone['sha256'])}" if backbone.get("sha256") else ""
        lines.append(f"- Backbone: {name}, {', '.join(facts)}{sha256}.")
    if training:
        stopped = f" Stopped early: {escape(training['stopped'])}." if training.get("stopped") else ""
        lines.append(f"- Trained for {training.get('steps')} steps ({_plain(training.get('epochs'))} epochs).{stopped}")
        last = ", ".join(f"{code(k)} {_plain(v)}" for k, v in (training.get("last") or {}).items())
        lines += [f"- Last line of the log: {last}."] if last else []
    if speed:
        where = f"{escape(speed.get('device'))}, {escape(speed.get('precision'))}"
        where += f", processes: {speed.get('num_processes')}"
        rate, wait = _plain(speed.get("images_per_second")), _plain(speed.get("data_wait_percent"))
        lines.append(f"- Throughput: {rate} images per second on {where}; {wait} % of the time waiting for images.")
    timings = ", ".join(f"{escape(phase)} {_plain(s)} s" for phase, s in (report.get("timings") or {}).items())
    lines += [f"- Time: {timings}."] if timings else []
    required = report.get("require_gain")
    if required:
        outcome = "met" if required.get("met") else "**not met**"
        asked = f"{code(required['metric'])} at least {required['points']:+g}"
        lines.append(f"- Required gain: {asked}: {outcome}, the lower end is {_plain(required.get('lower'))}.")
    return ["## Training", "\n".join(lines)] if lines else []


def _loading(report: Mapping[str, Any], repo: str | None) -> list[str]:
    folder = f"RUN/{visible(str((report.get('files') or {}).get('backbone', 'backbone')))}"
    where = "" if repo else "`RUN` is the folder of this report. "
    if not loads_in_timm(report):
        text = own_class_snippet(repo) if repo else snippet(folder, by_timm=False)
        return ["## Load it", block(text, "python"), f"{where}`module` is yours."]
    dim = (report.get("backbone") or {}).get("embed_dim", "D")
    return [
        "## Load it",
        block(timm_snippet(f"hf-hub:{repo}" if repo else f"local-dir:{folder}", dim), "python"),
        f"{where}Without `pretrained=True` timm gives random weights. With transformers:",
        block(transformers_snippet(repo or folder, dim), "python"),
        "Both give the same embedding. transformers' `last_hidden_state` is what the network has before its readout: "
        "the tokens of a ViT, the class token and registers among them, or a map.",
    ]


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    if not recipe:
        return []
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    note = "This repeats the run (the same is in `recipe.yaml`): `adaptkit adapt --recipe recipe.yaml`"
    return ["## Recipe", note, block(text, "yaml")]


def _plain(value: Any) -> str:
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else escape(value)
