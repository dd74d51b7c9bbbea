"""The recipe: everything that decides a run, read by YAML, `--set`, `--help` and Python from one definition.

A recipe is frozen. Unknown keys are errors with a suggestion. Scalars in YAML are read as text and coerced
by the type of their field, because plain YAML turns `1e-4` into a string, `010` into 8 and `off` into False.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo

from adaptkit.errors import UsageError, did_you_mean
from adaptkit.places import absolute
from adaptkit.settings import (
    CACHE_WORDS,
    MAX_COUNT,
    MAX_EPOCHS,
    MAX_PX,
    MAX_STEPS,
    MAX_WORKERS,
    TIME,
    DataSettings,
    Duration,
    HeadSettings,
    ObjectiveSettings,
    OptimSettings,
    ProbeSettings,
    SelectSettings,
    Settings,
    TeacherSettings,
    Tune,
    ViewSettings,
    check_budget,
    in_schema,
    names_from_text,
    none_from_text,
    path_from_text,
)
from adaptkit.yaml_text import parse_yaml, read_yaml


class Recipe(Settings):
    """Everything that decides a run. `recipe.yaml` in a run directory is this, fully resolved."""

    backbone: Annotated[str | None, BeforeValidator(none_from_text)] = Field(None, description="backbone to adapt")
    data: Annotated[
        DataSettings,
        BeforeValidator(path_from_text, json_schema_input_type=DataSettings | str | tuple[str, ...]),
    ] = DataSettings()
    labels: Annotated[str | None, BeforeValidator(none_from_text)] = Field(
        None, description="labelled images that score and choose the checkpoint; never trained on"
    )
    weights: Annotated[str | None, BeforeValidator(none_from_text)] = Field(
        None, description="weights file to use instead of the backbone's own"
    )
    allow_missing: tuple[str, ...] = Field((), description="backbone parameters that may be missing (globs)")
    pretrained: bool = Field(True, description="start from pretrained weights")
    readout: Literal["auto", "cls", "mean", "pool"] = Field("auto", description="how tokens become the embedding")
    require_gain: Annotated[str | None, BeforeValidator(none_from_text)] = Field(
        None, description="METRIC>=POINTS that the lower end of the interval must reach"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    epochs: float = Field(10, gt=0, le=MAX_EPOCHS, description="passes over the training images")
    steps: Annotated[int | None, BeforeValidator(none_from_text)] = Field(
        None, ge=1, le=MAX_STEPS, description="instead of epochs"
    )
    budget: Annotated[
        str | None,
        BeforeValidator(none_from_text),
        AfterValidator(check_budget),
        in_schema(pattern=f"^{TIME.pattern}$"),
    ] = Field(None, description="at most this much time for the whole run, as in 30m; fewer steps if need be")
    batch_size: int = Field(64, ge=2, le=MAX_COUNT, description="images per step, over all processes")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of training; probes use fp32")
    workers: Annotated[int | None, BeforeValidator(none_from_text)] = Field(
        None, ge=0, le=MAX_WORKERS, description="loader processes; null: by the machine"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the backbone (torch.compile); auto: on a GPU, in runs that are long enough"
    )
    tune: Tune = Field(
        "full", description="what is trained of the backbone: full, last-N-blocks (as in last-4-blocks), or lora"
    )
    lora_rank: int = Field(16, ge=1, le=MAX_COUNT, description="lora: rank of the update of each linear layer")
    micro_batch: Annotated[int | None, BeforeValidator(none_from_text)] = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="images that go through the network at once, in each process; the result stays that of the whole "
        "batch; null: all, or as many as the memory holds",
    )
    grad_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them: less memory, slower"
    )
    image_px: Annotated[int | None, BeforeValidator(none_from_text)] = Field(
        None, ge=16, le=MAX_PX, description="side of a global crop; null: the backbone's own"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the student")
    log_every: int = Field(10, ge=1, le=MAX_STEPS, description="steps between lines of metrics.jsonl")
    checkpoint_every: Duration = Field("10%", description="how often the state of training is saved")
    track: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        BeforeValidator(names_from_text, json_schema_input_type=str | tuple[str, ...]),
    ] = Field((), description="experiment trackers to log to: tensorboard, wandb, mlflow; repeatable")
    objective: ObjectiveSettings = ObjectiveSettings()
    head: HeadSettings = HeadSettings()
    views: ViewSettings = ViewSettings()
    optim: OptimSettings = OptimSettings()
    teacher: TeacherSettings = TeacherSettings()
    probe: ProbeSettings = ProbeSettings()
    select: SelectSettings = SelectSettings()

    def with_absolute_paths(self) -> Recipe:
        """The same recipe, its paths independent of the folder it was started in; URLs stay.

        Raises `UsageError` for a URL with a password or a query: what is kept must hold no secret.
        """
        paths: dict[str, Any] = {
            key: absolute(getattr(self, key)) for key in PATH_KEYS if getattr(self, key) is not None
        }
        images = tuple(absolute(path) for path in self.data.path)
        cache = self.data.cache if self.data.cache in CACHE_WORDS else os.path.abspath(self.data.cache)
        paths["data"] = self.data.model_copy(update={"path": images, "cache": cache})
        # a plain word is a name, unless a saved backbone lies in a folder of that name; `nano` always is
        folder = self.backbone if self.backbone != "nano" else None
        if folder and (os.path.dirname(folder) or os.path.isfile(os.path.join(folder, "config.json"))):
            paths["backbone"] = os.path.abspath(folder) if os.path.isdir(folder) else folder
        return self.model_copy(update=paths)


PATH_KEYS = ("labels", "weights")
MAX_PARTS = 8  # of a dotted key; no key has more than two
FLAGS = {  # command-line flag -> key of the recipe
    "data": "data.path",
    "lr": "optim.lr",
    "select": "select.by",
    "max_bad": "data.max_bad",
    "scale": "data.scale",
    "cache": "data.cache",
}


def recipe_fields() -> dict[str, FieldInfo]:
    """Every dotted key and its field, in the recipe's order."""
    found: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {f"{name}.{leaf}": inner for leaf, inner in field.annotation.model_fields.items()}
        else:
            found[name] = field
    return found


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
    given: dict[str, Any] = {_full(key, value): value for key, value in (overrides or {}).items() if value is not None}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {_short(assignment)}: write key=value, as in --set optim.lr=1e-4")
        value = parse_yaml(text, f"--set {_short(key)}")
        key = _full(key, value)
        if any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in given):
            raise UsageError(f"{_short(key)} is given twice; keep one")
        given[key] = value
    for key, value in given.items():
        _set_key(tree, key, value)
    return _validate(tree, str(recipe))


