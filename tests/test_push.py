"""The model card, and `adaptkit export --push-to-hub` against a hub on this machine: what is uploaded loads again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from conftest import write_folder
from fake_hub import fake_hub
from tiny_runs import adapt, command, environment, read

from adaptkit.backbones import load_backbone
from adaptkit.cli import main
from adaptkit.report import render_markdown
from adaptkit.report.card import own_class_snippet, public

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-folder")
    return adapt(vit, write_folder(folder / "images", 2, 20), folder / "run", steps=2, objective__hidden_dim=8).run


def test_the_card_has_the_header_that_the_hub_reads(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    start, header, rest = text.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert start == ""
    assert rest.startswith("# ")
    assert facts["library_name"] == "timm"
    assert facts["pipeline_tag"] == "image-feature-extraction"
    assert "base_model" not in facts


def test_a_base_model_of_the_hub_is_named(finished: Path) -> None:
    report = read(finished, "report.json")
    report["backbone"]["name"] = "hf-hub:org/name@main"
    assert yaml.safe_load(render_markdown(report).split("---\n")[1])["base_model"] == "org/name"
    report["backbone"]["architecture"] = ""
    card = render_markdown(report, "org/name")
    assert "library_name" not in yaml.safe_load(card.split("---\n")[1])
    assert own_class_snippet("org/name").rstrip() in card
    assert "transformers" not in card


def test_no_folder_of_the_machine_is_made_public(finished: Path) -> None:
    report = read(finished, "report.json")
    assert "secret-folder" in json.dumps(report)
    shown = public(report)
    assert "secret-folder" not in json.dumps(shown)
    assert shown["data"]["path"] == "images"
    assert shown["probes"] == report["probes"]
    assert "secret-folder" in json.dumps(report)  # untouched


def test_a_comma_in_a_folder_gives_nothing_away() -> None:
    paths = ["/home/me, you/secret/images", "file:///home/secret/more", "s3://bucket/third"]
    shown = public({"data": {"path": ", ".join(paths)}, "recipe": {"data": {"path": paths}}})
    assert shown["data"]["path"] == "images, more, s3://bucket/third"
    assert shown["recipe"]["data"]["path"] == ["images", "more", "s3://bucket/third"]


@pytest.mark.slow
def test_what_is_pushed_loads_again(finished: Path, tmp_path: Path) -> None:
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with fake_hub() as hub:
        words = ("export", finished, "--push-to-hub", "org/name", "--json", "--quiet")
        done = command(*words, HF_ENDPOINT=hub.url, **offline)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["repo"] == "org/name"
        files = hub.repos["org/name"]
        assert set(files) == {"config.json", "model.safetensors", "README.md"}
        assert files["model.safetensors"] == (finished / "backbone" / "model.safetensors").read_bytes()
        assert b"secret-folder" not in files["README.md"]
        assert hub.private["org/name"] is True
        vectors = tmp_path / "e.npy"
        words = ("embed", "--backbone", "hf-hub:org/name", "--data", finished.parent / "images", "--output", vectors)
        done = command(*words, HF_ENDPOINT=hub.url, **offline)
        assert done.returncode == 0, done.stderr
        snippets = re.findall(r"^```python\n(.*?)^```$", files["README.md"].decode(), re.DOTALL | re.MULTILINE)
        assert ["'hf-hub:org/name'" in snippets[0], "from_pretrained('org/name')" in snippets[1]] == [True, True]
        picture = min((finished.parent / "images").rglob("*.jpg"))
        (tmp_path / "image.jpg").write_bytes(picture.read_bytes())
        snippets[0] += "module = backbone\n" + own_class_snippet("org/name")  # what another class would be told
        by_card = [embedding_of(snippet, tmp_path, HF_ENDPOINT=hub.url, **offline) for snippet in snippets]
    done = command(
        "embed", "--backbone", finished, "--data", finished.parent / "images", "--output", tmp_path / "f.npy"
    )
    assert np.array_equal(np.load(vectors), np.load(tmp_path / "f.npy"))
    assert load_backbone(str(finished / "backbone")).embed_dim == np.load(vectors).shape[1]
    for embedding in by_card:
        assert np.abs(embedding - np.load(vectors)[0]).max() < 1e-4


def embedding_of(snippet: str, folder: Path, **variables: str) -> np.ndarray:
    """What Python code of a model card, with a cache of its own, leaves in `embedding`: (D,)."""
    program = f"{snippet}\nimport numpy\nnumpy.save('embedding.npy', embedding.numpy())"
    home = str(folder / ("timm" if "import timm" in snippet else "transformers"))
    words = [sys.executable, "-c", program]
    variables = environment(**(variables | {"HF_HOME": home}))
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (embedding,) = np.load(folder / "embedding.npy")
    return np.asarray(embedding)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "a/b/c"], "write ORG/NAME"),
        (["--push-to-hub", "org/name", "--format", "onnx"], "leave --format and --output out"),
        (["--format", "onnx"], "give --format and --output"),
        (["--format", "onnx", "--output", "x", "--public"], "--public is about --push-to-hub"),
    ],
)
def test_mistakes(words: list[str], message: str, finished: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(finished), *words, "--quiet"], prog_name="adaptkit")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_a_backbone_that_is_gone_is_a_mistake_not_a_bug(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "backbone")
    done = CliRunner().invoke(main, ["export", str(run), "--push-to-hub", "org/name", "--quiet"], prog_name="adaptkit")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert f"{run / 'backbone'}: is gone; " in line


def test_a_hub_that_refuses_and_one_that_is_away(finished: Path, tmp_path: Path) -> None:
    options = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
    with fake_hub(refuse=403) as hub:
        refused = command("export", finished, "--push-to-hub", "org/name", "--quiet", HF_ENDPOINT=hub.url, **options)
    away = command("export", finished, "--push-to-hub", "org/name", "--quiet", HF_ENDPOINT=hub.url, **options)
    for done in (refused, away):
        assert done.returncode == 8
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: org/name: not uploaded (")
        assert "hf_none" not in line
