"""The GitHub Actions workflow and the Dockerfile of examples/, without GitHub and without an engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from test_packaging import environment_with, look_around
from tiny_runs import ROOT, environment, flags, read

from adaptkit.cli import main

EXAMPLES = ROOT / "examples"
DOCKER = EXAMPLES / "docker"
BUILD_TOOLS = ("gcc", "g++", "build-essential", "make", "cmake", "apt-get", "apt", "apk", "pip install", "git")
STAND_IN = """#!/usr/bin/env bash
# Instead of adaptkit: notes its words, ends with CODE.
printf '%s\\0' "$@" >> words && echo >> words
echo '{}'
[ "$1" = check ] || exit "$CODE"
"""


# --- GitHub Actions


def job() -> dict[str, Any]:
    document = yaml.safe_load((EXAMPLES / "github_actions" / "adapt.yml").read_text(encoding="utf-8"))
    assert set(document[True]) == {"workflow_dispatch", "schedule"}, "YAML 1.1 reads `on` as true"
    assert document["permissions"] == {"contents": "read"}
    return dict(document["jobs"]["adapt"])


def step(name: str) -> dict[str, Any]:
    (found,) = (step for step in job()["steps"] if step.get("name") == name)
    return dict(found)


def carry_out(name: str, folder: Path, adaptkit: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The `run` of a step in `folder`, as GitHub runs it, with `adaptkit` as the content of the command it calls."""
    command = folder / "bin" / "adaptkit"
    command.parent.mkdir(exist_ok=True)
    command.write_text(adaptkit)
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    given = job()["env"] | {"GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary", "PATH": path} | variables
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step(name)["run"]]
    return subprocess.run(words, cwd=folder, env=environment(**given), capture_output=True, text=True, timeout=300)


def parsed(folder: Path) -> list[dict[str, Any]]:
    """What adaptkit's own parser makes of each call."""
    calls = []
    for line in (folder / "words").read_text().splitlines():
        name, *rest = line.split("\0")[:-1]
        command = main.commands[name]
        assert isinstance(command, click.Command)
        calls.append(command.make_context(name, rest).params | {"command": name})
    return calls


