"""What all contestants of a cell share. No torch here: the referee's own memory is the floor of every child's peak."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from adaptkit.recipe import Recipe, load_recipe
from adaptkit.settings import ViewSettings

ENDLESS = 1_000_000  # steps; the race is over before


@dataclass(frozen=True)
class Setting:
    """One cell of the benchmark; `folder` holds the images."""

    backbone: str
    precision: str
    batch_size: int
    num_local: int
    workers: int
    threads: int
    folder: str
    compile: str = "off"

    def to_text(self) -> str:
        """As a child process takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Setting:
        return cls(**json.loads(text))

    def recipe(self) -> Recipe:
        """The default recipe with every step a full one: no frozen backbone, no new head."""
        return load_recipe(
            overrides={
                "data.path": self.folder,
                "batch_size": self.batch_size,
                "precision": self.precision,
                "views.num_local": self.num_local,
                "steps": ENDLESS,
                "compile": self.compile,
                "head.warmup": "never",
                "head.reset_every": "never",
            }
        )


def lightly_arguments(setting: Setting, global_px: int, local_px: int) -> dict[str, Any]:
    """The same files, views, batch and precision in the words of `lightly_train.pretrain`."""
    views = ViewSettings(num_local=setting.num_local)
    local = {
        "num_views": setting.num_local,
        "view_size": [local_px, local_px],
        "random_resize": _scale(views.local_scale),
        "gaussian_blur": _blur(views, 2),
    }
    return {
        "data": setting.folder,
        "model": f"timm/{setting.backbone}",
        "method": "dino",
        "optim": "adamw",  # its default for DINO is SGD
        "epochs": 100,
        "batch_size": setting.batch_size,
        "num_workers": setting.workers,
        "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[setting.precision],
        "float32_matmul_precision": "highest",
        "transform_args": {
            "image_size": [global_px, global_px],
            "random_resize": _scale(views.global_scale),
            "color_jitter": {
                "prob": views.jitter,
                "strength": 1.0,
                "brightness": views.brightness,
                "contrast": views.contrast,
                "saturation": views.saturation,
                "hue": views.hue,
            },
            "random_gray_scale": views.grey,
            "gaussian_blur": _blur(views, 0),
            "global_view_1": {"gaussian_blur": _blur(views, 1), "solarize": None},
            "local_view": local if setting.num_local else None,
        },
    }


def _scale(scale: tuple[float, float]) -> dict[str, float]:
    return {"min_scale": scale[0], "max_scale": scale[1]}


def _blur(views: ViewSettings, kind: int) -> dict[str, Any]:
    return {"prob": views.blur[kind], "sigmas": list(views.blur_sigma)}
