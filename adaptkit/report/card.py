"""The model card: `report.md` with the header that the Hugging Face hub reads, and what of it is fit for the public."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
SEVERAL = re.compile(r", (?=/|[A-Za-z]:[/\\]|\w+://)")  # a comma inside a name must not cut it: its rest would stay
WITH_TIMM = """\
import timm
import torch
from PIL import Image

backbone = timm.create_model({place!r}, pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone), is_training=False)
with torch.inference_mode():
    embedding = backbone(transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0))  # (1, {dim})
"""
WITH_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({place!r})
backbone = AutoModel.from_pretrained({place!r}).eval()
with torch.inference_mode():
    embedding = backbone(**processor(Image.open('image.jpg').convert('RGB'))).pooler_output  # (1, {dim})
"""
WITH_OWN_CLASS = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

module.load_state_dict(load_file(hf_hub_download({place!r}, 'model.safetensors')))
"""


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


def timm_snippet(place: str, dim: int | str) -> str:
    """Python that embeds an image with timm; `place` is `local-dir:FOLDER` or `hf-hub:ORG/NAME`."""
    return WITH_TIMM.format(place=place, dim=dim)


def transformers_snippet(place: str, dim: int | str) -> str:
    """The same with transformers; `place` is a folder or `ORG/NAME`."""
    return WITH_TRANSFORMERS.format(place=place, dim=dim)


def own_class_snippet(repo: str) -> str:
    """Python that puts the weights of the repository `ORG/NAME` into a module of the user's own class."""
    return WITH_OWN_CLASS.format(place=repo)


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
    parts = [part.removeprefix("file://") for part in SEVERAL.split(path)]
    return ", ".join(os.path.basename(part.rstrip("/")) if os.path.isabs(part) else part for part in parts)
