"""`adaptkit recipes`, `backbones` and `report`: what they list, show and rebuild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import timm
import yaml
from click.testing import CliRunner, Result
from pydantic import BaseModel
from tiny_runs import adapt

from adaptkit.backbones.names import ALIASES, backbone_names
from adaptkit.cli import main
from adaptkit.cli.command_recipes import about
from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe, dump_recipe, load_recipe, recipe_names, recipes_folder
from adaptkit.run import Run


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `adaptkit ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args], prog_name="adaptkit")


@pytest.fixture(scope="module")
def finished(images: Path, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return adapt(vit, images, tmp_path_factory.mktemp("runs") / "finished", steps=2).run


def error_of(result: Result) -> str:
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_recipes_are_listed_with_the_first_sentence_of_their_header(invoke: Callable[..., Result]) -> None:
    result = invoke("recipes")
    listed = json.loads(invoke("recipes", "--json").stdout)
    assert listed["schema"] == "adaptkit.recipes/1"
    assert [recipe["name"] for recipe in listed["recipes"]] == recipe_names()
    for recipe in listed["recipes"]:
        assert recipe["about"].endswith(".")
        assert f"{recipe['name']} " in result.stdout
        assert recipe["about"] in " ".join(result.stdout.split())
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "adaptkit recipes NAME" in result.stdout
    assert "adaptkit recipes NAME" not in invoke("recipes", "--quiet").stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One line.\n#   adaptkit adapt\nsteps: 3\n", "One line."),
        ("# Two\n# lines.\n# And more.\n", "Two lines."),
        ("steps: 3  # no header\n", ""),
        ("", ""),
    ],
)
def test_the_header_of_a_recipe(text: str, sentence: str) -> None:
    assert about(text) == sentence


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_shown_as_it_is_shipped(invoke: Callable[..., Result], name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert invoke("recipes", name).stdout == text
    document = json.loads(invoke("recipes", name, "--json").stdout)
    assert document["yaml"] == text
    assert Recipe.model_validate(document["settings"]) == load_recipe(name)


def test_a_recipe_of_ones_own_is_shown_too(invoke: Callable[..., Result]) -> None:
    Path("mine.yaml").write_text("# Mine.\nsteps: 3\n", encoding="utf-8")
    assert invoke("recipes", "mine.yaml").stdout == "# Mine.\nsteps: 3\n"
    Path("wrong.yaml").write_text("stepps: 3\n", encoding="utf-8")
    result = invoke("recipes", "wrong.yaml")
    assert result.exit_code == 2
    assert "did you mean 'steps'" in error_of(result)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bits-rest",), "did you mean 'bits-reset'"),
        (("nowhere.yaml",), "no such recipe file"),
        (("bits-reset", "--schema"), "leave the name out"),
    ],
)
def test_wrong_recipe_names_are_usage_errors(invoke: Callable[..., Result], args: tuple[str, ...], words: str) -> None:
    result = invoke("recipes", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in error_of(result)


def test_the_schema_describes_every_key(invoke: Callable[..., Result]) -> None:
    schema = json.loads(invoke("recipes", "--schema").stdout)
    assert schema == json.loads(invoke("recipes", "--schema", "--json").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False

    def compare(node: dict[str, Any], group: type[BaseModel]) -> int:
        assert set(node["properties"]) == set(group.model_fields)
        count = 0
        for name, field in group.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                inner = schema["$defs"][field.annotation.__name__]
                assert inner["description"]
                count += compare(inner, field.annotation)
            else:
                assert node["properties"][name]["description"] == field.description
                count += 1
        return count

    assert compare(schema, Recipe) > 50


@pytest.fixture(scope="module")
def recipe_schema() -> jsonschema.Draft202012Validator:
    """What `adaptkit recipes --schema` prints, as an editor reads it."""
    schema = json.loads(CliRunner().invoke(main, ["recipes", "--schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_obey_the_schema(name: str, recipe_schema: jsonschema.Draft202012Validator) -> None:
    shipped = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    for text in (shipped, dump_recipe(load_recipe(name))):  # and as a run writes it down
        assert list(recipe_schema.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ("data: ./images\nbackbone: nano", True),
        ("data: [./a, ./b]\nsteps: null", True),
        ("data: {path: ./a, max_bad: 3}\nbudget: 30m", True),
        ("tune: last-4-blocks\nhead: {reset_every: 2 epochs}", True),
        ("optm: {lr: 1}", False),  # unknown keys
        ("optim: {lrr: 1}", False),
        ("batch_size: many", False),  # wrong types
        ("optim: 3", False),
        ("precision: fp8", False),
        ("head: {reset_every: soon}", False),
        ("data: {max_bad: lots}", False),
        ("budget: soon", False),
        ("tune: last-blocks", False),
        ("seed: -1", False),  # out of range
        ("optim: {lr: 0}", False),
        ("teacher: {momentum: 2}", False),
        ("select: {alphas: [0, 0.5]}", False),
        ("views: {blur: [0, 2, 1]}", False),
    ],
)
def test_the_schema_says_what_the_loader_says(
    text: str, is_valid: bool, recipe_schema: jsonschema.Draft202012Validator, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    try:
        load_recipe(tmp_path / "mine.yaml")
        loads = True
    except UsageError:
        loads = False
    assert (recipe_schema.is_valid(yaml.safe_load(text)), loads) == (is_valid, is_valid)


def test_without_a_pattern_nano_and_the_dino_family(invoke: Callable[..., Result]) -> None:
    document = json.loads(invoke("backbones", "--json").stdout)
    assert document["schema"] == "adaptkit.backbones/1"
    listed = document["backbones"]
    assert [row["name"] for row in listed] == ["nano", *ALIASES]
    assert document["others"] == len(backbone_names()) - len(listed)
    assert listed[1] == {
        "name": "dino_vits16",
        "timm_name": "vit_small_patch16_224.dino",
        "image_px": 224,
        "licence": "apache-2.0",
    }
    result = invoke("backbones")
    assert "dino_vits16 = vit_small_patch16_224.dino " in result.stdout
    assert f"and {document['others']:,} more of timm's: adaptkit backbones PATTERN" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "more of timm's" not in invoke("backbones", "--quiet").stdout


@pytest.mark.parametrize("pattern", ["convnext_tiny.", "convnext_tiny.*", "CONVNEXT_TINY."])
def test_a_pattern_is_a_part_of_a_name_or_a_glob(invoke: Callable[..., Result], pattern: str) -> None:
    document = json.loads(invoke("backbones", pattern, "--json").stdout)
    names = [row["name"] for row in document["backbones"]]
    assert {name for name in names if name not in ALIASES} == set(timm.list_pretrained("convnext_tiny.*"))
    assert "dinov3_convnext_tiny" in names  # by its timm name
    assert document["others"] == 0
    shown = invoke("backbones", pattern).stdout
    assert all(name in shown for name in names)


def test_no_match_is_a_backbone_error(invoke: Callable[..., Result]) -> None:
    result = invoke("backbones", "dinov2_vitz14", "--json")
    assert result.exit_code == 4
    assert "did you mean 'dinov2_vit" in error_of(result)
    assert json.loads(result.stdout)["error"]["exit_code"] == 4


def test_a_report_is_built_anew(invoke: Callable[..., Result], finished: Path) -> None:
    built = ("report.html", "report.md")
    written = [(finished / name).read_text(encoding="utf-8") for name in built]
    for name in built:
        (finished / name).write_text("spoilt", encoding="utf-8")
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.name not in built}
    result = invoke("report", finished)
    assert (result.exit_code, result.stdout) == (0, "".join(f"report    {finished / name}\n" for name in built))
    assert [(finished / name).read_text(encoding="utf-8") for name in built] == written
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.name not in built}
    assert invoke("report", finished, "--quiet").stdout == result.stdout


def test_the_report_as_json(invoke: Callable[..., Result], finished: Path) -> None:
    result = invoke("report", finished, "--json")
    assert json.loads(result.stdout) == json.loads((finished / "report.json").read_text(encoding="utf-8"))


def test_a_run_that_has_not_finished_has_no_report(invoke: Callable[..., Result], tmp_path: Path) -> None:
    run = Run.create(load_recipe("bits-reset", {"backbone": "nano", "data": "x"}), tmp_path / "run")
    result = invoke("report", "run")
    assert result.exit_code == 2
    assert f"go on with `adaptkit resume {run.path}`" in error_of(result)
    assert not (run.path / "report.md").exists()
    for damaged, words in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": "other"}', "no adaptkit.report/1 document"),
    ):
        (run.path / "report.json").write_text(damaged, encoding="utf-8")
        result = invoke("report", "run")
        assert result.exit_code == 2
        assert words in error_of(result)


def test_no_run_has_no_report(invoke: Callable[..., Result]) -> None:
    result = invoke("report", "nowhere")
    assert result.exit_code == 2
    assert "no run here" in error_of(result)


@pytest.mark.parametrize("command", ["check", "report", "recipes", "backbones"])
def test_every_command_has_json_quiet_and_help(invoke: Callable[..., Result], command: str) -> None:
    text = invoke(command, "--help").stdout
    assert all(option in text for option in ("--json", "--quiet", "--help"))
