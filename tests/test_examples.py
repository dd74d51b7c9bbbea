"""The examples do what they say, from a folder of their own, as users run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import write_folder
from tiny_runs import ROOT, adapt, read

from adaptkit import schedules
from adaptkit.vectors import embed_files

pytestmark = pytest.mark.long

EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python example as a script, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


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


def test_every_example_is_in_the_list() -> None:
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()} - {"README.md"}
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+)\)", text)) == files
    for name in files:
        assert text.count(f"examples/{name} ") == 1, "the command to run it"
