"""Imports go only downwards, and no file grows beyond what one reads at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "adaptkit"
LAYERS = (  # top to bottom; a part may import what stands in a lower line
    ("cli",),
    ("train",),
    ("preflight", "language"),
    ("vectors", "formats", "pushing"),
    ("caching", "pictures", "tracking"),
    ("estimate",),
    ("outcome",),
    ("supervise",),
    ("prepare", "memory"),
    ("loop", "manifest", "recovery", "endings"),
    ("compiling",),
    ("session",),
    ("select",),
    ("export", "evaluate", "page"),
    ("vector_files", "vector_cache"),
    ("inputs", "run", "checkpoints", "report"),
    ("dense",),
    ("probes",),
    ("embedding",),
    ("meter", "optimizer", "collapse", "signals", "space"),
    ("loading", "distill", "processes", "tuning"),
    ("microbatch",),
    ("objectives", "views", "backbones", "sources"),
    ("schedules",),
    ("requirement",),
    ("recipe",),
    ("settings",),
    ("yaml_text", "owner", "places", "shortage", "aliases"),
    ("errors",),
)
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
SAME_LINE_ALLOWED = {("checkpoints", "run")}
LAZY = {"__init__", "__main__"}  # they stand above all; `adaptkit/__init__` itself may be imported only for its version
HEAVY = {"torch", "torchvision", "timm", "accelerate", "matplotlib"}
LIGHT_PARTS = {
    "aliases",
    "cli",
    "errors",
    "yaml_text",
    "settings",
    "places",
    "recipe",
    "requirement",
    "run",
    "owner",
    "shortage",
    "schedules",
    "report",
    "page",
    "__init__",
    "__main__",
}
MAX_LINES = 300


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`adaptkit.probes.knn` -> probes; `adaptkit` -> __init__."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that the layers can be read off them"
            if node.module == "adaptkit":  # from adaptkit import run: the part is in the names
                yield from (f"adaptkit.{alias.name}" if alias.name in RANKS else "adaptkit" for alias in node.names)
            else:
                yield node.module or ""


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that go upwards or sideways."""
    here, found = part_of(module), []
    if here in LAZY:
        return []
    if here not in RANKS:
        return [f"{module}: belongs to no layer; add {here} to LAYERS"]
    for target in imports(ast.parse(source)):
        there = part_of(target)
        if target.split(".")[0] != "adaptkit" or there == here or (here, there) in SAME_LINE_ALLOWED:
            continue
        if there in LAZY:
            if here != "cli":
                found.append(f"{module} imports the package itself")
        elif RANKS.get(there, -1) <= RANKS[here]:
            found.append(f"{module} imports {target}: upwards or sideways")
    return found


def top_level_imports(tree: ast.Module) -> set[str]:
    """Distributions imported as soon as the module is: outside functions and TYPE_CHECKING blocks."""
    names: set[str] = set()
    blocks: list[ast.stmt] = list(tree.body)
    while blocks:
        node = blocks.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {name.split(".")[0] for name in imports(ast.Module([node], []))}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            blocks += node.body + node.orelse
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            blocks += node.body
    return names


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_imports_go_only_downwards(path: Path) -> None:
    assert violations(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in files() if part_of(module_of(path)) in LIGHT_PARTS], ids=module_of)
def test_light_parts_import_nothing_heavy_at_the_top(path: Path) -> None:
    assert not top_level_imports(ast.parse(path.read_text(encoding="utf-8"))) & HEAVY


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("adaptkit.recipe", "import adaptkit.train"),
        ("adaptkit.errors", "from adaptkit.recipe import Recipe"),
        ("adaptkit.probes.knn", "def late():\n    from adaptkit.select import choose"),
        ("adaptkit.views.multicrop", "from adaptkit.backbones import Backbone"),
        ("adaptkit.sources.folder", "import adaptkit.objectives.bits as bits"),
        ("adaptkit.loading", "from adaptkit import distill"),
        ("adaptkit.train", "from adaptkit.cli.console import RichReporter"),
        ("adaptkit.embedding", "import adaptkit"),
        ("adaptkit.stranger", ""),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("adaptkit.cli.execute", "def late():\n    from adaptkit.train import run_adaptation"),
        ("adaptkit.probes.knn", "from adaptkit.probes.score import Score\nfrom adaptkit.errors import DataError"),
        ("adaptkit.train", "import torch\nfrom adaptkit import select"),
        ("adaptkit", "from adaptkit.train import adapt"),
    ],
)
def test_downward_and_inner_imports_are_fine(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_no_cycles_between_modules() -> None:
    graph = {}
    for path in files():
        module = module_of(path)
        if part_of(module) not in LAZY:
            graph[module] = {
                t for t in imports(ast.parse(path.read_text(encoding="utf-8"))) if t.startswith("adaptkit.")
            }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
