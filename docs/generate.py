"""The reference pages of the documentation, made from the code when mkdocs builds the site; none is committed.

mkdocs calls `on_files` and `on_page_markdown` (`hooks` in .mkdocs.yml). `PAGES` are the pages and what writes them.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

import adaptkit
from adaptkit import errors
from adaptkit.cli import main
from adaptkit.cli.command_recipes import about, read
from adaptkit.cli.options import field_of
from adaptkit.evaluate import OWN_DATA
from adaptkit.probes import PROBES
from adaptkit.probes.drift import drift_scores
from adaptkit.probes.lidar import lidar_score
from adaptkit.recipe import FLAGS, Recipe, recipe_names
from adaptkit.report.html.curves import CHARTS, NAMES
from adaptkit.report.html.page import METRICS
from adaptkit.report.numbers import PERCENT
from adaptkit.report.schema import Report
from adaptkit.requirement import LABEL_METRICS, TARGET_METRICS

ROOT = Path(__file__).parent.parent
SHOWN_FOLDERS = ("examples", "benchmarks")  # their READMEs are pages, and what those link to lies beside them
LONGEST_LINE = 88
NO_LIMIT = 1_000_000  # bounds from here on only stop slips of the finger


def commands_page() -> str:
    """Every command with its usage, description and options, as `--help` has them."""
    lines = ["# Commands", "", "The text of `adaptkit COMMAND --help`, made from the code.", ""]
    with click.Context(main, info_name="adaptkit") as parent:
        for name in main.list_commands(parent):
            command = main.commands[name]
            with click.Context(command, info_name=name, parent=parent) as context:
                lines += [f"## {name}", "", *_command(command, context), ""]
    return "\n".join(lines)


def recipe_page() -> str:
    """Every key of a recipe: type, default, what it does; and the shipped recipes."""
    lines = [
        "# Recipe keys",
        "",
        "Every setting of a run. Write those you change into a YAML file (`adaptkit adapt --recipe FILE.yaml`), or",
        "give them as `--set KEY=VALUE`. Unknown keys are errors. A duration, where the default is one, is `never` or",
        "a number with a unit: `25%` of the run, `2 epochs`, `500 steps`, `10000 images`.",
        "",
    ]
    flags = {key: "--" + flag.replace("_", "-") for flag, key in FLAGS.items()}
    options = {option for parameter in main.commands["adapt"].params for option in parameter.opts}
    for group, keys in _groups(Recipe):
        model = Recipe if not group else field_of(group).annotation
        doc = _first_paragraph(inspect.getdoc(model))
        lines += [
            f"## {group or 'The run'}",
            "",
            doc,
            "",
            "| key | type | default | what it is |",
            "| --- | --- | --- | --- |",
        ]
        for key in keys:
            field = field_of(key)
            flag = flags.get(key, "--" + key.replace("_", "-"))
            given = next((each for each in (flag, f"--no-{key}") if each in options), None)
            by_flag = f" Also `{given}`." if given else ""
            what = _cell(f"{_sentence(field.description or '')}{by_flag}")
            kind = _cell(_type(field.annotation, field.metadata))
            lines.append(f"| `{key}` | {kind} | `{_default(field.default)}` | {what} |")
        lines.append("")
    lines += [
        "## Shipped recipes",
        "",
        "`adaptkit recipes NAME` prints one.",
        "",
        "| recipe | what it is |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {_cell(about(read(name)))} |" for name in recipe_names()]
    return "\n".join(lines) + "\n"


def report_page() -> str:
    """Every key of report.json, every metric, every probe."""
    lines = [
        "# report.json and metrics",
        "",
        "`RUN/report.json` is the result of a run (`adaptkit.report/1`); `adaptkit report --schema` prints its JSON",
        "Schema. Keys may be added; none goes, none changes its meaning.",
        "",
        "## Keys",
        "",
        "| key | type | what it is |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{key}` | {_cell(kind)} | {_cell(what)} |" for key, kind, what in report_keys(Report)]
    lines += ["", "## Metrics", "", "| metric | unit | what it is |", "| --- | --- | --- |"]
    for name in metric_names():
        unit = "%" if name in PERCENT else ""
        needs = " (needs labels)" if name in LABEL_METRICS else ""
        lines.append(f"| `{name}` | {unit} | {_cell(METRICS.get(name, '') + needs)} |")
    lines += [
        "",
        "## The log of training",
        "",
        "Lines of `RUN/metrics.jsonl`.",
        "",
        "| key | what it is |",
        "| --- | --- |",
    ]
    lines += [f"| `{key}` | {_cell(what)} |" for key, what in log_keys()]
    lines += ["", "## Probes", "", "For `adaptkit probe --metric`.", "", "| probe | what it gives |", "| --- | --- |"]
    own = {name: import_module(f"adaptkit.dense.{name}").measure for name in OWN_DATA}
    every = PROBES | {"lidar": lidar_score, "drift": drift_scores} | own
    lines += [f"| `{name}` | {_cell(_first_paragraph(inspect.getdoc(probe)))} |" for name, probe in every.items()]
    return "\n".join(lines) + "\n"


def exit_codes_page() -> str:
    """Exit code, the exception that stands for it in Python, what it means."""
    lines = [
        "# Exit codes",
        "",
        "The same number is in `RUN/status.json`, as launchers like torchrun hide exit codes. In Python every code but",
        "0 and 1 is an exception of `adaptkit.errors`; all are of the family `AdaptkitError`.",
        "",
        "| code | exception | means |",
        "| --- | --- | --- |",
        "| 0 |  | Done. |",
        "| 1 | any other | Internal error: a bug, and the only code with a traceback. |",
    ]
    lines += [f"| {code} | `{name}` | {_cell(what)} |" for code, name, what in exit_codes()]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """The public names of the package: signature and docstring."""
    lines = ["# Python", "", "`import adaptkit` is free: a name imports what it needs when it is first used.", ""]
    for name, module in adaptkit.PUBLIC.items():
        thing = getattr(import_module(module), name)
        lines += [f"## {name}", "", *_public(name, thing), ""]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/recipe.md": recipe_page,
    "reference/report.md": report_page,
    "reference/exit-codes.md": exit_codes_page,
    "reference/python.md": python_page,
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the READMEs of examples and benchmarks with the files beside them."""
    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    for path in shown_files():
        name = path.relative_to(ROOT).as_posix()
        content = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/, which work where the repository is browsed, lead to what the site has of it, or nowhere."""

    def link(match: re.Match[str]) -> str:
        target = match["path"].removeprefix("docs/")
        up = "../" * page.file.src_uri.count("/")
        return f"[{match['text']}]({up}{target})" if files.get_file_from_path(target) else match["text"]

    return re.sub(r"\[(?P<text>[^\]]+)\]\((?:\.\./)+(?P<path>[^)\s]+)\)", link, markdown)


def shown_files() -> list[Path]:
    """READMEs of the shown folders and the files they link to."""
    found = []
    for readme in sorted(path for folder in SHOWN_FOLDERS for path in (ROOT / folder).rglob("README.md")):
        links = re.findall(r"\]\(([^)#:\s]+)\)", readme.read_text(encoding="utf-8"))
        linked = {readme.parent / link for link in links if not link.startswith("..")}
        found += [readme, *sorted(path for path in linked if path.is_file() and path.name != "README.md")]
    return found


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, exception, what it means) of every class of errors that has a code of its own."""
    family = [each for each in vars(errors).values() if inspect.isclass(each) and "exit_code" in vars(each)]
    known = [(each.exit_code, each.__name__, _first_paragraph(inspect.getdoc(each))) for each in family]
    return sorted(each for each in known if each[0] != errors.AdaptkitError.exit_code)


