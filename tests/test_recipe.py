"""Recipes: strict keys, coercion by field type, precedence, and a lossless round trip; and the family of errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from adaptkit import errors
from adaptkit.errors import AdaptkitError, UsageError, did_you_mean
from adaptkit.recipe import FLAGS, Recipe, dump_recipe, load_recipe, recipe_names, recipes_folder
from adaptkit.yaml_text import MAX_RECIPE_BYTES


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A recipe that changes nothing."""
    return recipe(tmp_path, "")


def recipe(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_empty_recipe_is_the_defaults(empty: Path) -> None:
    assert load_recipe(empty) == Recipe()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    assert load_recipe(recipe(tmp_path, dump_recipe(loaded))) == loaded


def test_the_default_recipe_is_shipped() -> None:
    assert "bits-reset" in recipe_names()
    assert (recipes_folder() / "bits-reset.yaml").is_file()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'", "1.0e-04"])
def test_a_float_may_be_written_in_any_way(tmp_path: Path, text: str) -> None:
    assert load_recipe(recipe(tmp_path, f"optim:\n  lr: {text}\n")).optim.lr == 1e-4


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("10", 10), ("1000", 1000), ("null", None), ("~", None)])
def test_leading_zeros_are_not_octal_and_null_is_none(tmp_path: Path, text: str, steps: int | None) -> None:
    assert load_recipe(recipe(tmp_path, f"steps: {text}\n")).steps == steps


@pytest.mark.parametrize(("text", "expected"), [("off", False), ("no", False), ("false", False), ("on", True)])
def test_switches(tmp_path: Path, text: str, expected: bool) -> None:
    assert load_recipe(recipe(tmp_path, f"pretrained: {text}\n")).pretrained is expected


@pytest.mark.parametrize("text", ["off", "010", "1e-4", "2026-11-20", "12:30:00", "yes"])
def test_a_word_stays_the_word_that_was_written(tmp_path: Path, text: str) -> None:
    assert load_recipe(recipe(tmp_path, f"data: {text}\n")).data.path == (text,)
    assert load_recipe(recipe(tmp_path, ""), assignments=[f"data={text}"]).data.path == (text,)


@pytest.mark.parametrize("text", ["25%", "2 epochs", "1 epoch", "500 steps", "10000 images", "never", "0.5%"])
def test_durations(tmp_path: Path, text: str) -> None:
    assert load_recipe(recipe(tmp_path, f"head:\n  reset_every: {text}\n")).head.reset_every == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", r"unknown key optim\.lrr; did you mean 'lr'\?"),
        ("optm:\n  lr: 1\n", r"unknown key optm; did you mean 'optim'\?"),
        ("zzzz: 1\n", r"unknown key zzzz; see"),
        ("optim:\n  lr: fast\n", r"optim\.lr = 'fast': Input should be a valid number"),
        ("optim:\n  lr: nan\n", r"optim\.lr"),
        ("optim:\n  lr: -1\n", r"optim\.lr = '-1': .*greater than 0"),
        ("optim: 3\n", r"optim = '3'"),
        ("batch_size: 12.5\n", r"batch_size = '12.5'"),
        ("pretrained: 2\n", r"pretrained = '2'"),
        ("head:\n  reset_every: 25\n", r"head\.reset_every = '25': .*number with a unit"),
        ("data:\n  max_bad: some\n", r"data\.max_bad"),
        ("select:\n  alphas: [0.5, 1.0]\n", r"select\.alphas\.1 = '1\.0': .*less than 1"),
        ("views:\n  global_scale: [0.9, 0.4]\n", r"global_scale must be a range"),
        ("views:\n  blur: [0.5, 2, 0]\n", r"views\.blur\.1 = '2': .*less than or equal to 1"),
        ("lr: 1\nlr: 2\n", r"lr is given twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", r"lr is given twice"),
        ("a: &x [1]\nb: *x\n", r"aliases are not allowed"),
        ("- 1\n- 2\n", r"a recipe is a mapping"),
        ("just words\n", r"a recipe is a mapping"),
        ("? [a, b]\n: 1\n", r"keys must be plain words"),
        ("a: [1\n", r"not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", r"not valid YAML"),
        ("a: " + "[" * 5000, r"not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", r"seed"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml: no such recipe file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UsageError, match="this is not a recipe"):
        load_recipe(recipe(tmp_path, "#" * (MAX_RECIPE_BYTES + 1)))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as a recipe"):
        load_recipe(tmp_path / "binary.yaml")


def test_an_unknown_recipe_lists_what_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adaptkit.recipe.recipe_names", lambda: ["bits-fixed", "bits-reset"])
    with pytest.raises(UsageError, match=r"'bits-rest'; did you mean 'bits-reset'\? \(recipes: bits-fixed, bits-reset"):
        load_recipe("bits-rest")
    with pytest.raises(UsageError, match=r"unknown recipe 'zzzz' \(recipes: "):
        load_recipe("zzzz")


def test_defaults_give_way_to_the_recipe_and_it_to_overrides_and_assignments(tmp_path: Path) -> None:
    file = recipe(tmp_path, "seed: 1\nbatch_size: 32\noptim:\n  lr: 1e-2\n  warmup: 5%\n")
    loaded = load_recipe(file, {"batch_size": 64, "epochs": None}, ["optim.lr=2e-2", "select.alphas=[0.1, 0.9]"])
    assert (loaded.seed, loaded.batch_size, loaded.epochs) == (1, 64, Recipe().epochs)
    assert (loaded.optim.lr, loaded.optim.warmup) == (0.02, "5%")
    assert loaded.select.alphas == (0.1, 0.9)


