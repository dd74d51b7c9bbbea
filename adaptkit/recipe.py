"""The typed settings of a run: one definition per setting, read by YAML, `--set`, `--help` and Python.

A recipe is frozen. Unknown keys are errors with a suggestion. Scalars in YAML are read as text and coerced
by the type of their field, because plain YAML turns `1e-4` into a string, `010` into 8 and `off` into False.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as pydantic_model_validator

from adaptkit.errors import UsageError, did_you_mean
from adaptkit.yaml_text import parse_yaml, read_yaml

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(%|epochs?|steps?|images?)")


def _check_duration(text: str) -> str:
    if text != "never" and not DURATION.fullmatch(text):
        raise ValueError("write 'never' or a number with a unit, as in 25%, 2 epochs, 500 steps, 10000 images")
    return text


def _none_from_text(value: object) -> object:
    return None if value in ("null", "none", "None", "~", "") else value


Duration = Annotated[str, AfterValidator(_check_duration)]
"""`never`, or a share of the run (`25%`), `epochs`, `steps` or `images`; `schedules.to_steps` converts."""


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ObjectiveSettings(Settings):
    """The binary channel and its loss (arXiv 2602.09764)."""

    name: Literal["bits"] = Field("bits", description="training objective")
    num_bits: int = Field(256, ge=2, description="bits of the code (B)")
    hidden_dim: int = Field(2048, ge=1, description="width of the projection head's two hidden layers")
    beta: float = Field(0.1, ge=0, description="weight of the coding rate")
    eps: float = Field(0.5, gt=0, description="distortion of the coding rate")
    centre: bool = Field(True, description="subtract the batch mean from the logits in the coding rate")
    balance: Literal["never", "draw", "always"] = Field(
        "always", description="keep the teacher's bits half 0 and half 1: at every draw of the head, or at every step"
    )


class HeadSettings(Settings):
    """When the projection head is drawn anew, and how long it trains alone afterwards."""

    reset_every: Duration = Field("25%", description="draw the head anew this often")
    warmup: Duration = Field("5%", description="backbone frozen this long after every draw")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the projection head")


class ViewSettings(Settings):
    """What a view is: crops and flips in the workers, photometrics on the device."""

    num_global: int = Field(2, ge=2, description="global crops per image")
    num_local: int = Field(6, ge=0, description="local crops per image")
    local_ratio: float = Field(96 / 224, gt=0, le=1, description="local crop side / global crop side")
    global_scale: tuple[float, float] = Field((0.4, 1.0), description="area share of a global crop")
    local_scale: tuple[float, float] = Field((0.05, 0.4), description="area share of a local crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    vflip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    jitter: float = Field(0.8, ge=0, le=1, description="probability of colour jitter")
    brightness: float = Field(0.2, ge=0, le=1, description="jitter strength")
    contrast: float = Field(0.2, ge=0, le=1, description="jitter strength")
    saturation: float = Field(0.1, ge=0, le=1, description="jitter strength")
    hue: float = Field(0.02, ge=0, le=0.5, description="jitter strength, in turns of the colour circle")
    grey: float = Field(0.05, ge=0, le=1, description="probability of a grey view")
    blur: tuple[float, float, float] = Field(
        (0.5, 0.1, 0.3), description="probability of blur: first global, further global, local crops"
    )
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="blur in pixels at 224 px crops")
    solarize: float = Field(0.0, ge=0, le=1, description="probability of solarising the second global crop")

    @pydantic_model_validator(mode="after")
    def _ranges_are_ordered(self) -> ViewSettings:
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name != "blur_sigma" and high > 1):
                raise ValueError(f"{name} must be a range 0 < low <= high{'' if name == 'blur_sigma' else ' <= 1'}")
        if not all(0 <= p <= 1 for p in self.blur):
            raise ValueError("blur probabilities must lie in [0, 1]")
        return self


class OptimSettings(Settings):
    """AdamW with layer-wise decay of the learning rate and a cosine schedule."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate of the backbone's last layer")
    final_lr: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    warmup: Duration = Field("10%", description="linear warm-up of the learning rate")
    layer_decay: float = Field(0.75, gt=0, le=1, description="learning rate factor per layer towards the input")
    weight_decay: float = Field(0.04, ge=0, description="AdamW weight decay at the start")
    final_weight_decay: float = Field(0.04, ge=0, description="AdamW weight decay at the end")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")


class TeacherSettings(Settings):
    """The exponential moving average of the student."""

    momentum: Annotated[float | None, BeforeValidator(_none_from_text)] = Field(
        None, ge=0, le=1, description="EMA momentum at the start; null: 1 - 10 / steps"
    )
    final_momentum: float = Field(1.0, ge=0, le=1, description="EMA momentum at the end")


class DataSettings(Settings):
    """Which images are held out, and how many bad ones are accepted."""

    split_by: Literal["file", "folder"] = Field("file", description="unit that is held out together")
    max_bad: str = Field("1%", pattern=r"^\d+(\.\d+)?%?$", description="bad images accepted; at least 5 always are")


class ProbeSettings(Settings):
    """What is measured, how often, on how many images."""

    every: Duration = Field("20%", description="probe the teacher on the selection split this often")
    max_gallery: int = Field(10_000, ge=1, description="labelled gallery images used at most")
    max_queries: int = Field(4_000, ge=2, description="labelled query images used at most, both halves together")
    batch_size: int = Field(128, ge=1, description="images per forward pass when embedding")