def metric_names() -> list[str]:
    """What `probes` of a report may name, in the order of the report, then others that are known."""
    return list(dict.fromkeys([*LABEL_METRICS, *TARGET_METRICS, *METRICS]))


def log_keys() -> list[tuple[str, str]]:
    """(key, what it is) of a line of metrics.jsonl."""
    drawn = [
        (key, title if len(keys) == 1 else f"{title}: {what}")
        for title, _, _, keys in CHARTS
        for key, what in keys.items()
    ]
    return [*drawn, *NAMES.items()]


def report_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, what it is) of a model, depth first."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = _model_in(field.annotation)
        what = field.description or (_first_paragraph(inspect.getdoc(inner)) if inner else "")
        yield key, _type(field.annotation, field.metadata), what
        if inner:
            steps = {dict: ".METRIC", list: "[]"}.get(get_origin(_plain(field.annotation)) or object, "")
            yield from report_keys(inner, f"{key}{steps}.")


def recipe_keys() -> list[str]:
    """All dotted keys of a recipe."""
    return [key for _, keys in _groups(Recipe) for key in keys]


def _groups(model: type[BaseModel]) -> list[tuple[str, list[str]]]:
    """(group, its dotted keys); the group "" holds what is in none."""
    alone, groups = [], []
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None:
            alone.append(name)
        else:
            groups.append((name, [f"{name}.{key}" for key in inner.model_fields]))
    return [("", alone), *groups]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings or report class inside an annotation, if any."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _plain(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(each for each in get_args(annotation) if each is not types.NoneType))
    return annotation


