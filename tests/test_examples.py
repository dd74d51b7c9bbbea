"""The examples do what they say, from a folder of their own, as users run them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from conftest import write_folder
from tiny_runs import ROOT, adapt, environment, flags, read

from adaptkit import schedules
from adaptkit.backbones import load_backbone
from adaptkit.vectors import embed_files

pytestmark = pytest.mark.long

EXAMPLES = ROOT / "examples"
STAND_IN = """#!/usr/bin/env bash
# Instead of adaptkit: notes its arguments and ends with the next of CODES.
echo "$*" >> calls
code=$(head -n 1 codes) && sed -i 1d codes
[ "$code" -ne 0 ] || { mkdir -p run/backbone && touch run/backbone/config.json; }
echo "{\\"exit_code\\": $code}"
exit "$code"
"""


def example(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python example as a script, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def gate(folder: Path, adaptkit: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run gate_pipeline.sh in `folder` with `adaptkit` as the content of the command it calls."""
    command = folder / "bin" / "adaptkit"
    command.parent.mkdir(exist_ok=True)
    command.write_text(adaptkit)
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    words = [str(EXAMPLES / "gate_pipeline.sh"), *map(str, arguments)]
    variables = environment(PATH=path, **variables)
    return subprocess.run(words, env=variables, cwd=folder, capture_output=True, text=True, timeout=120)


def brute_force_recall(vectors: np.ndarray, codes: np.ndarray, queries: range, nearest: int) -> float:
    """Share of the nearest by cosine that are among the nearest by Hamming distance, in two plain loops.

    Ties at the last place make it a range; faiss takes the lower index first.
    """
    shares = []
    for query in queries:
        cosine = [float(vectors[query] @ other / np.linalg.norm(other)) for other in vectors]
        hamming = [int(np.unpackbits(codes[query] ^ other).sum()) for other in codes]
        rest = [index for index in range(len(vectors)) if index != query]
        near = sorted(rest, key=lambda index: -cosine[index])[:nearest]
        by_code = sorted(rest, key=lambda index: hamming[index])[:nearest]
        shares.append(len({*near} & {*by_code}) / nearest)
    return 100 * float(np.mean(shares))


