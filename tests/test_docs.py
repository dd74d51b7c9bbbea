"""The documentation is true: what it shows runs, what it links to is there, what is generated is complete."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest
import yaml
from shown_commands import (
    CHEAP_IN_PYTHON,
    DOCUMENTS,
    HANGS_S,
    NOT_RUN,
    Shown,
    blocks,
    finished_run,
    prepare,
    run_document,
    shown_commands,
)
from tiny_runs import ROOT, environment

import adaptkit
from adaptkit import errors
from adaptkit.backbones.names import find
from adaptkit.cli import main
from adaptkit.cli.options import overrides
from adaptkit.evaluate import OWN_DATA
from adaptkit.probes import PROBES, SOURCE_PROBES
from adaptkit.recipe import Recipe, load_recipe, recipe_names
from adaptkit.report.schema import report_schema
from adaptkit.requirement import LABEL_METRICS, TARGET_METRICS

COMMANDS = [each for document in DOCUMENTS for each in shown_commands(document)]
OURS = [each for each in COMMANDS if each.arguments is not None]
OF_OTHERS = {"--peak-tflops", "--findings", "--network"}  # options of scripts in the repository, and of docker
NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise OSError("the documentation must be built without a network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> Mapping[str, str]:
    """The generated pages."""
    return {path: write() for path, write in generator().PAGES.items()}


def test_commands_are_found() -> None:
    """The reader of documents reads: else all tests below would pass on nothing."""
    texts = {each.text for each in COMMANDS}
    assert "adaptkit check --backbone dino_vits16 --data ./target" in texts
    assert "adaptkit demo" in {each.text for each in COMMANDS if each.document == "README.md"}
    assert any("--labels eurosat --seed 0" in text and "--recipe bits-reset" in text for text in texts)
    assert any(text.startswith("torchrun") for text in texts)
    assert len(OURS) >= 20


@pytest.mark.parametrize("shown", OURS, ids=lambda shown: f"{shown.document}: {shown.text}")
def test_shown_commands_parse(shown: Shown) -> None:
    name, *words = shown.arguments or ()
    command = main.commands[name]
    context = command.make_context(name, list(words), parent=click.Context(main, info_name="adaptkit"))
    options = context.params
    if "assignments" in options:
        flags = {key: value for key, value in options.items() if key in SETTINGS}
        recipe = options["recipe"] if options["recipe"] in recipe_names() else "bits-reset"
        load_recipe(recipe, overrides(flags), options["assignments"])
    backbones = options.get("backbone") or options.get("backbones") or ()
    for backbone in (backbones,) if isinstance(backbones, str) else backbones:
        if re.fullmatch(r"[a-z0-9_]+", backbone):
            find(backbone)


SETTINGS = {
    parameter.name
    for parameter in main.commands["check"].params
    if parameter.name not in ("recipe", "assignments", "as_json", "quiet")
}


def test_nothing_is_listed_as_not_run_that_is_not_shown() -> None:
    for pattern in NOT_RUN:
        assert any(re.search(pattern, each.text) for each in COMMANDS), pattern
    for each in COMMANDS:
        assert each.arguments is not None or each.reason is not None, f"{each.document}: {each.text}: who runs it?"


def inline_code(document: Path) -> Iterator[str]:
    """Code in the text and in tables; of a table of other tools' options not the first column, which is theirs."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    if document.name == "migrating.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_options_and_keys_in_the_text_exist(document: Path) -> None:
    options = {name: {flag for each in command.params for flag in each.opts} for name, command in main.commands.items()}
    every = {flag for flags in options.values() for flag in flags} | {"--help", "--version"}
    keys = set(dotted(load_recipe().model_dump()))
    groups = {key.partition(".")[0] for key in keys if "." in key}
    for code in inline_code(document):
        words = code.replace("\\|", " ").replace("[", " ").replace("]", " ").split()
        known = every
        if words[0] == "adaptkit" and len(words) > 1 and words[1].isalpha() and words[1].islower():
            assert words[1] in options, code
            known = options[words[1]] | {"--help"}
        if words[0] == "adaptkit" or words[0].startswith("--"):
            unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known - OF_OTHERS
            assert not unknown, code
        if "--set" in words[:-1]:
            key = words[words.index("--set") + 1].partition("=")[0]
            assert key in keys | {"KEY", "key"}, code
        if re.fullmatch(r"[a-z]+\.[a-z_]+", code) and code.partition(".")[0] in groups - {"data"}:
            assert code in keys or code.endswith((".md", ".py", ".safetensors")), code


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_recipes_and_snippets_are_valid(document: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(document, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert load_recipe(file) != load_recipe(), text
    for text in blocks(document, "python"):
        compile(text, document.name, "exec")


def test_every_option_is_in_the_reference(pages: Mapping[str, str]) -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", pages["reference/commands.md"], re.M | re.S))
    assert set(sections) == set(main.commands)
    for name, command in main.commands.items():
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert f"`{option.opts[0]}" in sections[name]


def test_every_recipe_key_is_in_the_reference_with_its_default(pages: Mapping[str, str]) -> None:
    page = pages["reference/recipe.md"]
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| `([^|]+)` \| ([^|]+) \|$", page, re.M)}
    defaults = flat(Recipe().model_dump(mode="json"))
    assert set(rows) == set(defaults)
    for key, (kind, default, what) in rows.items():
        assert "group" not in kind, key
        assert len(what) > 5, key
        expected = defaults[key]
        shown = yaml.safe_load(default)
        assert shown == pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else shown == expected, key
    assert all(f"`{name}`" in page for name in recipe_names())


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_report_key_metric_and_probe_is_in_the_reference(pages: Mapping[str, str]) -> None:
    page = pages["reference/report.md"]
    schema = report_schema()
    for part in (schema, *schema["$defs"].values()):
        for key in part["properties"]:
            assert re.search(rf"^\| `(\S+\.)?{key}` \|", page, re.M), key
    probes = (*PROBES, *SOURCE_PROBES, *OWN_DATA)
    for name in (*LABEL_METRICS, *TARGET_METRICS, *probes, "bit_information", "teacher_d_eff"):
        assert re.search(rf"^\| `{name}` \|.*\w.*\|$", page, re.M), name


def test_every_exit_code_is_in_the_reference_and_the_readme(pages: Mapping[str, str]) -> None:
    codes = {each.exit_code for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for code in codes | {0}:
        assert re.search(rf"^\| {code} \|.*\w", pages["reference/exit-codes.md"], re.M), code
        assert re.search(rf"^\| {code} \|.*\w", readme, re.M), code


def test_every_public_name_is_in_the_reference(pages: Mapping[str, str]) -> None:
    page = pages["reference/python.md"]
    for name in adaptkit.PUBLIC:
        assert f"## {name}\n" in page
    assert "    labels: str | Path | None = None,\n" in page
    assert "**settings: Any,\n) -> AdaptResult\n" in page


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "link", "iframe", "source", "video"):
            self.loaded += [given[key] for key in ("src", "href") if key in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are errors, and nothing may open a connection."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(NO_NETWORK)
    variables = environment(NO_MKDOCS_2_WARNING="1")
    variables["PYTHONPATH"] = os.pathsep.join([str(folder / "blocked"), variables["PYTHONPATH"]])
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-f",
        ".mkdocs.yml",
        "--strict",
        "--site-dir",
        str(folder / "site"),
    ]
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.long
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    read = {}
    for path in site.rglob("*.html"):
        read[path] = Links()
        read[path].feed(path.read_text(encoding="utf-8"))
    assert {"index.html", "quality.html", "reference/commands.html", "examples/index.html"} <= {
        path.relative_to(site).as_posix() for path in read
    }
    for path, page in read.items():
        for link in page.loaded:
            assert not re.match(r"(\w+:)?//", link), f"{path}: loads {link}"
        if path.name == "404.html":  # its links are from the top of a server
            continue
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target in read and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in read[target].anchors, f"{path}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(\w+:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.long
def test_nothing_generated_is_left_in_the_repository(site: Path) -> None:
    assert {path.name for path in (ROOT / "docs").iterdir() if path.is_dir()} - {"__pycache__"} == {"images", "codes"}
    for image in (ROOT / "docs" / "images").iterdir():
        assert image.stat().st_size < 150_000, image
        assert any(f"images/{image.name}" in document.read_text(encoding="utf-8") for document in DOCUMENTS), image


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and labelled images, and a finished run, to be copied."""
    folder = prepare(tmp_path_factory.mktemp("material"))
    return folder, finished_run(folder)


RUN = sorted({each.document for each in OURS if each.reason is None})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_shown_commands_run(
    name: str, material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands of a document, in their order and in one folder, then its snippets of Python."""
    folder, run = material
    work = tmp_path / "work"
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns("finished"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shown = [each for each in OURS if each.document == name]
    assert run_document(shown, work, run) == []
    document = next(document for document in DOCUMENTS if document.name == name)
    for text in blocks(document, "python"):
        for wanted in re.findall(r"runs/\w+(?=/backbone)", text):
            if not (work / wanted).exists():
                shutil.copytree(run, work / wanted)
        words = [sys.executable, "-c", text.replace("epochs=5", CHEAP_IN_PYTHON)]
        done = subprocess.run(words, cwd=work, env=environment(), capture_output=True, text=True, timeout=HANGS_S)
        assert done.returncode == 0, done.stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    with capsys.disabled():
        print(f" [{name}: {len(shown)} commands, {used:.0f} s of CPU] ", end="")
