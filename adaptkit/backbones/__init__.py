"""Backbones: what they are, where they come from, strict loading, and the folder they are saved to."""

from adaptkit.aliases import ALIASES
from adaptkit.backbones.backbone import Backbone, EvalTransform, LoadReport
from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.module import MODULE, module_name
from adaptkit.backbones.names import backbone_names, backbone_rows
from adaptkit.backbones.save import save_backbone

__all__ = [
    "ALIASES",
    "MODULE",
    "Backbone",
    "EvalTransform",
    "LoadReport",
    "backbone_names",
    "backbone_rows",
    "load_backbone",
    "module_name",
    "save_backbone",
]
