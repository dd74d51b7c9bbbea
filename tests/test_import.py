"""Importing is free: the help of the command line and `import adaptkit` load nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import adaptkit

MAX_CPU_SECONDS = 0.3
ALLOWED = {  # third-party distributions that `adaptkit --help` may load
    "adaptkit",
    "annotated_types",
    "click",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
SCRIPT = """
import sys, time
before = set(sys.modules)
{body}
cpu = time.process_time()
import json
names = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
loaded = sorted(name for name in names if not name.startswith(("_", "cython")))  # not the bowels of compiled modules
parts = sorted(name for name in sys.modules if name.startswith("adaptkit."))
print(json.dumps({{"cpu": cpu, "loaded": loaded, "parts": parts}}), file=sys.stderr)
"""
HELP = """
from adaptkit.cli import main
main({args}, prog_name="adaptkit", standalone_mode=False)
"""


def run(body: str) -> dict[str, object]:
    """What a fresh interpreter has loaded after `body`, and the CPU seconds since its start."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return answer


COMMANDS = ["adapt", "backbones", "check", "demo", "probe", "recipes", "report", "resume"]


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_only_what_is_allowed(args: list[str]) -> None:
    loaded = run(HELP.format(args=args))["loaded"]
    assert isinstance(loaded, list)
    assert set(loaded) <= ALLOWED


def test_help_is_fast() -> None:
    # the best of a few: a busy machine can only make it slower
    seconds = [run(HELP.format(args=["--help"]))["cpu"] for _ in range(3)]
    assert min(float(str(s)) for s in seconds) < MAX_CPU_SECONDS


def test_importing_the_package_loads_none_of_its_parts() -> None:
    answer = run("import adaptkit\ndir(adaptkit)")
    assert answer["loaded"] == ["adaptkit"]
    assert answer["parts"] == []


def test_recipes_need_no_torch() -> None:
    loaded = run("import adaptkit\nadaptkit.load_recipe('bits-reset', {'steps': 3})")["loaded"]
    assert isinstance(loaded, list)
    assert set(loaded) <= ALLOWED


def test_a_run_is_made_and_a_usage_error_told_without_torch(tmp_path: object) -> None:
    words = ["adapt", "--backbone", "nano", "--data", "x", "--output", str(tmp_path), "--set", "optim.lrr=1"]
    loaded = run(f"{HELP.format(args=words)}\nimport adaptkit.run")["loaded"]
    assert isinstance(loaded, list)
    assert set(loaded) <= ALLOWED


@pytest.mark.parametrize("name", sorted(adaptkit.PUBLIC))
def test_public_names_are_there(name: str) -> None:
    assert getattr(adaptkit, name).__name__ == name
    assert name in dir(adaptkit)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="adatp"):
        adaptkit.adatp  # noqa: B018
    assert adaptkit.__version__


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "adaptkit", "adpt"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such command 'adpt'; did you mean 'adapt'?")