def _type(annotation: Any, metadata: Any = ()) -> str:
    """A type in words: `float, above 0, below 1, or null`."""
    optional = types.NoneType in get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0], metadata)
    kind = _plain(annotation)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        text = ", ".join(f"`{each}`" for each in inner)
    elif origin in (tuple, list):
        several = [_type(each) for each in inner if each is not ...]
        text = f"list of {several[0]}" if origin is list or ... in inner else f"{len(several)} of {several[0]}"
    elif origin is dict:
        text = f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    else:
        text = {
            "str": "text",
            "int": "whole number",
            "float": "number",
            "bool": "true or false",
            "Any": "anything",
        }.get(getattr(kind, "__name__", str(kind)), "group")
    return ", ".join([text, *_bounds(metadata)]) + (", or null" if optional else "")


def _bounds(metadata: Any) -> Iterator[str]:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for each in metadata:
        for name, word in words.items():
            if (bound := getattr(each, name, None)) is not None and bound < NO_LIMIT:
                yield f"{word} {bound:,}" if isinstance(bound, int) else f"{word} {bound:g}"


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_default, value)) + "]"
    return str(value)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("```text", usage, "```", "", inspect.cleandoc(command.help or "").replace("\b\n", ""), "")
    yield from ("| option | what it does |", "| --- | --- |")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield f"| `{record[0]}` | {_cell(record[1])} |"  # in code Python-Markdown takes bars as they are


def _public(name: str, thing: Any) -> Iterator[str]:
    doc = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        yield from (doc, "", "Its fields are the [recipe keys](recipe.md).")
        return
    yield from ("```python", _signature(name, inspect.signature(thing)), "```", "", doc)


def _signature(name: str, signature: inspect.Signature) -> str:
    """With annotations as they stand in the source; a parameter a line where one line would be too long."""
    parameters = [each.replace(annotation=_Bare.of(each.annotation)) for each in signature.parameters.values()]
    bare = signature.replace(parameters=parameters, return_annotation=_Bare.of(signature.return_annotation))
    text = f"{name}{bare}"
    if len(text) <= LONGEST_LINE:
        return text
    shown = str(bare.replace(return_annotation=inspect.Signature.empty))[1:-1]
    ending = text.rpartition(")")[2]
    depth, start, lines = 0, 0, []
    for at, letter in enumerate(shown + ","):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            lines.append(f"    {shown[start:at].strip()},")
            start = at + 1
    return "\n".join([f"{name}(", *lines, f"){ending}"])


class _Bare:
    """An annotation that is printed without the quotes of a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, annotation: Any) -> Any:
        return cls(annotation) if isinstance(annotation, str) else annotation


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _cell(text: str) -> str:
    """Text inside a table, in one line."""
    return " ".join(text.replace("|", "\\|").split())
