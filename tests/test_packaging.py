"""What is installed: the wheel holds everything and nothing more, and works where no checkout can be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROOT

MAX_WHEEL_BYTES = 20 << 20
LOOK_AROUND = """
import json, sys
import adaptkit
from adaptkit.recipe import load_recipe, recipe_names
names = recipe_names()
shown = {"file": adaptkit.__file__, "path": sys.path, "recipes": names}
shown["loaded"] = [load_recipe(name).batch_size for name in names]
if sys.argv[1:]:
    shown["embed_dim"] = adaptkit.load_backbone("nano").embed_dim
print(json.dumps(shown))
"""


def run(*words: object, cwd: Path) -> str:
    """The output of a command that knows nothing of the checkout and may not ask an index."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    clean |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment_with(folder: Path, *arguments: object) -> Path:
    """A virtual environment with adaptkit installed by `pip install ARGUMENTS` and the dependencies of this one."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--no-deps")
    run(*pip, "--ignore-installed", "--no-build-isolation", *arguments, cwd=folder)
    return folder


def look_around(environment: Path, nano: bool) -> dict[str, Any]:
    """What the installed package says of itself; `-I`: neither this folder nor PYTHONPATH can be imported from."""
    words = (environment / "bin" / "python", "-I", "-c", LOOK_AROUND, *(["nano"] if nano else []))
    shown: dict[str, Any] = json.loads(run(*words, cwd=environment))
    return shown


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(tmp_path_factory.mktemp("editable"), "-e", ROOT)


def test_the_wheel_holds_the_package_the_recipes_and_the_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {path for path in (ROOT / "adaptkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"adaptkit/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == expected
    assert {"adaptkit/py.typed", "adaptkit/assets/nano/model.safetensors", "adaptkit/recipes/bits-reset.yaml"} <= names
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_no_asset_comes_without_its_terms(wheel: Path) -> None:
    """Each folder of assets brings its licence, or a README, its own or a neighbour's, that names the terms."""
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.startswith("adaptkit/assets/")]
        texts = {name: archive.read(name).decode() for name in files if name.endswith(("README.md", "LICENSE"))}
    folders = {name.split("/")[2] for name in files}
    assert "nano" in folders
    for folder in folders:
        about = [text for name, text in texts.items() if f"/{folder}/" in name or f"`../{folder}/" in text]
        assert any(re.search(r"licen[cs]e|terms:", text, re.IGNORECASE) for text in about), folder


def test_the_wheel_is_small(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = wheel.stat().st_size
    with capsys.disabled():
        print(f" [{wheel.name}: {size / 1e6:.1f} MB] ", end="")
    assert size < MAX_WHEEL_BYTES


@pytest.mark.long
@pytest.mark.parametrize("name", ["installed", "editable"])
def test_the_command_and_the_recipes_of_an_installation(name: str, request: pytest.FixtureRequest) -> None:
    environment: Path = request.getfixturevalue(name)
    assert "adaptkit probe" in run(environment / "bin" / "adaptkit", "--help", cwd=environment)
    assert "bits-reset" in run(environment / "bin" / "adaptkit", "adapt", "--help", cwd=environment)
    shown = look_around(environment, nano=False)
    home = ROOT if name == "editable" else environment
    assert Path(shown["file"]).is_relative_to(home)
    assert (str(ROOT) in shown["path"]) == (name == "editable")
    assert shown["recipes"] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert len(shown["loaded"]) == len(shown["recipes"]) >= 3


@pytest.mark.parametrize("name", ["installed", pytest.param("editable", marks=pytest.mark.slow)])
def test_the_embedded_backbone_of_an_installation(name: str, request: pytest.FixtureRequest) -> None:
    assert look_around(request.getfixturevalue(name), nano=True)["embed_dim"] == 192