def test_a_key_given_twice_is_an_error(empty: Path) -> None:
    with pytest.raises(UsageError, match=r"optim\.lr is given twice"):
        load_recipe(empty, {"optim.lr": 1e-4}, ["optim.lr=1e-4"])
    with pytest.raises(UsageError, match="seed is given twice"):
        load_recipe(empty, assignments=["seed=1", "seed=1"])
    assert load_recipe(empty, {"seed": None}, ["seed=1"]).seed == 1  # None is "not given"


@pytest.mark.parametrize("pair", [["optim={lr: 1e-2}", "optim.lr=1e-3"], ["optim.lr=1e-3", "optim={lr: 1e-2}"]])
def test_a_group_and_a_key_inside_it_is_giving_it_twice(empty: Path, pair: list[str]) -> None:
    with pytest.raises(UsageError, match="given twice"):
        load_recipe(empty, assignments=pair)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "write key=value"),
        ("optim.lrr=1", "did you mean 'lr'"),
        ("seed.deeper=1", r"seed = .*valid integer"),
        ("optim.lr=[1", "--set optim.lr: not valid YAML"),
    ],
)
def test_wrong_assignments(empty: Path, assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(empty, assignments=[assignment])


def test_dump_and_load_give_an_equal_recipe(tmp_path: Path) -> None:
    assignments = ["optim.lr=1e-5", "teacher.momentum=0.9", "steps=010", "select.alphas=[]", "views.blur=[0, 1, 0.25]"]
    odd = {"data": "off", "backbone": "010", "labels": "bärte/日本 #1: x", "require_gain": "knn_top1>=0.5"}
    before = load_recipe(recipe(tmp_path, ""), odd, assignments)
    assert load_recipe(recipe(tmp_path, dump_recipe(before))) == before
    assert yaml.safe_load(dump_recipe(before))["optim"]["lr"] == 1e-5  # other YAML readers see a number too


def test_a_folder_whose_name_is_not_utf8_survives_the_round_trip(tmp_path: Path) -> None:
    before = load_recipe(recipe(tmp_path, ""), {"data": "caf\udce9"})
    assert load_recipe(recipe(tmp_path, dump_recipe(before))) == before


@pytest.mark.parametrize("text", ["data: a", "data: [a]", "data: {path: a}", "data: {path: [a]}"])
def test_data_is_a_path_or_a_group(tmp_path: Path, text: str) -> None:
    given = load_recipe(recipe(tmp_path, text + "\n"), assignments=["data.scale=percentile"])
    assert (given.data.path, given.data.scale, given.data.max_bad) == (("a",), "percentile", "1%")
    replaced = load_recipe(recipe(tmp_path, text + "\n"), {"data": ["b", "c"]})
    assert replaced.data.path == ("b", "c")


def test_data_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.path is given twice"):
        load_recipe(recipe(tmp_path, ""), {"data.path": ("a",)}, ["data=b"])
    both = load_recipe(recipe(tmp_path, ""), {"data.path": ("a",)}, ["data.scale=percentile"])
    assert (both.data.path, both.data.scale) == (("a",), "percentile")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Recipe().optim.lr = 1.0  # type: ignore[misc]


def test_flags_name_keys_that_exist() -> None:
    known = Recipe().model_dump()
    for key in FLAGS.values():
        group, leaf = key.split(".")
        assert leaf in known[group]


def test_every_setting_is_described() -> None:
    def undescribed(model: type, prefix: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                missing += undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert undescribed(Recipe, "") == []


def test_exit_codes_are_the_contract() -> None:
    family = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AdaptkitError)]
    assert {kind.__name__: kind.exit_code for kind in family} == {
        "AdaptkitError": 1,
        "UsageError": 2,
        "DataError": 3,
        "BackboneError": 4,
        "GainNotMet": 5,
        "Collapsed": 6,
        "DeviceMemoryError": 7,
        "MachineError": 8,
        "Interrupted": 75,
        "NotFinite": 4,
        "ConnectionLost": 8,
        "FailedElsewhere": 1,
    }


def test_did_you_mean() -> None:
    assert did_you_mean("lrr", ["lr", "seed"]) == "; did you mean 'lr'?"
    assert did_you_mean("zzzz", ["lr", "seed"]) == ""


def test_recipes_do_not_need_torch() -> None:
    code = "import sys, adaptkit.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def test_paths_become_absolute_but_a_name_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nano", "mine", "resnet18"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "config.json").touch()
    (tmp_path / "nano" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert Recipe(backbone="nano", data="photos").with_absolute_paths().backbone == "nano"
    assert Recipe(backbone="nano").with_absolute_paths().data.path == ()
    assert Recipe(backbone="resnet18").with_absolute_paths().backbone == "resnet18"
    assert Recipe(backbone="hf-hub:org/name").with_absolute_paths().backbone == "hf-hub:org/name"
    assert Recipe(backbone="mine").with_absolute_paths().backbone == str(tmp_path / "mine")
    absolute = Recipe(backbone="./nano", data="photos").with_absolute_paths()
    assert (absolute.backbone, absolute.data.path) == (str(tmp_path / "nano"), (str(tmp_path / "photos"),))
