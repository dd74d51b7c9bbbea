"""The binary language: every measure against plain loops, significance under chance, and the command on a real run."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_html import HOSTILE, Page
from test_markdown import REPORT, score
from tiny_runs import adapt, read

from adaptkit import schedules
from adaptkit.cli import main
from adaptkit.embedding import Embeddings
from adaptkit.errors import DataError
from adaptkit.language.attributes import read_attributes
from adaptkit.language.images import Coded, Collection, known_again, open_sets
from adaptkit.language.measure import measure_code
from adaptkit.language.pictures import MAX_POOL, THUMB_PX, draw_map
from adaptkit.pictures import jpeg
from adaptkit.probes.codes import (
    bit_correlation,
    bit_entropy,
    block_entropies,
    correlation_summary,
    duplicate_bits,
    is_live,
)
from adaptkit.probes.gain import family_gains, information_gain, usable
from adaptkit.probes.hamming import (
    bit_subsets,
    code_average_precision,
    code_neighbours,
    hamming_blocks,
    nearest_images,
    subset_sizes,
)
from adaptkit.recipe import Recipe
from adaptkit.report.html import Facts, render_html
from adaptkit.sources import open_folder, open_labelled


def draw_codes(count: int, bits: int, seed: int = 0, share: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random((count, bits)) < share


# --- what a code says


def test_entropy_dead_and_live_bits_are_those_of_the_shares() -> None:
    codes = draw_codes(400, 5, share=0.3)
    codes[:, 3] = True
    codes[:, 4] = False
    codes[:3, 4] = True  # 0.75 %: not live
    entropy = bit_entropy(codes)
    for bit in range(5):
        shares = [count / 400 for count in Counter(codes[:, bit].tolist()).values()]
        assert entropy[bit] == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-12)
    assert not np.signbit(entropy).any(), "no bit has -0.000 bits"
    assert is_live(codes).tolist() == [True, True, True, False, False]


def test_correlation_and_its_summary() -> None:
    codes = draw_codes(300, 6)
    codes[:, 5] = True
    found = bit_correlation(codes)
    assert np.allclose(found[:5, :5], np.corrcoef(codes[:, :5].T.astype(float)))
    assert np.isnan(found[5]).all()
    pairs = [abs(found[a, b]) for a in range(5) for b in range(a)]
    summary = correlation_summary(found)
    assert summary["num_pairs"] == 10 == sum(summary["histogram"]["counts"])
    assert summary["mean_abs"] == pytest.approx(np.mean(pairs))
    assert summary["max_abs"] == pytest.approx(max(pairs))


def test_duplicates_are_named_and_counted_once() -> None:
    codes = draw_codes(400, 6)
    codes[:, 2] = codes[:, 0]
    codes[:, 3] = ~codes[:, 0]
    codes[:, 5] = codes[:, 1]
    codes[0, 5] ^= True
    found = duplicate_bits(codes, bit_correlation(codes))
    named = {tuple(pair["bits"]): pair["relation"] for pair in found["pairs"]}
    assert named == {(0, 2): "equal", (0, 3): "complement", (2, 3): "complement", (1, 5): "correlated"}
    assert (found["num_pairs"], found["num_bits"]) == (4, 3)


def test_block_entropy_is_the_counted_one_and_its_correction_lessens_the_bias() -> None:
    codes = draw_codes(1000, 19, seed=3)
    found = block_entropies(codes)
    assert found["num_blocks"] == 2
    for block in range(2):
        counts = Counter(tuple(row) for row in codes[:, 8 * block : 8 * block + 8].tolist())
        plain = -sum(n / 1000 * math.log2(n / 1000) for n in counts.values())
        assert found["raw"][block] == pytest.approx(plain)
        assert found["corrected"][block] == pytest.approx(plain + (len(counts) - 1) / (2000 * math.log(2)))
    assert 8 - found["raw_mean"] > 0.1 > abs(8 - found["corrected_mean"])  # they are 8 in truth
    assert block_entropies(codes[:40])["maximum"] == math.log2(40)
    assert block_entropies(codes[:, :7])["raw_mean"] is None


# --- ranking by code


def orders(distances: list[int]) -> list[tuple[int, ...]]:
    """Every ranking that the distances allow."""
    found = [[]]
    for value in sorted(set(distances)):
        tied = [i for i, d in enumerate(distances) if d == value]
        found = [before + list(after) for before in found for after in itertools.permutations(tied)]
    return [tuple(each) for each in found]


def test_average_precision_is_the_mean_over_all_orders_of_ties() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = rng.random((6, 3)) < 0.5, rng.random((6, 3)) < 0.5
    labels, truth = np.array([0, 1, 0, 1, 1, 0]), np.array([0, 1, 0, 1, 0, 1])
    found = code_average_precision(*map(torch.from_numpy, (queries, gallery, truth, labels)))
    for q in range(6):
        distances = [int((queries[q] != row).sum()) for row in gallery]
        values = []
        for order in orders(distances):
            hits = [labels[i] == truth[q] for i in order]
            values.append(np.mean([sum(hits[: r + 1]) / (r + 1) for r in range(6) if hits[r]]))
        assert found[q].item() == pytest.approx(np.mean(values), abs=1e-12)


def test_neighbours_by_code_are_the_mean_over_all_orders_of_ties() -> None:
    codes, vectors = torch.from_numpy(draw_codes(7, 3)), torch.from_numpy(np.random.default_rng(1).normal(size=(7, 4)))
    index = nearest_images(vectors, 3)
    found = code_neighbours(codes, index)
    for row in range(7):
        others = [i for i in range(7) if i != row]
        distances = [int((codes[row] != codes[i]).sum()) for i in others]
        shares = [len({others[i] for i in order[:3]} & set(index[row].tolist())) / 3 for order in orders(distances)]
        assert found[row].item() == pytest.approx(np.mean(shares))


def test_distances_come_in_blocks_and_subsets_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = draw_codes(5, 9), draw_codes(4, 9, seed=1)
    monkeypatch.setattr("adaptkit.probes.hamming.SIMILARITIES_AT_ONCE", 8)
    blocks = list(hamming_blocks(torch.from_numpy(one), torch.from_numpy(other)))
    assert [len(block) for _, block in blocks] == [2, 2, 1]
    assert torch.cat([block for _, block in blocks]).tolist() == [[int((a != b).sum()) for b in other] for a in one]
    assert subset_sizes(256) == [256, 128, 64, 32]
    assert subset_sizes(48) == [48, 32]
    drawn = [tuple(bits.tolist()) for bits in bit_subsets(64, 32, seed=0)]
    assert len({*drawn}) == 5
    assert all(len({*bits}) == 32 for bits in drawn)
    assert drawn == [tuple(bits.tolist()) for bits in bit_subsets(64, 32, seed=0)]
    assert drawn != [tuple(bits.tolist()) for bits in bit_subsets(64, 32, seed=1)]


# --- what a bit means


def test_information_gain_is_the_mutual_information_of_the_counted_table() -> None:
    codes, has = draw_codes(200, 3), draw_codes(200, 2, seed=1, share=0.2)
    has[:, 1] = codes[:, 0]
    found = information_gain(codes, has)
    for bit, prop in itertools.product(range(3), range(2)):
        joint = Counter(zip(codes[:, bit].tolist(), has[:, prop].tolist(), strict=True))
        ones, with_it = Counter(codes[:, bit].tolist()), Counter(has[:, prop].tolist())
        plain = sum(n / 200 * math.log2(n * 200 / ones[a] / with_it[b]) for (a, b), n in joint.items())
        assert found[bit, prop] == pytest.approx(plain, abs=1e-12)


def test_chance_is_claimed_in_few_tables_and_a_planted_property_always() -> None:
    claimed = 0
    for seed in range(40):  # 300 pairs each: uncorrected, nearly every table would claim some
        codes, has = draw_codes(120, 30, seed), draw_codes(120, 10, seed + 1000, share=0.3)
        claimed += bool((family_gains(codes, has, seed, shuffles=99).p <= 0.05).any())
    assert claimed <= 6  # 2 expected; more than 6 by chance once in 300
    has[:, 4] = codes[:, 7] ^ (np.arange(120) % 6 == 0)
    found = family_gains(codes, has, 0, shuffles=99)
    assert np.argwhere(found.p <= 0.05).tolist() == [[7, 4]]
    assert np.array_equal(found.p <= 0.05, found.gain > found.threshold)
    assert family_gains(codes, has, 0, shuffles=9).threshold is None
    assert usable(np.arange(12)[:, None] < np.array([[4, 5, 7, 8]])).tolist() == [False, True, True, False]


def collection(root: Path, logits: torch.Tensor) -> Collection:
    source = open_folder(root)
    paths = tuple(source.path(i) for i in range(len(source)))
    vectors = torch.randn(len(source), 4, generator=torch.Generator().manual_seed(0))
    coded = Coded(source, Embeddings(vectors, None, None, paths), logits[: len(source)])
    return Collection.of([coded, coded])  # each file once


def test_attributes_become_properties(images: Path) -> None:
    found = collection(images, torch.randn(120, 16))
    assert len(found) == 120
    table = images.parent / "attributes.csv"
    rows = [f"images/{found.path(i)},{i},{'dry' if i % 3 else 'wet'},{i % 2}\n" for i in range(100)]
    table.write_text("path,height,weather,night\n" + "".join(rows) + "elsewhere.jpg,1,dry,0\n")
    known = read_attributes(table, found)
    assert known.names == (
        "height > 24.75", "height > 49.5", "height > 74.25",
        "weather dry", "weather wet", "night 0", "night 1",
    )  # fmt: skip
    assert (len(known.images), known.unmatched) == (100, 1)
    wanted = [[i > 24.75, i > 49.5, i > 74.25, i % 3 > 0, i % 3 == 0, i % 2 == 0, i % 2 == 1] for i in range(100)]
    assert known.has.tolist() == wanted


def test_large_numbers_keep_their_quartiles_apart(images: Path) -> None:
    found, table = collection(images, torch.randn(120, 4)), images.parent / "times.csv"
    rows = (f"images/{found.path(i)},{1_600_000_000 + i}\n" for i in range(100))
    table.write_text("path,time\n" + "".join(rows))
    names = read_attributes(table, found).names
    assert names == ("time > 1600000024.75", "time > 1600000049.5", "time > 1600000074.25")


def test_a_table_too_wide_to_test_is_refused_at_once(images: Path, tmp_path: Path) -> None:
    found, table = collection(images, torch.randn(120, 4)), tmp_path / "wide.csv"
    for columns, words in ((1_000_000, "attributes, at most 1,000"), (900, "more than 2,000 properties")):
        header = ",".join(f"c{number}" for number in range(columns))
        table.write_text(f"path,{header}\n" + "".join(f"{found.files[i]}{f',{i % 4}' * 900}\n" for i in range(8)))
        with pytest.raises(DataError, match=words):
            read_attributes(table, found)


def test_a_table_that_is_no_file_is_refused(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match=r"is a pipe or a device|cannot be read as a table"):
            read_attributes(place, collection(images, torch.randn(120, 4)))


def test_images_that_are_known_are_not_embedded_again(images: Path) -> None:
    plain, halves = open_folder(images), open_labelled(images)
    readable = [i for i in range(120) if i != 3]
    paths = tuple(plain.path(i) for i in readable)
    vectors = torch.arange(120.0)[readable, None]
    known = Coded(plain, Embeddings(vectors, None, None, paths, ((plain.path(3), "bad"),)), -vectors)
    again = [known_again(known, half) for half in (halves.gallery, halves.queries)]
    assert sum(len(each or ()) for each in again) == 119
    for each, half in zip(again, (halves.gallery, halves.queries), strict=True):
        assert each is not None
        where = [paths.index(path) for path in each.embeddings.paths]
        assert torch.equal(each.embeddings.vectors, vectors[where])
        assert torch.equal(each.logits, -vectors[where])
        assert each.classes == [path.partition("/")[0] for path in each.embeddings.paths]
        assert [half.path(place) for place in each.positions] == list(each.embeddings.paths)
    assert known_again(again[0] or known, plain) is None


def test_a_pipe_is_no_table(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"pipe.csv: is a pipe or a device; save the list as a file$"):
        read_attributes(tmp_path / "pipe.csv", collection(images, torch.randn(120, 16)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path\na.jpg\n", "needs the header path,ATTRIBUTE"),
        ("file,wet\na.jpg,1\n", "needs the header path,ATTRIBUTE"),
        ("path,wet\na.jpg,1\n", "none of its 1 images is among the 120"),
        ("path,wet\nIMAGE,\n", "needs a path and a wet"),
        ("path,wet\nIMAGE,1\nIMAGE,0\n", "listed twice"),
        ("path,wet\nIMAGE,1\n", "every attribute is the same"),
        ("", "needs the header path,ATTRIBUTE"),
    ],
)
def test_a_table_that_says_nothing_is_refused(images: Path, text: str, words: str) -> None:
    table = images.parent / "refused.csv"
    table.write_text(text.replace("IMAGE", "images/class_0/0000.jpg"))
    with pytest.raises(DataError, match=words):
        read_attributes(table, collection(images, torch.randn(120, 4)))


def test_without_scikit_learn_the_map_is_pca_and_says_so(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    found = draw_map(collection(images, torch.randn(120, 16)), seed=0)
    assert found["method"] == "PCA"
    assert "pip install 'adaptkit[codes]'" in found["reason"]
    assert np.abs(found["points"]).max() == 1
    assert len(found["points"]) == 120 == len(found["images"])


def test_large_sets_are_sampled_by_the_seed(images: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptkit.language.images.MAX_IMAGES", 50)

    def code(source: Any) -> Coded:
        return Coded(source, Embeddings(torch.zeros(len(source), 2), None, None, ()), torch.zeros(len(source), 2))

    recipe = Recipe(data={"path": [str(images)]})
    one, same, other = (open_sets(recipe, (), str(labelled), seed, code) for seed in (0, 0, 1))
    assert (len(one.target), one.num_target, len(one.gallery or ()), len(one.queries or ())) == (50, 120, 50, 60)
    rows = [sets.target.source.rows.tolist() for sets in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]


# --- the command


@pytest.fixture(scope="module")
def finished(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 1)
        return adapt(vit, images, tmp_path_factory.mktemp("runs") / "run", steps=2, select__alphas=[]).run


def codes(run: Path, *arguments: object) -> Any:
    result = CliRunner().invoke(main, ["codes", str(run), "--workers", "0", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.long
def test_the_command_writes_what_it_prints_and_a_section_to_look_at(
    finished: Path, labelled: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "report.html").read_text(encoding="utf-8")
    printed = json.loads(codes(run, "--labels", labelled, "--json", "--quiet").stdout)
    assert printed == read(run, "codes.json")
    assert printed["schema"] == "adaptkit.codes/1"
    assert (printed["num_bits"], len(printed["bits"]), printed["data"]["num_images"]) == (16, 16, 120)
    assert printed["retrieval"]["num_queries"] == 60
    assert printed["map"]["method"] == "t-SNE"
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert f"{printed['entropy']['mean']:.3f} of 1 on average" in page.by_section["language"]
    radios = [given for given in page.all("input") if given["type"] == "radio"]
    assert len(radios) == 16
    assert sum("checked" in given for given in radios) == 1
    assert {given["href"][1:] for given in page.all("use")} <= {given.get("id") for given in page.all("image")}
    pictures = read(run, "codes_pictures.json")
    for bit in pictures["bits"]:
        assert not set(bit["zero"]) & set(bit["one"])
        assert {pictures["images"][row]["class"] for side in ("zero", "one") for row in (bit["within"] or bit)[side]}
    again = json.loads(codes(run, "--labels", labelled, "--json", "--quiet").stdout)
    assert again == printed
    (run / "codes.json").unlink()
    (run / "codes_pictures.json").unlink()
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.long
def test_the_bits_are_those_of_embed_and_without_labels_nothing_is_claimed(finished: Path, tmp_path: Path) -> None:
    from adaptkit.vectors import embed_files

    run = shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "flat"
    folder.mkdir()
    for file in sorted(Path(read_path(run)).rglob("*.jpg"))[::4]:
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    shown = codes(run, "--data", folder).stdout
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith(("codes.json", "report.html")))
    assert "nothing is said about what a bit means" in " ".join(shown.split())
    found = read(run, "codes.json")
    assert (found["retrieval"], found["properties"]) == (None, {})
    section = Page((run / "report.html").read_text(encoding="utf-8")).by_section["language"]
    assert "Nothing here claims accuracy." in section
    assert "retrieval_map" not in section
    embed_files(str(run), folder, tmp_path / "e.npy", codes=True, workers=0)
    packed = next(np.load(file) for file in tmp_path.glob("*.npy") if np.load(file).dtype == np.uint8)
    ones = np.unpackbits(packed, axis=1).mean(axis=0)
    assert [bit["ones"] for bit in found["bits"]] == pytest.approx(ones.tolist())


def read_path(run: Path) -> str:
    found = re.search(r"(?m)^  path:\n  - (.*)$", (run / "recipe.yaml").read_text())
    assert found is not None
    return found[1]


# --- the page


def largest(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Documents of as many bits, images and classes as are ever shown, every one of the names hostile."""
    code = draw_codes(200, 256)
    best = {"name": f"class {name}", "gain": 0.2, "p": 0.002, "ones_with": 0.9, "ones_without": 0.1}
    sized = {"value": 40.0, "ci95": [39.0, 41.0], "subsets": [39.5, 40.5], "delta": score(-1.0, -2.0, 0.5)}
    found = measure_code(code) | {
        "schema": "adaptkit.codes/1",
        "seed": 0,
        "num_bits": 256,
        "data": {"path": [name], "num_images": 200, "num_found": 300, "num_bad": 0},
        "neighbours": {"k": 10, "chance": 5.0, "codes": [{"bits": 256} | sized]},
        "retrieval": {"num_gallery": 9, "num_queries": 9, "num_classes": 3, "embedding": sized}
        | {"codes": [{"bits": 256} | sized]},
        "properties": {
            "class": {"num_images": 9, "num_properties": 3, "num_significant": 2, "unmatched": 0}
            | {"shuffles": 500, "threshold": 0.01}
        },
        "bits": [{"bit": bit, "ones": 0.5, "entropy": 1.0, "class": best} for bit in range(256)],
    }
    noise = np.random.default_rng(0).integers(0, 256, (THUMB_PX, THUMB_PX, 3), dtype=np.uint8)
    picture = jpeg(Image.fromarray(noise), THUMB_PX)  # no thumbnail is larger
    images = [{"path": f"{name}/{row}", "class": name, "jpeg": picture} for row in range(MAX_POOL)]
    side = {"zero": list(range(6)), "one": list(range(MAX_POOL - 6, MAX_POOL))}
    bits = [{"bit": bit, **side, "within": {"class": name, **side}} for bit in range(256)]
    drawn = {"method": "t-SNE", "reason": None, "points": [[0.1, -0.2]] * 2_000}
    drawn["images"] = [{"path": name, "class": f"{name} {row % 12}"} for row in range(2_000)]
    return found, {"pool": MAX_POOL, "images": images, "bits": bits, "map": drawn}


@pytest.mark.long
def test_the_largest_section_is_small_and_hostile_names_stay_text() -> None:
    found, pictures = largest(HOSTILE)
    text = render_html(Facts("run", REPORT, codes=found, codes_pictures=pictures))
    assert len(text.encode()) < 8_000_000
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "form"}
    assert not [given for _, given in page.tags if any(key.startswith("on") for key in given)]
    assert all(given["href"].startswith("data:image/jpeg;base64,") for given in page.all("image"))
    assert all(given["href"].startswith("#code-image-") for given in page.all("use"))
    assert {"language"} == {given["id"] for given in page.all("section")} & {"language", HOSTILE}
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    assert page.section == ""
    assert "Tells most of class <script>" in page.by_section["language"]


def test_documents_of_another_kind_are_no_section() -> None:
    assert "language" not in Page(render_html(Facts("run", REPORT, codes={"schema": "other/1"}))).by_section


def test_a_damaged_document_costs_its_section_alone() -> None:
    text = render_html(Facts("run", REPORT, codes={"schema": "adaptkit.codes/1", "num_bits": 8}))
    assert "language" not in Page(text).by_section
    assert "codes.json is damaged." in text