def test_actions_are_pinned_to_a_major_version_and_nothing_is_pasted_into_scripts() -> None:
    steps = job()["steps"]
    assert all(re.fullmatch(r"actions/[a-z/-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert all("${{" not in step["run"] for step in steps if "run" in step), "values come from the environment"
    assert all(name in job()["env"] for step in steps for name in re.findall(r"env\.(\w+)", str(step)))
    assert int(job()["env"]["TIME_LIMIT"].removesuffix("m")) < job()["timeout-minutes"]


def test_every_command_of_the_workflow_is_one_of_adaptkit_s(tmp_path: Path) -> None:
    for name in ("Check", "Adapt"):
        assert carry_out(name, tmp_path, STAND_IN, CODE="0", DATA="my images").returncode == 0
    (tmp_path / "runs" / "adapt").mkdir(parents=True)
    (tmp_path / "runs" / "adapt" / "recipe.yaml").touch()
    assert carry_out("Adapt", tmp_path, STAND_IN, CODE="0").returncode == 0
    check, adapt, resume = parsed(tmp_path)
    given = {"data": ("my images",), "backbone": "nano", "labels": "labelled", "recipe": "bits-reset", "as_json": True}
    assert {name: check[name] for name in ("command", *given)} == {"command": "check"} | given
    given |= {"command": "adapt", "output": "runs/adapt", "require_gain": "knn_top1>=0.5"}
    assert {name: adapt[name] for name in given} == given
    assert (resume["command"], resume["run"], resume["as_json"]) == ("resume", "runs/adapt", True)


@pytest.mark.parametrize("code", ["0", "3", "5", "6", "75"])
def test_the_job_ends_with_the_code_of_adaptkit(code: str, tmp_path: Path) -> None:
    assert carry_out("Adapt", tmp_path, STAND_IN, CODE=code).returncode == int(code)
    assert (tmp_path / "output").read_text() == f"exit_code={code}\n"


def test_the_state_of_an_interrupted_run_is_kept_and_found_by_the_next_attempt() -> None:
    keep, fetch = step("Keep the state of an interrupted run"), step("Fetch the state of an interrupted attempt")
    assert keep["if"] == "always() && steps.adapt.outputs.exit_code == '75'"
    assert step("Adapt")["id"] == "adapt"
    assert keep["with"]["key"].startswith(fetch["with"]["restore-keys"])
    assert keep["with"]["path"] == fetch["with"]["path"] == "${{ env.RUN }}"
    names = [step.get("name") for step in job()["steps"]]
    assert names.index(fetch["name"]) < names.index("Adapt") < names.index(keep["name"])


def test_the_report_is_kept_whatever_happened(tmp_path: Path) -> None:
    report = step("Report")
    files = [Path(line).name for line in report["with"]["path"].split("\n") if line]
    assert (report["if"], files) == ("always()", ["report.html", "report.json", "status.json", "check.json"])
    assert step("Summary")["if"] == "always()"
    assert carry_out("Summary", tmp_path, STAND_IN).returncode == 0, "nothing there: the check failed"
    run = tmp_path / "runs" / "adapt"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"exit_code": 3}')
    carry_out("Summary", tmp_path, STAND_IN)
    assert (tmp_path / "summary").read_text() == '```json\n{"exit_code": 3}\n```\n'


@pytest.mark.slow
def test_the_steps_of_the_workflow_on_the_embedded_sample(tmp_path: Path) -> None:
    real = f'#!/bin/sh\nexec "{sys.executable}" -m adaptkit "$@"\n'
    images, assets = tmp_path / "images", ROOT / "adaptkit" / "assets"
    images.mkdir()
    for path in sorted((assets / "eurosat").glob("*.jpg"))[:100]:
        shutil.copy(path, images)
    (tmp_path / "labelled").symlink_to(assets / "eurosat_labelled")
    assignments = [
        word for word in flags({"steps": 2, "probe.max_gallery": 40, "probe.max_queries": 40}) if "=" in word
    ]
    tree: dict[str, Any] = {}
    for key, _, value in (assignment.partition("=") for assignment in assignments):
        group, _, leaf = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[leaf] = json.loads(value)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    done = {name: carry_out(name, tmp_path, real, RECIPE="tiny.yaml") for name in ("Check", "Adapt", "Summary")}
    assert [each.returncode for each in done.values()] == [0, 5, 0], "two steps win no half point beyond doubt"
    assert json.loads((tmp_path / "check.json").read_text())["ok"] is True
    assert json.loads((tmp_path / "result.json").read_text())["error"]["exit_code"] == 5
    run = tmp_path / "runs" / "adapt"
    assert read(run, "status.json")["exit_code"] == 5
    assert (tmp_path / "summary").read_text() == (run / "report.md").read_text(encoding="utf-8")
    assert all((run / name).is_file() for name in ("report.html", "report.json", "backbone/model.safetensors"))


# --- Docker


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = [[]]
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found[1:]


def goes_to_the_build(path: str) -> bool:
    """What Dockerfile.dockerignore lets through; the last pattern that fits decides, for a folder's contents too."""
    included = True
    for pattern in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        starts = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        fits = any(fnmatch(start, bare) for start in (parts if "**" in pattern else starts))
        included = pattern.startswith("!") if fits else included
    return included


def test_the_image_has_two_stages_and_the_last_one_no_build_tools_and_no_root() -> None:
    build, final = stages()
    assert [rest for word, rest in (build[0], final[0])] == [
        "python:${PYTHON}-slim AS build",
        "python:${PYTHON}-slim AS run",
    ]
    commands = " ".join(rest for word, rest in final if word == "RUN")
    assert not [tool for tool in BUILD_TOOLS if re.search(rf"(^|\s){re.escape(tool)}(\s|$)", commands)]
    settings = dict(final)
    assert settings["USER"] == "1000:1000"
    assert [word for word, _ in final].index("USER") > [word for word, _ in final].index("RUN")
    assert json.loads(settings["ENTRYPOINT"]) == ["adaptkit"]
    assert settings["HEALTHCHECK"] == "NONE"
    assert "HF_HUB_OFFLINE=1" in " ".join(rest for word, rest in final if word == "ENV")
    assert [rest for word, rest in final if word == "COPY"] == ["--from=build /opt/adaptkit /opt/adaptkit"]


def test_no_file_for_pipelines_names_where_packages_come_from() -> None:
    for path in (DOCKER / "Dockerfile", DOCKER / "Dockerfile.dockerignore", EXAMPLES / "github_actions" / "adapt.yml"):
        assert "://" not in path.read_text(encoding="utf-8")
    assert ("ARG", 'TORCH_INDEX=""') in stages()[0]


@pytest.mark.parametrize(("index", "words"), [("", []), ("URL", ["--index-url", "URL"])])
def test_the_index_of_torch_is_an_argument(index: str, words: list[str]) -> None:
    (command,) = (rest for word, rest in stages()[0] if word == "RUN" and "torch" in rest)
    script = command.replace("pip ", "printf '%s\\n' ", 1)
    done = subprocess.run(["sh", "-c", script], env={"TORCH_INDEX": index}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["install", *words, "torch>=2.11", "torchvision>=0.26"]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{requirement}"' in pyproject for requirement in done.stdout.splitlines()[-2:])


def sources() -> list[str]:
    copied = [shlex.split(rest)[:-1] for word, rest in stages()[0] if word == "COPY"]
    return [source for each in copied for source in each]


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    assert sources()
    for source in sources():
        assert (ROOT / source).exists()
        assert goes_to_the_build(source)
    for other in (
        ".git",
        "tests",
        "tests/conftest.py",
        "runs",
        "adaptkit/__pycache__",
        "adaptkit/cli/__pycache__/a.pyc",
    ):
        assert not goes_to_the_build(other)
    assert goes_to_the_build("adaptkit/assets/nano/model.safetensors")


@pytest.mark.slow
def test_what_is_copied_is_enough_to_install_adaptkit(tmp_path: Path) -> None:
    """The last RUN of the build stage, with the dependencies that are here already."""
    source = tmp_path / "source"
    for path in (path for name in sources() for path in ((ROOT / name), *(ROOT / name).rglob("*"))):
        inside = path.relative_to(ROOT)
        if path.is_file() and goes_to_the_build(inside.as_posix()):
            (source / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / inside)
    shown = look_around(environment_with(tmp_path / "installed", source), nano=True)
    assert Path(shown["file"]).is_relative_to(tmp_path / "installed")
    assert "bits-reset" in shown["recipes"]
    assert shown["embed_dim"] > 0
