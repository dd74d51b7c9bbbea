"""The model card: `report.md` with the header that the Hugging Face hub reads, and what of it is fit for the public."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def header(report: Mapping[str, Any]) -> str:
    """The YAML block at the top of a model card; see huggingface.co/docs/hub/model-cards."""
    facts: dict[str, Any] = {"tags": ["adaptkit", "self-supervised", "domain-adaptation"]}
    name = str((report.get("backbone") or {}).get("name", ""))
    if (report.get("backbone") or {}).get("architecture"):
        facts = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"} | facts
    for prefix in HUB_PREFIXES:
        if name.startswith(prefix):
            facts["base_model"] = name.removeprefix(prefix).partition("@")[0]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def public(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without folders of the machine it was made on: of every path the last part stays."""
    shown = dict(report)
    for group, keys in (("data", ("path",)), ("backbone", ("source", "name"))):
        facts = dict(report.get(group) or {})
        shown[group] = facts | {key: _last(facts[key]) for key in keys if key in facts}
    if labels := (shown.get("data") or {}).get("labels"):
        shown["data"]["labels"] = labels | {"path": _last(labels.get("path"))}
    recipe = dict(report.get("recipe") or {})
    if recipe:
        data = dict(recipe.get("data") or {})
        data |= {"path": [_last(path) for path in data.get("path") or ()], "cache": _last(data.get("cache"))}
        recipe |= {key: _last(recipe[key]) for key in ("backbone", "labels", "weights") if key in recipe}
        shown["recipe"] = recipe | {"data": data}
    return shown


def _last(path: Any) -> Any:
    """`/home/me/images` -> images, also of several with commas between them; names and words stay."""
    if not isinstance(path, str):
        return path
    return ", ".join(os.path.basename(part.rstrip("/")) if os.path.isabs(part) else part for part in path.split(", "))
