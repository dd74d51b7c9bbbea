"""What users do wrong, through the real command line: the exit code, and one line that says what, where and what to do.

Interruptions (75), gains that are not met (5) and collapses (6) are no mistakes: see test_resume, test_end_to_end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_machine import CASES, namespaces, run_cases
from click.testing import CliRunner, Result
from conftest import draw_image, write_folder
from timm.models.vision_transformer import VisionTransformer
from tiny_runs import flags, read

from adaptkit.cli import main

LONGEST_LINE = 300


@dataclass(frozen=True)
class Mistake:
    """A command line (`{mine}`: what the user has; `TINY`: small settings), and regexes its line must contain."""

    words: str
    exit_code: int
    where: str
    what: str
    advice: str


ADAPT = "adapt --output out --backbone {mine}/vit --data {mine}/images "
PROBE = "probe --backbone {mine}/vit --data {mine}/images "
ON = "adapt --output out --backbone {mine}/vit --data {mine}/"

# Found before a run directory is needed, or by a command that makes none.
WITHOUT_RUN = {
    "no such command": Mistake("adpt", 2, "adpt", "no such command", "did you mean 'adapt'"),
    "no such option": Mistake("adapt --bacth-size 3", 2, "--bacth-size", "[Nn]o such option", "--batch-size"),
    "no backbone": Mistake("adapt --data {mine}/images", 2, "backbone", "no backbone", "give --backbone NAME"),
    "no images": Mistake("adapt --backbone {mine}/vit", 2, "images", "no images", "give --data FOLDER"),
    "no data to probe": Mistake("probe --backbone {mine}/vit", 2, "--data", "[Mm]issing", "probe --help"),
    "unknown recipe": Mistake(ADAPT + "--recipe bits-rest", 2, "bits-rest", "unknown recipe", "mean 'bits-reset'"),
    "no such recipe file": Mistake(
        ADAPT + "--recipe my.yaml", 2, r"my\.yaml", "no such recipe file", "check the path.*bits-reset"
    ),
    "recipe is no recipe": Mistake(
        ADAPT + "--recipe {mine}/photo.yaml", 2, r"photo\.yaml", "cannot be read", "check the path"
    ),
    "broken YAML": Mistake(
        ADAPT + "--recipe {mine}/broken.yaml", 2, r"broken\.yaml.*line 2", "not valid YAML", "mend it"
    ),
    "unknown key": Mistake(ADAPT + "--set optim.lrr=1", 2, r"optim\.lrr", "unknown key", "did you mean 'lr'"),
    "unknown key in a file": Mistake(
        ADAPT + "--recipe {mine}/unknown.yaml", 2, r"unknown\.yaml.*optim\.lrr", "unknown key", "did you mean 'lr'"
    ),
    "no value": Mistake(ADAPT + "--set optim.lr", 2, r"--set optim\.lr", "write key=value", r"--set optim\.lr=1e-4"),
    "key and flag": Mistake(ADAPT + "--lr 1e-4 --set optim.lr=1e-4", 2, r"optim\.lr", "given twice", "keep one"),
    "key twice": Mistake(ADAPT + "--set epochs=1 --set epochs=2", 2, "epochs", "given twice", "keep one"),
    "key twice in a file": Mistake(
        ADAPT + "--recipe {mine}/twice.yaml", 2, r"twice\.yaml.*epochs", "given twice", "mend it"
    ),
    "word for a number": Mistake(ADAPT + "--epochs many", 2, "--epochs", "'many' is not a valid", "adapt --help"),
    "word for a number in a key": Mistake(ADAPT + "--set optim.lr=fast", 2, r"optim\.lr", "'fast'", "valid number"),
    "batch size 0": Mistake(ADAPT + "--batch-size 0", 2, "batch_size = 0", "greater than or equal to 2", ""),
    "word for a duration": Mistake(ADAPT + "--set head.warmup=soon", 2, r"head\.warmup", "'soon'", "500 steps"),
    "word for a time": Mistake(ADAPT + "--budget soon", 2, "budget", "'soon'", "write a time.*30m"),
    "word for a share": Mistake(ADAPT + "--max-bad lots", 2, "max_bad", "'lots'", "as in 12 or 1%"),
    "unknown choice": Mistake(ADAPT + "--precision fp8", 2, "--precision", "'fp8' is not one of", "'bf16'"),
    "unknown metric": Mistake(PROBE + "--metric knm", 2, "knm", "unknown probe", "did you mean 'knn'"),
    "no metric": Mistake(PROBE + "--metric ,", 2, "--metric", "names no probe", "--metric knn,retrieval"),
    "output not empty": Mistake(
        ADAPT + "--output {mine}/notes", 2, "mine/notes", "not empty", "--overwrite.*adaptkit resume"
    ),
    "output is a file": Mistake(ADAPT + "--output {mine}/photo.jpg", 2, r"photo\.jpg", "is a file", "give .*a folder"),
    "overwriting what is no run": Mistake(
        ADAPT + "--output {mine}/notes --overwrite", 2, r"notes.*a\.txt", "replaces runs only", "another --output"
    ),
    "selecting by labels without labels": Mistake(ADAPT + "--select labels", 2, "--select labels", "needs", "--labels"),
    "gain in a metric of labels": Mistake(
        ADAPT + "--require-gain 'knn_top1>=1'", 2, "--require-gain knn_top1", "this run measures", "need --labels"
    ),
    "malformed gain": Mistake(
        ADAPT + "--require-gain more", 2, "--require-gain more", "write METRIC>=POINTS", "knn_top1>=0.5"
    ),
    "gain in an unknown metric": Mistake(
        ADAPT + "--require-gain 'selection_scor>=1'",
        2,
        "--require-gain selection_scor",
        "this run measures",
        "did you mean 'selection_score'",
    ),
    "output below a file": Mistake(
        ADAPT + "--output {mine}/photo.jpg/run", 2, r"photo\.jpg", "is a file", "give .*a folder"
    ),
    "empty gate": Mistake(ADAPT + "--require-gain ''", 2, "--require-gain", "is empty", "leave it out"),
    "empty labels": Mistake(ADAPT + "--labels ''", 2, "--labels", "is empty", "leave it out"),
    "empty output": Mistake(ADAPT + "--output ''", 2, "--output", "is empty", "leave it out"),
    "fewer workers than none": Mistake(PROBE + "--workers -1", 2, "--workers", "not in the range", "probe --help"),
    "damaged report": Mistake("resume {mine}/damaged", 2, r"damaged/report\.json", "damaged", "--overwrite"),
    "resuming what is no run": Mistake("resume {mine}/notes", 2, "mine/notes", "no run here", "give the folder that"),
    "resuming nothing": Mistake("resume {mine}/nowhere", 2, "mine/nowhere", "no run here", "give the folder that"),
    "probing nothing": Mistake(
        "probe --backbone {mine}/vit --data {mine}/nowhere", 3, "mine/nowhere", "no such", "check the path"
    ),
    "rehearsing on nothing": Mistake(
        "adapt --dry-run --backbone {mine}/vit --data {mine}/nowhere", 3, "mine/nowhere", "no such", "check the path"
    ),
    "probing without labels": Mistake(
        "probe --backbone {mine}/vit --data {mine}/flat --metric knn", 3, "mine/flat", "no labels for knn", "rank"
    ),
    "probing a damaged folder": Mistake(
        "probe --backbone {mine}/vit --data {mine}/corrupt", 3, r"0\.jpg", "not a readable image", "check the data"
    ),
    "probing a list without a header": Mistake(
        "probe --backbone {mine}/vit --data {mine}/headless.csv", 3, r"headless\.csv", "first line", "path,label"
    ),
}

# Found with the backbone or the images in hand: the run directory says so too.
IN_A_RUN = {
    "no such folder": Mistake(ON + "nowhere", 3, "mine/nowhere", "no such", "check the path"),
    "empty folder": Mistake(ON + "empty", 3, "mine/empty", r"no \.jpg", "check the path"),
    "a file for a folder": Mistake(ON + "photo.jpg", 3, r"photo\.jpg", "is (a file|neither)", "folder"),
    "only text files": Mistake(ON + "notes", 3, "mine/notes", r"2 other files: \.txt, \.pdf", "convert them"),
    "no usable image": Mistake(ON + "corrupt TINY", 3, r"\d+\.jpg", "not a readable image", "check the data"),
    "too many bad images": Mistake(
        ON + "half TINY", 3, r"first: class_\d/\d+\.jpg.*bad_images\.jsonl", "of 40 images cannot be used", "--max-bad"
    ),
    "too few images": Mistake(ON + "few", 3, "mine/few", "4 images are too few", "at least 8"),
    "batch larger than the data": Mistake(
        ADAPT + "--batch-size 64", 3, "mine/images", "16 training images, but batch_size is 64", "--batch-size 16"
    ),
    "labels of one class": Mistake(
        ADAPT + "--labels {mine}/one_class", 3, "mine/one_class", "only the class 'class_0'", "two"
    ),
    "labels without class folders": Mistake(
        ADAPT + "--labels {mine}/flat", 3, r"flat/0\.png", "lies in no class folder", "CLASS/IMAGE, or a .csv"
    ),
    "labels without a header": Mistake(
        ADAPT + "--labels {mine}/headless.csv", 3, r"headless\.csv", "first line", "header path,label"
    ),
    "labels with missing files": Mistake(
        ADAPT + "--labels {mine}/missing.csv",
        3,
        r"missing\.csv line 3.*nope\.jpg",
        "no such file",
        "paths are relative",
    ),
    "everything is labelled": Mistake(
        ADAPT + "--labels {mine}/images", 3, "mine/images", "every image is also under --labels", "give others"
    ),
    "unknown backbone": Mistake(
        "adapt --output out --backbone dino_vits61 --data {mine}/images",
        4,
        "dino_vits61",
        "unknown backbone",
        "did you mean 'dino_vits16'",
    ),
    "no such backbone folder": Mistake(
        "adapt --output out --backbone ./nowhere --data {mine}/images", 4, r"\./nowhere", "no such folder", "hf-hub:"
    ),
    "folder without a backbone": Mistake(
        "adapt --output out --backbone {mine}/empty --data {mine}/images",
        4,
        "mine/empty",
        r"no config\.json",
        r"has config\.json and model\.safetensors",
    ),
    "no such weights": Mistake(
        ADAPT + "--weights {mine}/no.pth", 4, r"no\.pth", "no such weights file", "check the path"
    ),
    "weights are no weights": Mistake(
        ADAPT + "--weights {mine}/photo.jpg", 4, r"photo\.jpg", "not a weights file", r"give \.safetensors or \.pth"
    ),
    "garbage for weights": Mistake(
        ADAPT + "--weights {mine}/garbage.pth", 4, r"garbage\.pth", "cannot be read as weights", "again"
    ),
    "truncated weights": Mistake(
        ADAPT + "--weights {mine}/truncated.safetensors", 4, r"truncated\.safetensors", "cannot be read", "again"
    ),
    "weights with code": Mistake(
        ADAPT + "--weights {mine}/code.pth", 4, r"code\.pth", "cannot be read as weights", "again"
    ),
    "weights of another architecture": Mistake(
        ADAPT + "--weights {mine}/resnet/model.safetensors",
        4,
        r"resnet/model\.safetensors",
        "does not fit test_vit: 0 parameters fit",
        "name the backbone these weights belong to",
    ),
    "weights that are switched off": Mistake(
        ADAPT + "--weights {mine}/vit/model.safetensors --no-pretrained", 4, r"model\.safetensors", "", "keep one"
    ),
    "no such readout": Mistake(
        "adapt --output out --backbone {mine}/resnet --data {mine}/images --readout cls",
        4,
        "mine/resnet",
        "no tokens",
        "choose readout pool",
    ),
    "image size that no patch divides": Mistake(
        ADAPT + "--set image_px=33", 4, "mine/vit", "33 is no multiple", "choose 32"
    ),
}


class Code:
    """Unpickled carelessly it leaves a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code-was-run",)


