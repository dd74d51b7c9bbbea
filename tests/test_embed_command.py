"""`adaptkit embed`: one file of embeddings and codes, the same whatever it is stopped by or shared with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file
from tiny_runs import adapt, command, environment

from adaptkit import vectors
from adaptkit.backbones import load_backbone
from adaptkit.checkpoints import load_tensors
from adaptkit.cli import main
from adaptkit.embedding import embed
from adaptkit.objectives.head import ProjectionHead
from adaptkit.sources import open_folder
from adaptkit.vectors import embed_files, pack_codes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(images: Path, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose codes have 16 bits."""
    return adapt(vit, images, tmp_path_factory.mktemp("runs") / "finished", steps=2).run


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `adaptkit embed ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, ["embed", *map(str, args)], prog_name="adaptkit")


def by_hand(run: Path, data: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, vectors and codes, bit by bit from the tensors of the run."""
    made = embed(load_backbone(str(run / "backbone")), open_folder(data))
    head, _ = load_tensors(run / "head.safetensors")
    layers = [(head[f"{i}.weight"].double().numpy(), head[f"{i}.bias"].double().numpy()) for i in (0, 2, 4)]
    codes = np.zeros((len(made.paths), 2), dtype=np.uint8)
    for row, vector in enumerate(made.vectors.double().numpy()):
        for weight, bias in layers:
            vector = weight @ vector + bias
            if len(vector) != 16:
                vector = torch.nn.functional.gelu(torch.from_numpy(vector)).numpy()
        for bit, logit in enumerate(vector):
            codes[row, bit // 8] |= int(logit > 0) << (7 - bit % 8)
    return list(made.paths), made.vectors.numpy(), codes


def rows(file: Path) -> tuple[list[str], list[str] | None, np.ndarray, np.ndarray | None]:
    """What an output holds, whatever its kind."""
    if file.suffix == ".parquet":
        table = pyarrow.parquet.read_table(file)
        codes = (
            [np.frombuffer(code, np.uint8) for code in table["code"].to_pylist()]
            if "code" in table.schema.names
            else None
        )
        labels = table["label"].to_pylist() if "label" in table.schema.names else None
        return table["path"].to_pylist(), labels, np.array(table["vector"].to_pylist(), np.float32), _array(codes)
    if file.suffix == ".npy":
        other = file.with_suffix(".codes.npy")
        labels = file.with_suffix(".labels.json")
        return (
            json.loads(file.with_suffix(".paths.json").read_text()),
            json.loads(labels.read_text()) if labels.exists() else None,
            np.load(file),
            np.load(other) if other.exists() else None,
        )
    tensors = load_file(file)
    texts = {name: json.loads(tensors[name].tobytes()) for name in ("paths", "labels") if name in tensors}
    return texts["paths"], texts.get("labels"), tensors["vectors"], tensors.get("codes")


def _array(codes: list[np.ndarray] | None) -> np.ndarray | None:
    return None if codes is None else np.stack(codes)


@pytest.mark.parametrize("name", ["e.parquet", "e.npy", "e.safetensors"])
def test_vectors_labels_and_codes(name: str, finished: Path, images: Path, tmp_path: Path) -> None:
    document = embed_files(str(finished), images, tmp_path / name, codes=True).document
    paths, labels, found, codes = rows(tmp_path / name)
    expected_paths, expected, expected_codes = by_hand(finished, images)
    assert paths == expected_paths
    assert labels == [path.partition("/")[0] for path in paths]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert codes is not None
    assert np.array_equal(codes, expected_codes)
    assert (document["num_images"], document["embed_dim"], document["num_bits"]) == (120, found.shape[1], 16)
    assert sorted(map(str, tmp_path.iterdir())) == sorted(
        [*document["output"], *map(str, tmp_path.glob("*.labels.json"))]
    )


@pytest.mark.parametrize("name", ["e.parquet", "e.npy", "e.safetensors"])
def test_without_codes_and_classes(name: str, vit: Path, images: Path, tmp_path: Path) -> None:
    document = embed_files(str(vit), images / "class_1", tmp_path / name).document
    paths, labels, found, codes = rows(tmp_path / name)
    assert (labels, codes, document["num_bits"], document["labels"]) == (None, None, None, False)
    assert len(paths) == len(found) == 30
    assert not list(tmp_path.glob("*.codes.npy"))


@pytest.mark.parametrize("name", ["e.parquet", "e.npy", "e.safetensors"])
def test_many_parts_are_as_one(
    name: str, finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_files(str(finished), images, tmp_path / "one" / name, codes=True, batch_size=10)
    monkeypatch.setattr(vectors, "PART_IMAGES", 50)  # a multiple of the batch: the same batches
    embed_files(str(finished), images, tmp_path / "many" / name, codes=True, batch_size=10)
    assert_same(rows(tmp_path / "one" / name), rows(tmp_path / "many" / name))


def assert_same(one: Any, two: Any) -> None:
    for mine, theirs in zip(one, two, strict=True):
        assert np.array_equal(mine, theirs)


class Stop(Exception):
    pass


def test_a_stopped_command_goes_on(vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART_IMAGES", 50)
    output, parts = tmp_path / "e.npy", tmp_path / "e.npy.parts"
    embed_files(str(vit), images, tmp_path / "whole.npy")
    joined = vectors._join
    monkeypatch.setattr(vectors, "_join", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        embed_files(str(vit), images, output)
    monkeypatch.setattr(vectors, "_join", joined)
    (parts / "000001.safetensors").write_bytes(b"cut off")
    (parts / "000002.safetensors").unlink()
    kept = parts / "000000.safetensors"
    os.utime(kept, ns=(1, 1))
    made: list[tuple[int, int]] = []
    make = vectors._make_part
    monkeypatch.setattr(vectors, "_make_part", lambda job, *b: (made.append(b[:2]), make(job, *b))[1])
    embed_files(str(vit), images, output)
    assert made == [(50, 100), (100, 120)]
    assert_same(rows(output)[2:3], rows(tmp_path / "whole.npy")[2:3])
    assert not parts.exists()


KILLED = """
import os, signal, sys
from adaptkit import checkpoints, vectors
vectors.PART_IMAGES = 50
replace, done = os.replace, []
def die_before_the_second(source, target):
    if str(target).endswith(".safetensors"):
        done.append(target)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die_before_the_second
vectors.embed_files(*sys.argv[1:], codes=True)
"""


def test_a_command_that_was_killed_goes_on(
    finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, parts = tmp_path / "e.parquet", tmp_path / "e.parquet.parts"
    words = [sys.executable, "-c", KILLED, str(finished), str(images), str(output)]
    killed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    kept = parts / "000000.safetensors"
    assert sorted(parts.glob("*.safetensors")) == [kept]
    assert len(list(parts.iterdir())) == 3  # with the key, and what was being written
    monkeypatch.setattr(vectors, "PART_IMAGES", 50)
    embed_files(str(finished), images, tmp_path / "whole.parquet", codes=True)
    made: list[tuple[int, int]] = []
    make = vectors._make_part
    monkeypatch.setattr(vectors, "_make_part", lambda job, *b: (made.append(b[:2]), make(job, *b))[1])
    embed_files(str(finished), images, output, codes=True)
    assert made == [(50, 100), (100, 120)]
    assert_same(rows(output), rows(tmp_path / "whole.parquet"))
    assert not parts.exists()


@pytest.mark.parametrize("num_bits", [16, 20])
def test_faiss_counts_the_bits_that_differ(num_bits: int) -> None:
    head = ProjectionHead(8, num_bits, 8)
    vectors = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    codes = pack_codes(head, vectors).numpy()
    with torch.inference_mode():
        signs = (head(vectors) > 0).numpy()
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    distances, order = index.search(codes, len(codes))
    for query, (found, near) in enumerate(zip(distances, order, strict=True)):
        assert found.tolist() == [int((signs[query] != signs[other]).sum()) for other in near]
    assert np.array_equal(np.unpackbits(codes, axis=1)[:, :num_bits], signs)  # the first bit is the highest
    assert not np.unpackbits(codes, axis=1)[:, num_bits:].any()


def test_parts_of_other_images_or_weights_are_not_used(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = vectors._join
    monkeypatch.setattr(vectors, "_join", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        embed_files(str(vit), images / "class_0", tmp_path / "e.npy")
    monkeypatch.setattr(vectors, "_join", joined)
    embed_files(str(vit), images / "class_1", tmp_path / "e.npy")
    embed_files(str(vit), images / "class_1", tmp_path / "fresh.npy")
    assert_same(rows(tmp_path / "e.npy")[2:3], rows(tmp_path / "fresh.npy")[2:3])


def test_bad_images_are_left_out_and_counted(vit: Path, images: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index, file in enumerate(sorted(images.rglob("*.jpg"))[:6]):
        (mixed / f"{index}.jpg").write_bytes(b"" if index == 2 else file.read_bytes())
    document = embed_files(str(vit), mixed, tmp_path / "e.parquet").document
    assert (document["num_images"], document["num_bad"]) == (5, 1)
    assert rows(tmp_path / "e.parquet")[0] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]


def test_odd_names_survive(vit: Path, images: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    names = [b"line\nbreak.jpg", b"not utf \xff.jpg", "grün.jpg".encode()]
    for name in names:
        (odd / os.fsdecode(name)).write_bytes((images / "class_0" / "0000.jpg").read_bytes())
    for name in ("e.npy", "e.safetensors", "e.parquet"):
        embed_files(str(vit), odd, tmp_path / name)
    assert sorted(os.fsencode(path) for path in rows(tmp_path / "e.npy")[0]) == sorted(names)
    assert sorted(os.fsencode(path) for path in rows(tmp_path / "e.safetensors")[0]) == sorted(names)
    assert "not utf \\xff.jpg" in rows(tmp_path / "e.parquet")[0]


@pytest.mark.slow
def test_two_processes_write_what_one_does(vit: Path, images: Path, tmp_path: Path) -> None:
    for name, number in (("one", 1), ("two", 2)):
        done = launch(vit, images, tmp_path / f"{name}.npy", processes=number)
        assert done.returncode == 0, done.stderr
    assert_same(rows(tmp_path / "one.npy")[2:3], rows(tmp_path / "two.npy")[2:3])
    again = launch(vit, images, tmp_path / "two.npy", processes=2)
    assert again.returncode != 0
    assert "is there already" in again.stderr


IN_PARTS = """
import sys
from adaptkit import vectors
vectors.PART_IMAGES = 30
vectors.embed_files(*sys.argv[1:])
"""


def launch(vit: Path, images: Path, output: Path, processes: int) -> subprocess.CompletedProcess[str]:
    program = output.with_suffix(".py")
    program.write_text(IN_PARTS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += [str(program), str(vit), str(images), str(output)]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)


def test_the_command(invoke: Callable[..., Result], finished: Path, images: Path, tmp_path: Path) -> None:
    options = ("--backbone", finished, "--data", images, "--output", "e.parquet", "--codes")
    done = invoke(*options)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"120 images, \d+ numbers each, codes of 16 bits", done.stdout)
    again = invoke(*options, "--json")
    assert again.exit_code == 2
    assert "is there already; add --overwrite" in again.stderr
    replaced = invoke(*options, "--overwrite", "--json", "--quiet")
    assert json.loads(replaced.stdout)["schema"] == "adaptkit.embed/1"
    assert replaced.stderr == ""


MISTAKES = [
    (["--output", "e.csv"], 2, "write the suffix .parquet, .npy, .safetensors"),
    (["--output", "e.npy", "--codes"], 2, "is no run directory, so it has no head for --codes"),
    (["--output", "e.npy", "--data", "nowhere"], 3, "no such folder"),
    (["--output", "e.npy", "--backbone", "nanoo"], 4, "did you mean 'nano'"),
]


@pytest.mark.parametrize(("options", "code", "message"), MISTAKES)
def test_mistakes(
    options: list[str], code: int, message: str, invoke: Callable[..., Result], vit: Path, images: Path, tmp_path: Path
) -> None:
    given = [] if "--backbone" in options else ["--backbone", str(vit)]
    given += [] if "--data" in options else ["--data", str(images)]
    done = invoke(*given, *options)
    assert done.exit_code == code
    assert message in " ".join(done.stderr.split())
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_runs_without_codes(vit: Path, images: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    run = adapt(vit, images, tmp_path / "run", steps=2, recipe="simdino", **{"objective__num_bits": 256}).run
    done = invoke("--backbone", run, "--data", images, "--output", "e.npy", "--codes")
    assert done.exit_code == 2
    assert "the head of objective simdino; only bits makes codes" in done.stderr
    (run / "report.json").unlink()
    done = invoke("--backbone", run, "--data", images, "--output", "e.npy")
    assert done.exit_code == 4
    assert "not finished; go on with `adaptkit resume" in done.stderr


def test_a_folder_that_is_not_ours_is_left_alone(vit: Path, images: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "e.npy.parts"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("mine")
    done = command("embed", "--backbone", vit, "--data", images, "--output", tmp_path / "e.npy")
    assert done.returncode == 2
    assert "not ours" in done.stderr
    assert (foreign / "diary.txt").read_text() == "mine"
