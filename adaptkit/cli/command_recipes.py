"""`adaptkit recipes`: the shipped recipes, one of them, or the JSON Schema that describes any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import as_json, quiet
from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe, load_recipe, recipe_names, recipes_folder

SCHEMA = "adaptkit.recipes/1"
JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


@click.command("recipes", short_help="List the shipped recipes, or show one.")
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a recipe: every key, its type and default.")
@as_json
@quiet
def recipes_command(name: str | None, schema: bool, as_json: bool, quiet: bool) -> None:
    """List the recipes that come with adaptkit; with NAME print that one as it is shipped.

    A recipe of your own is a YAML file with the keys you want to change: `adaptkit adapt --recipe FILE.yaml`.
    """
    if schema and name is not None:
        raise UsageError(f"recipes {name} --schema: the schema is that of every recipe; leave the name out")
    from adaptkit.cli.console import StreamConsole
    from adaptkit.cli.listing import line, table
    from adaptkit.cli.summary import print_document

    if schema:
        print_document({"$schema": JSON_SCHEMA} | Recipe.model_json_schema())
        return
    if name is not None:
        document = describe_recipe(name)
        if as_json:
            print_document(document)
        else:
            click.echo(document["yaml"], nl=False)
        return
    listed = [{"name": each, "about": about(read(each))} for each in recipe_names()]
    if as_json:
        print_document({"schema": SCHEMA, "recipes": listed})
        return
    console = StreamConsole(sys.stdout)
    table(console, ("recipe", "what it is"), [(each["name"], each["about"]) for each in listed])
    if not quiet:
        line(console, "adaptkit recipes NAME shows one; adaptkit adapt --recipe NAME uses it.", "dim")


def describe_recipe(name: str) -> dict[str, Any]:
    """A recipe's text and what it resolves to. Raises UsageError for an unknown name or a file that is no recipe."""
    resolved, text = load_recipe(name), read(name)
    settings = resolved.model_dump(mode="json")
    return {"schema": SCHEMA, "name": name, "about": about(text), "yaml": text, "settings": settings}


def read(name: str) -> str:
    """The YAML text of a shipped recipe, or of a file."""
    file = recipes_folder() / f"{name}.yaml" if name in recipe_names() else Path(name)
    return file.read_text(encoding="utf-8")


def about(text: str) -> str:
    """The first sentence of the comment at the top."""
    words: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or (words and words[-1].endswith(".")):
            break
        words += line.lstrip("#").split()
    return " ".join(words)
