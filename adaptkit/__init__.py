"""Adapt a pretrained vision backbone to your own unlabelled images, with the proof beside it.

Importing this package is free: a public name imports what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptkit.backbones import load_backbone as load_backbone
    from adaptkit.embedding import embed as embed
    from adaptkit.evaluate import probe as probe
    from adaptkit.preflight import check as check
    from adaptkit.recipe import Recipe as Recipe
    from adaptkit.recipe import load_recipe as load_recipe
    from adaptkit.train import AdaptResult as AdaptResult
    from adaptkit.train import adapt as adapt
    from adaptkit.train import resume as resume

__version__ = "0.1.0"

PUBLIC = {  # public name: the module that defines it
    "adapt": "adaptkit.train",
    "check": "adaptkit.preflight",
    "resume": "adaptkit.train",
    "AdaptResult": "adaptkit.train",
    "probe": "adaptkit.evaluate",
    "embed": "adaptkit.embedding",
    "load_backbone": "adaptkit.backbones",
    "Recipe": "adaptkit.recipe",
    "load_recipe": "adaptkit.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