def test_image_search(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = adapt(vit, images, tmp_path / "run", steps=2, objective__num_bits=64).run
    embed_files(str(run), images, tmp_path / "images.parquet", codes=True)
    example("image_search.py", tmp_path / "images.parquet", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "120 images, 120 queries, the nearest 10"
    table = pyarrow.parquet.read_table(tmp_path / "images.parquet")
    vectors = np.array(table["vector"].to_pylist())
    codes = np.stack([np.frombuffer(code, np.uint8) for code in table["code"].to_pylist()])
    shown = r"(\d+) bytes an image, +[\d,]+ queries/s, recall +([\d.]+) % \[([\d.]+), ([\d.]+)\]"
    sizes, recalls, lows, highs = zip(*[re.findall(shown, line)[0] for line in lines[1:]], strict=True)
    assert [int(size) for size in sizes] == [4 * vectors.shape[1], 8, 8, 8]
    assert float(recalls[0]) == 100
    expected = brute_force_recall(vectors, codes, range(120), 10)
    assert float(recalls[1]) == pytest.approx(expected, abs=1)  # ties at the last place
    assert float(lows[1]) < float(recalls[1]) < float(highs[1])
    assert float(recalls[2]) >= float(recalls[1])
    assert all("of its class" in line for line in lines[1:])


def test_adapt_from_python_and_load_in_timm(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    images, run = write_folder(tmp_path / "images", classes=2, per_class=10), tmp_path / "run"
    example("adapt_from_python.py", vit, images, run, monkeypatch=monkeypatch)
    report, lines = read(run, "report.json"), capsys.readouterr().out.splitlines()
    assert lines[0] == report["message"]
    shown = {line.split()[0]: float(line.split()[1].rstrip(",")) for line in lines[1:-1]}
    assert shown == {name: round(delta["value"], 2) for name, delta in report["probes"]["delta"].items()}
    assert report["verdict"] in lines[-1]

    example("load_in_timm.py", run / "backbone", images, monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "embeddings: (20, 64)\n"


def test_adapt_from_python_says_what_is_wrong(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example("adapt_from_python.py", vit, tmp_path / "nowhere", tmp_path / "run", monkeypatch=monkeypatch)
    assert ended.value.code == 3
    assert re.fullmatch("error: .*nowhere: no such .*\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def gated(
    vit: Path, images: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Real runs behind the gate, side by side: by the gain asked for, the folder and how it ended."""
    settings = flags({"steps": 2, "checkpoint_every": "100%"})
    arguments = (vit, images, labelled, "runs/gate", *settings, "--quiet")
    adaptkit = f'#!/bin/sh\nexec "{sys.executable}" -m adaptkit "$@"\n'

    def start(gain: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("gate")
        (folder / "old").mkdir()
        (folder / "live").symlink_to("old")
        return folder, gate(folder, adaptkit, *arguments, GAIN=gain, IN_SERVICE="live")

    gains = ("knn_top1>=-100", "knn_top1>=100")
    with ThreadPoolExecutor() as threads:
        return dict(zip(gains, threads.map(start, gains), strict=True))


def test_the_gate_promotes_what_reached_the_gain(gated: Any) -> None:
    folder, done = gated["knn_top1>=-100"]
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs" / "gate.json").read_text())["require_gain"]["met"] is True
    assert (folder / "live").resolve() == folder / "runs" / "gate" / "backbone"
    assert load_backbone(str(folder / "live")).embed_dim == 64
    assert not (folder / "live.new").is_symlink()
    assert done.stdout == "promoted: live is now runs/gate/backbone\n"


def test_the_gate_promotes_nothing_that_did_not_reach_the_gain(gated: Any) -> None:
    folder, done = gated["knn_top1>=100"]
    assert done.returncode == 5, done.stderr
    assert json.loads((folder / "runs" / "gate.json").read_text())["require_gain"]["met"] is False
    assert (folder / "live").resolve() == folder / "old"
    assert "not promoted: the gain knn_top1>=100 was not reached" in done.stdout


@pytest.mark.parametrize(
    ("codes", "end", "words"),
    [
        ([0], 0, "promoted: backbone-in-service is now run/backbone"),
        ([75, 0], 0, "promoted: backbone-in-service is now run/backbone"),
        ([75, 75, 5], 5, "not promoted: the gain"),
        ([75, 75, 75, 75], 75, "adaptkit resume run"),
        ([6], 6, "not promoted: training collapsed"),
        ([3], 3, "not promoted: adaptkit failed with exit code 3"),
        ([1], 1, "not promoted: adaptkit failed with exit code 1"),
    ],
)
def test_the_gate_tells_every_ending_apart(codes: list[int], end: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = gate(tmp_path, STAND_IN, "nano", "my images", "labelled", "run", "--epochs", "5")
    assert done.returncode == end, done.stderr
    assert words in done.stdout
    assert done.stdout.startswith("promoted") == (end == 0)
    assert (tmp_path / "backbone-in-service").is_symlink() == (end == 0)
    assert json.loads((tmp_path / "run.json").read_text()) == {"exit_code": codes[-1]}
    first, *others = (tmp_path / "calls").read_text().splitlines()
    options = "--labels labelled --output run --require-gain knn_top1>=0.5 --epochs 5 --json"
    assert first == f"adapt --backbone nano --data my images {options}"
    assert others == ["resume run --json"] * (len(codes) - 1)


def test_the_gate_says_how_it_is_used(tmp_path: Path) -> None:
    done = gate(tmp_path, STAND_IN, "nano", "images")
    assert done.returncode == 2
    assert "BACKBONE DATA LABELS RUN" in done.stderr


def test_every_example_is_in_the_list() -> None:
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()} - {"README.md"}
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+)\)", text)) == files
    for name in files:
        assert text.count(f"examples/{name} ") == 1, "the command to run it"