class SelectSettings(Settings):
    """How the checkpoint is chosen."""

    by: Literal["auto", "labels", "label-free"] = Field("auto", description="auto: labels when they are given")
    alphas: tuple[float, ...] = Field((0.25, 0.5, 0.75), description="points between original (0) and adapted (1)")
    keep: int = Field(3, ge=1, description="candidate checkpoints kept on disk")

    @pydantic_model_validator(mode="after")
    def _alphas_lie_between(self) -> SelectSettings:
        if not all(0 < alpha < 1 for alpha in self.alphas):
            raise ValueError("alphas must lie strictly between 0 and 1; both ends are always candidates")
        return self


class Recipe(Settings):
    """Everything that decides a run. `recipe.yaml` in a run directory is this, fully resolved."""

    backbone: Annotated[str | None, BeforeValidator(_none_from_text)] = Field(None, description="backbone to adapt")
    data: Annotated[str | None, BeforeValidator(_none_from_text)] = Field(None, description="folder of images")
    labels: Annotated[str | None, BeforeValidator(_none_from_text)] = Field(None, description="labelled images")
    weights: Annotated[str | None, BeforeValidator(_none_from_text)] = Field(None, description="weights file")
    allow_missing: tuple[str, ...] = Field((), description="backbone parameters that may be missing (globs)")
    pretrained: bool = Field(True, description="start from pretrained weights")
    readout: Literal["auto", "cls", "mean", "pool"] = Field("auto", description="how tokens become the embedding")
    require_gain: Annotated[str | None, BeforeValidator(_none_from_text)] = Field(
        None, description="METRIC>=POINTS that the lower end of the interval must reach"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    epochs: float = Field(10, gt=0, description="passes over the training images")
    steps: Annotated[int | None, BeforeValidator(_none_from_text)] = Field(None, ge=1, description="instead of epochs")
    batch_size: int = Field(128, ge=2, description="images per step, over all processes")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of training; probes use fp32")
    workers: Annotated[int | None, BeforeValidator(_none_from_text)] = Field(
        None, ge=0, description="loader processes; null: by the machine"
    )
    image_px: Annotated[int | None, BeforeValidator(_none_from_text)] = Field(
        None, ge=16, description="side of a global crop; null: the backbone's own"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the student")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: Duration = Field("10%", description="how often the state of training is saved")
    objective: ObjectiveSettings = ObjectiveSettings()
    head: HeadSettings = HeadSettings()
    views: ViewSettings = ViewSettings()
    optim: OptimSettings = OptimSettings()
    teacher: TeacherSettings = TeacherSettings()
    sources: DataSettings = DataSettings()
    probe: ProbeSettings = ProbeSettings()
    select: SelectSettings = SelectSettings()

    def with_absolute_paths(self) -> Recipe:
        """The same recipe, its paths independent of the folder it was started in."""
        paths = {key: os.path.abspath(getattr(self, key)) for key in PATH_KEYS if getattr(self, key) is not None}
        # a plain word is a name, unless a saved backbone lies in a folder of that name; `nano` always is
        folder = self.backbone if self.backbone != "nano" else None
        if folder and (os.path.dirname(folder) or os.path.isfile(os.path.join(folder, "config.json"))):
            paths["backbone"] = os.path.abspath(folder) if os.path.isdir(folder) else folder
        return self.model_copy(update=paths)


PATH_KEYS = ("data", "labels", "weights")
FLAGS = {  # command-line flag -> key of the recipe
    "lr": "optim.lr",
    "select": "select.by",
    "max_bad": "sources.max_bad",
}


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, else beside it in a source checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(
    recipe: str | Path = "bits-reset",
    overrides: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> Recipe:
    """Resolve defaults < recipe < overrides and assignments into one frozen `Recipe`.

    `recipe` is a shipped name or a YAML file, `overrides` maps dotted keys to values (None is "not given"),
    `assignments` are `key=value` texts as `--set` takes them. Raises `UsageError` for an unknown recipe or key, a
    value of the wrong type, or a key given twice.
    """
    tree = read_yaml(_find_recipe(str(recipe)))
    given: dict[str, Any] = {key: value for key, value in (overrides or {}).items() if value is not None}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: write key=value, as in --set optim.lr=1e-4")
        if any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in given):
            raise UsageError(f"{key} is given twice; keep one")
        given[key] = parse_yaml(text, f"--set {key}")
    for key, value in given.items():
        _set_key(tree, key, value)
    return _validate(tree, str(recipe))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _find_recipe(recipe: str) -> Path:
    names = recipe_names()
    if recipe in names:
        return recipes_folder() / f"{recipe}.yaml"
    if recipe.endswith((".yaml", ".yml")):
        if Path(recipe).is_file():
            return Path(recipe)
        raise UsageError(f"{recipe}: no such recipe file")
    hint = did_you_mean(recipe, names)
    raise UsageError(f"unknown recipe {recipe!r}{hint} (recipes: {', '.join(names)}; or a .yaml file)")


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{key}: {parent} is not a group of keys")
    tree[leaf] = value


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"recipe {where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] != "extra_forbidden":
        return f"{key or 'recipe'} = {first['input']!r}: {first['msg']}"
    group: type[BaseModel] = Recipe
    for part in path[:-1]:
        group = group.model_fields[part].annotation  # type: ignore[assignment]
    return f"unknown key {key}{did_you_mean(path[-1], list(group.model_fields))}"