@pytest.fixture(scope="module")
def mine(vit: Path, resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user has: images, labels, recipes and weights, most of them with something wrong."""
    mine = tmp_path_factory.mktemp("m") / "mine"
    shutil.copytree(vit, mine / "vit")
    shutil.copytree(resnet, mine / "resnet")
    (mine / "damaged").mkdir()
    (mine / "damaged" / "recipe.yaml").write_text("backbone: nano")
    (mine / "damaged" / "report.json").write_text("{")
    write_folder(mine / "images", classes=2, per_class=12)
    write_folder(mine / "few", classes=1, per_class=4)
    write_folder(mine / "one_class", classes=1, per_class=6)
    write_folder(mine / "half", classes=2, per_class=20)
    for path in sorted((mine / "half").rglob("*.jpg"))[::2]:
        path.write_bytes(path.read_bytes()[:200])
    for name in ("empty", "notes", "corrupt", "flat"):
        (mine / name).mkdir()
    for index in range(20):
        (mine / "corrupt" / f"{index}.jpg").write_bytes(b"no image")
        draw_image(0, index).save(mine / "flat" / f"{index}.png")
    draw_image(0, 0).save(mine / "photo.jpg")
    shutil.copy(mine / "photo.jpg", mine / "photo.yaml")
    for name, text in {
        "notes/a.txt": "precious",
        "notes/b.pdf": "precious",
        "headless.csv": "images/class_0/0000.jpg,a\n",
        "missing.csv": "path,label\nimages/class_0/0000.jpg,a\nimages/nope.jpg,b\n",
        "unknown.yaml": "optim:\n  lrr: 1\n",
        "twice.yaml": "epochs: 1\nepochs: 2\n",
        "broken.yaml": "optim: [1\n",
        "garbage.pth": "garbage",
    }.items():
        (mine / name).write_text(text)
    (mine / "truncated.safetensors").write_bytes((vit / "model.safetensors").read_bytes()[:-100])
    torch.save({"model": Code()}, mine / "code.pth")
    return mine


@pytest.fixture
def invoke(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run `adaptkit WORDS` in a fresh folder."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(words: str) -> Result:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        arguments = [
            w for word in shlex.split(words.format(mine=mine)) for w in (flags() if word == "TINY" else [word])
        ]
        return CliRunner().invoke(main, arguments, prog_name="adaptkit")

    return run


def contents(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of the last change and hash of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status, content = path.lstat(), path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, hashlib.sha256(content).hexdigest())
    return found


def the_line(stderr: str) -> str:
    """The one line of the error: the last one, with no traceback before it, and not too long to read."""
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in stderr
    without_the_test = re.sub(r"/\S*/pytest-\d+/", "/", lines[-1])  # users keep their files in shorter places
    assert len(without_the_test) <= LONGEST_LINE
    return lines[-1].removeprefix("error: ")


def assert_told(result: Result, mistake: Mistake) -> str:
    """The exit code, and a line that says what, where and what to do. Returns the line."""
    assert result.exit_code == mistake.exit_code, result.output
    line = the_line(result.stderr)
    for part in (mistake.where, mistake.what, mistake.advice):
        assert re.search(part, line), line
    return line


def assert_told_as_json(result: Result, mistake: Mistake) -> str:
    """The same, and stdout holds one JSON document."""
    line = assert_told(result, mistake)
    assert json.loads(result.stdout) == {"error": {"exit_code": mistake.exit_code, "message": line}}
    return line


def named(mistakes: dict[str, Mistake]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mistake", mistakes.values(), ids=mistakes.keys())


@named(WITHOUT_RUN)
def test_a_mistake_found_at_once_leaves_nothing_behind(mistake: Mistake, mine: Path, invoke: Any) -> None:
    before = contents(mine)
    result = invoke(mistake.words)
    assert_told(result, mistake)
    assert result.stdout == ""
    assert os.listdir() == []
    assert_told_as_json(invoke(mistake.words + " --json"), mistake)
    assert os.listdir() == []
    assert contents(mine) == before


@named(IN_A_RUN)
def test_a_mistake_found_later_is_in_the_run_directory_too(mistake: Mistake, mine: Path, invoke: Any) -> None:
    before = contents(mine)
    result = invoke(mistake.words)
    line = assert_told(result, mistake)
    assert result.stdout == ""
    assert os.listdir() == ["out"]
    assert read(Path("out"), "status.json") == {"state": "failed", "exit_code": mistake.exit_code, "message": line}
    assert_told_as_json(invoke(mistake.words + " --json --quiet"), mistake)
    assert contents(mine) == before


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True], ids=["probing", "training"])
def test_a_gpu_without_enough_memory(training: bool, invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the forward pass raises what torch raises on one."""
    forward = VisionTransformer.forward

    def too_much(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        if len(images) >= (1 if training else 8) and torch.is_grad_enabled() == training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total ...")
        result: torch.Tensor = forward(self, images)
        return result

    monkeypatch.setattr(VisionTransformer, "forward", too_much)
    line = assert_told_as_json(
        invoke(ADAPT + "TINY --json --quiet"), Mistake("", 7, "memory", "", "lower|below|smaller batch size")
    )
    assert read(Path("out"), "status.json") == {"state": "failed", "exit_code": 7, "message": line}


# --- the machine's faults


@pytest.fixture(scope="module")
def ended(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How every case of `bad_machine` ended."""
    inside = namespaces()
    if not inside:
        pytest.skip("neither root nor user namespaces here: no disk can be filled, no network taken away")
    return run_cases(inside, vit, images, tmp_path_factory.mktemp("machine"))


NO_SPACE = r"full-\d/run/\S+: No space left on device; free some space"
FAULTS = {
    "full at the start": (8, "start/run: No space left on device; free some space"),
    "full before the first checkpoint": (8, NO_SPACE),
    "full in the middle": (8, NO_SPACE),
    "full at the export": (8, NO_SPACE),
    "read-only": (8, "read-only/run: Read-only file system; choose another --output"),
    "no permission": (8, "locked/run: Permission denied; choose another --output"),
    "private images": (8, "private/?: cannot be listed .Permission denied."),
    "no network": (4, r"vit_small_patch16_224\.dino: .*cached.*--weights FILE"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_faults_of_the_machine(case: str, ended: dict[str, dict[str, Any]]) -> None:
    (exit_code, words), told = FAULTS[case], ended[case]
    assert told["exit_code"] == exit_code
    line = the_line(told["stderr"])
    assert re.search(words, line), line
    assert json.loads(told["stdout"]) == {"error": {"exit_code": exit_code, "message": line}}
    assert told["seconds"] < 10
    assert told.get("damage", []) == []


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if FAULTS[case][1] == NO_SPACE])
def test_after_a_full_disk_everything_written_before_is_good(case: str, ended: dict[str, dict[str, Any]]) -> None:
    """`status.json` may be the old one, but is whole; with space again the run goes on to its end."""
    assert ended[case]["status"]["state"] in ("running", "failed")
    assert ended[case]["checkpoint"] == (case != "full before the first checkpoint")
    assert ended[case]["resumed"] == 0
