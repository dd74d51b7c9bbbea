"""Backbones: what they are, where they come from, strict loading, and the folder they are saved to."""

from adaptkit.backbones.backbone import Backbone, EvalTransform, LoadReport
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.names import ALIASES, backbone_names
from adaptkit.backbones.save import save_backbone

__all__ = [
    "ALIASES",
    "Backbone",
    "EvalTransform",
    "LoadReport",
    "backbone_names",
    "load_backbone",
    "save_backbone",
]
