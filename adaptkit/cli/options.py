"""Command-line options. What is a setting of the recipe takes its help, type and default from there."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from adaptkit.errors import UsageError, did_you_mean
from adaptkit.recipe import FLAGS, Recipe, recipe_names

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

METAVARS = {
    "backbone": "NAME|FOLDER",
    "data": "FOLDER|LIST|TAR|PARQUET|URL",
    "labels": "FOLDER|CSV",
    "weights": "FILE",
    "require_gain": "METRIC>=POINTS",
    "max_bad": "COUNT|PERCENT",
    "budget": "TIME",
    "cache": "auto|on|off|FOLDER",
    "track": "tensorboard|wandb|mlflow",
    "allow_missing": "GLOB",
}

WHAT = ("backbone", "data", "labels")
HOW = (
    "epochs",
    "steps",
    "budget",
    "batch_size",
    "lr",
    "workers",
    "select",
    "require_gain",
    "max_bad",
    "cache",
    "compile",
    "track",
)
PRECISIONS = ("fp32", "bf16", "fp16")  # without auto, which is for training
LOADING = ("weights", "pretrained", "allow_missing", "readout", "seed", "precision")

as_json = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
quiet = click.option("--quiet", is_flag=True, help="No progress and no notes; only the result and errors.")


class Words(click.Choice[str]):
    """One of several words; a misspelt one is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """As click's, with a suggestion."""
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + did_you_mean(str(value), self.choices)


def setting(name: str, **changes: Any) -> Decorator:
    """The option `--name` for the recipe's setting of that name (or the key `FLAGS` gives). Not given is None."""
    field = field_of(FLAGS.get(name, name))
    flag = "--" + name.replace("_", "-")
    options: dict[str, Any] = {"default": None, "metavar": METAVARS.get(name), "help": _help(field)}
    kind = _plain_type(field.annotation)
    if kind is bool:
        on_by_default = field.default is True
        flag = f"--no-{name.replace('_', '-')}" if on_by_default else flag
        text = f"Do not {field.description}." if on_by_default else _help(field)
        options |= {"help": text, "is_flag": True, "flag_value": not on_by_default, "type": bool, "metavar": None}
        return click.option(flag, name, **options | changes)
    if get_origin(kind) is Literal:
        options["type"] = Words(get_args(kind))
    elif get_origin(kind) is tuple:
        options |= {"multiple": True, "type": str}
    else:
        options["type"] = kind
    return click.option(flag, name, **options | changes)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command takes that resolves a recipe: what to adapt, the recipe, and settings on top of it."""
    recipe = click.option(
        "--recipe",
        default="bits-reset",
        show_default=True,
        metavar="NAME|FILE.yaml",
        help=f"Where the settings come from ({', '.join(recipe_names()) or 'a file'}).",
    )
    assignments = click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the recipe; repeatable."
    )
    options = [*map(setting, WHAT), recipe, assignments, *map(setting, HOW), *map(setting, LOADING)]
    for option in reversed(options):  # the last one applied is the first one shown
        command = option(command)
    return command


def embedding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command takes that embeds images with a backbone outside a run."""
    precision = Words(PRECISIONS)
    size = field_of("probe.batch_size").default
    count = click.IntRange(min=1)
    options = [
        *map(setting, ("weights", "pretrained", "allow_missing", "readout")),
        setting("seed", type=click.IntRange(min=0)),
        click.option("--precision", type=precision, default="fp32", show_default=True, help="Of the embeddings."),
        click.option("--batch-size", type=count, default=size, show_default=True, help="Images per forward pass."),
        setting("workers", type=click.IntRange(min=0)),
        setting("scale"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def field_of(key: str) -> FieldInfo:
    """The recipe's field for a dotted key."""
    group: Any = Recipe
    *parents, leaf = key.split(".")
    for parent in parents:
        group = group.model_fields[parent].annotation
    field: FieldInfo = group.model_fields[leaf]
    return field


def overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """Values of `setting` options -> dotted keys of the recipe, those that were given. Raises UsageError.

    An empty text is what a script passes when its variable is unset: leaving a gate out in silence would be worse.
    """
    for name, value in flags.items():
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise UsageError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    return {FLAGS.get(name, name): value for name, value in flags.items() if value not in (None, ())}


def refuse_empty() -> None:
    """The same for the options of the running command that are no settings of the recipe. Raises UsageError."""
    context = click.get_current_context()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise UsageError(f"{parameter.opts[0]} is empty; give it a value, or leave it out")


def _plain_type(annotation: Any) -> Any:
    """`int | None` -> int."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def _help(field: FieldInfo) -> str:
    description = field.description or ""
    text = description[:1].upper() + description[1:]
    default = field.default
    shown = "" if default is None or default == () else f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text}.  [default: {shown}]" if shown else f"{text}."
