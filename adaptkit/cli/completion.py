"""What the shell completes, beside click's own options and choices. Called at every press of TAB: no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from adaptkit.aliases import ALIASES, NANO
from adaptkit.cli.command_probe import NAMES
from adaptkit.recipe import Recipe, recipe_fields, recipe_names
from adaptkit.requirement import LABEL_METRICS, TARGET_METRICS

Items = list[CompletionItem]


def with_completions(command: click.Command) -> click.Command:
    """The command, its parameters completed by their names."""
    for parameter in command.params:
        complete = COMPLETIONS.get(parameter.name or "")
        if complete is not None:
            parameter.shell_complete = partial(_answer, complete)  # type: ignore[method-assign]
    return command


def _answer(complete: Callable[[str], Items], ctx: click.Context, incomplete: str) -> Items:
    return complete(incomplete)


def _one_of(words: list[str], incomplete: str, otherwise: str = "plain") -> Items:
    """The words that begin so; if none does, the shell's own files (`file`) or folders (`dir`)."""
    found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    return found if found or otherwise == "plain" else [CompletionItem(incomplete, type=otherwise)]


def _backbones(incomplete: str) -> Items:
    return _one_of([NANO, *ALIASES], incomplete, "dir")


def _recipes(incomplete: str) -> Items:
    return _one_of(recipe_names(), incomplete, "file")


def _probes(incomplete: str) -> Items:
    """Of `knn,li` only what follows the last comma is completed."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return _one_of([before + comma + name for name in NAMES if name not in given], before + comma + last)


def _trackers(incomplete: str) -> Items:
    (tracker, *_) = get_args(Recipe.model_fields["track"].annotation)
    return _one_of([*get_args(tracker)], incomplete)


def _metrics(incomplete: str) -> Items:
    """The metric alone: `>=` in the answer would be a redirection to the shell."""
    return _one_of([*LABEL_METRICS, *TARGET_METRICS], incomplete)


def _assignments(incomplete: str) -> Items:
    """`KEY=VALUE` with the default, or with each word that is possible, to be changed as one likes."""
    texts = [f"{key}={value}" for key, field in recipe_fields().items() for value in _values(field)]
    return _one_of(texts, incomplete)


def _values(field: FieldInfo) -> Iterator[str]:
    if get_origin(field.annotation) is Literal:
        yield from get_args(field.annotation)
    elif field.annotation is bool:
        yield from ("true", "false")
    else:
        yield field.default if isinstance(field.default, str) else json.dumps(field.default, separators=(",", ":"))


def _files(incomplete: str) -> Items:
    return [CompletionItem(incomplete, type="file")]


def _folders(incomplete: str) -> Items:
    return [CompletionItem(incomplete, type="dir")]


COMPLETIONS: dict[str, Callable[[str], Any]] = {
    "backbone": _backbones,
    "backbones": _backbones,
    "pattern": _backbones,
    "recipe": _recipes,
    "name": _recipes,
    "metrics": _probes,
    "require_gain": _metrics,
    "track": _trackers,
    "assignments": _assignments,
    "run": _folders,
    **dict.fromkeys(("data", "labels", "attributes", "queries", "reference", "weights", "output", "cache"), _files),
}