def overrides_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Python -> overrides: `optim__lr=1e-4` is `optim.lr`, and a path is its text."""

    def as_text(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [as_text(each) for each in value]
        return str(value) if isinstance(value, Path) else value

    return {key.replace("__", "."): as_text(value) for key, value in settings.items()}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _find_recipe(recipe: str) -> Path:
    names = recipe_names()
    if recipe in names:
        return recipes_folder() / f"{recipe}.yaml"
    if recipe.endswith((".yaml", ".yml")):
        if os.path.isfile(recipe):  # unlike Path.is_file it answers for overlong names too
            return Path(recipe)
        raise UsageError(f"{recipe}: no such recipe file; check the path, or name one of {', '.join(names)}")
    hint = did_you_mean(recipe, names)
    raise UsageError(f"unknown recipe {_short(repr(recipe))}{hint} (recipes: {', '.join(names)}; or a .yaml file)")


def _full(key: str, value: Any) -> str:
    """`data: ./images` is short for `data: {path: ./images}`."""
    return "data.path" if key == "data" and not isinstance(value, Mapping) else key


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_PARTS:
        raise UsageError(f"unknown key {_short(key)}; see `adaptkit recipes --schema`")
    for parent in parents:
        if _full(parent, tree.get(parent, {})) != parent:
            tree[parent] = {"path": tree[parent]}
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{_short(key)}: {_short(parent)} is not a group of keys")
    tree[leaf] = value


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"recipe {where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = _short(".".join(path))
    if first["type"] != "extra_forbidden":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
        hint = did_you_mean(str(first["input"]), choices)
        return f"{key or 'recipe'} = {_short(repr(first['input']))}: {first['msg'].removeprefix('Value error, ')}{hint}"
    group: type[BaseModel] = Recipe
    for part in path[:-1]:
        group = group.model_fields[part].annotation  # type: ignore[assignment]
    hint = did_you_mean(path[-1], list(group.model_fields))
    if not hint:  # the leaf may be another group's
        full = {each.rpartition(".")[2]: each for each in reversed(recipe_fields())} | FLAGS
        close = get_close_matches(path[-1], full, n=1)
        hint = f"; did you mean {full[close[0]]!r}?" if close else ""
    return f"unknown key {key}{hint or '; see `adaptkit recipes --schema`'}"


def _short(text: str) -> str:
    """At most 80 characters on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
