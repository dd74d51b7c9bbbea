"""What people meet at the terminal: completion, suggestions, --verbose, colours, human units."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny_runs import environment

from adaptkit.aliases import ALIASES
from adaptkit.cli import command_probe, main
from adaptkit.cli.console import RichReporter, StreamConsole, pace, size, spell
from adaptkit.cli.listing import table
from adaptkit.cli.summary import print_forecast
from adaptkit.cli.verbose import LOG
from adaptkit.evaluate import OWN_DATA
from adaptkit.probes import PROBES, SOURCE_PROBES
from adaptkit.recipe import load_recipe, recipe_fields, recipe_names
from adaptkit.requirement import LABEL_METRICS, TARGET_METRICS
from adaptkit.tracking.tracked import TRACKERS

HEAVY = ("torch", "timm", "numpy", "accelerate")


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `adaptkit ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args], prog_name="adaptkit")


# --- completion


def completed(monkeypatch: pytest.MonkeyPatch, words: str, shell: str = "bash") -> list[str]:
    """What the shell is answered when TAB is pressed after these words."""
    monkeypatch.setenv("COMP_WORDS", f"adaptkit {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"adaptkit {words}".split(" ")) - 1))
    monkeypatch.setenv("_ADAPTKIT_COMPLETE", f"{shell}_complete")
    return CliRunner().invoke(main, [], prog_name="adaptkit").stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ad", ["plain,adapt"]),
        ("adapt --recipe bits-", ["plain,bits-fixed", "plain,bits-reset"]),
        ("adapt --recipe ./my", ["file,./my"]),
        ("recipes qu", ["plain,quick"]),
        ("adapt --backbone dinov3_convnext_t", ["plain,dinov3_convnext_tiny"]),
        ("probe --backbone nano --backbone na", ["plain,nano"]),
        ("embed --backbone runs/", ["dir,runs/"]),
        ("adapt --precision b", ["plain,bf16"]),
        ("adapt --set tun", ["plain,tune=full"]),
        ("adapt --set compile", ["plain,compile=auto", "plain,compile=on", "plain,compile=off"]),
        ("adapt --set views.global_s", ["plain,views.global_scale=[0.4,1.0]"]),
        ("adapt --set pret", ["plain,pretrained=true", "plain,pretrained=false"]),
        ("adapt --require-gain kn", ["plain,knn_top1"]),
        ("probe --metric lin", ["plain,linear"]),
        ("probe --metric knn,r", ["plain,knn,retrieval", "plain,knn,rank"]),
        ("adapt --data ima", ["file,ima"]),
        ("resume ru", ["dir,ru"]),
        ("export runs/a --format o", ["plain,onnx"]),
        ("adpt --rec", []),
    ],
)
def test_the_shell_completes_names(words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(monkeypatch, words) == expected


def test_everything_that_has_a_name_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (*PROBES, *SOURCE_PROBES, *OWN_DATA) == command_probe.NAMES
    assert {line.removeprefix("plain,") for line in completed(monkeypatch, "adapt --track ")} == set(TRACKERS)
    plain = [line.removeprefix("plain,") for line in completed(monkeypatch, "adapt --backbone ")]
    assert plain == ["nano", *ALIASES]
    assert completed(monkeypatch, "adapt --recipe ") == [f"plain,{name}" for name in recipe_names()]
    assert len(completed(monkeypatch, "adapt --require-gain ")) == len(LABEL_METRICS + TARGET_METRICS)
    keys = {line.removeprefix("plain,").partition("=")[0] for line in completed(monkeypatch, "adapt --set ")}
    assert keys == set(recipe_fields())


def test_what_is_completed_for_a_setting_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    assignments = [line.removeprefix("plain,") for line in completed(monkeypatch, "adapt --set ")]
    for text in assignments:
        if not text.startswith("objective.name="):  # another objective has no bits
            load_recipe(assignments=[text])


def test_bash_completes_without_torch(tmp_path: Path) -> None:
    """Bash itself: the documented line, then TAB, as its completion calls it."""
    python = f'"{sys.executable}" -X importtime'
    (tmp_path / "adaptkit").write_text(f'#!/bin/sh\nexec {python} -m adaptkit "$@" 2>> imports\n')
    (tmp_path / "adaptkit").chmod(0o755)
    script = """
        eval "$(_ADAPTKIT_COMPLETE=bash_source adaptkit)"
        complete -p adaptkit
        COMP_WORDS=(adaptkit adapt --recipe bits-) COMP_CWORD=3
        _adaptkit_completion adaptkit && printf '%s\\n' "${COMPREPLY[@]}"
    """
    variables = environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = ["bash", "--norc", "-c", script]
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    registered, *found = done.stdout.splitlines()
    assert registered == "complete -o nosort -F _adaptkit_completion adaptkit"
    assert (found, done.stderr) == (["bits-fixed", "bits-reset"], "")
    imported = {line.rpartition("|")[2].strip() for line in (tmp_path / "imports").read_text().splitlines()}
    assert "adaptkit.cli.completion" in imported, "the check itself works"
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_script_and_answers(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_ADAPTKIT_COMPLETE", f"{shell}_source")
    assert "_ADAPTKIT_COMPLETE" in CliRunner().invoke(main, [], prog_name="adaptkit").stdout
    if shell == "zsh":
        assert completed(monkeypatch, "adapt --recipe qu", "zsh") == ["plain", "quick", "_"]


# --- suggestions

ADAPT = ("adapt", "--backbone", "nano", "--data", "images")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("adpt",), "'adapt'"),
        (("adapt", "--bakbone", "nano"), "'--backbone'"),
        (("recipes", "--shema"), "'--schema'"),
        (("recipes", "quik"), "'quick'"),
        ((*ADAPT, "--recipe", "simdin"), "'simdino'"),
        ((*ADAPT, "--set", "optm.lr=1"), "'optim'"),
        ((*ADAPT, "--set", "optim.lrr=1"), "'lr'"),
        ((*ADAPT, "--set", "lr=1"), "'optim.lr'"),
        ((*ADAPT, "--set", "num_bit=64"), "'objective.num_bits'"),
        ((*ADAPT, "--set", "views.weight_decay=1"), "'optim.weight_decay'"),
        ((*ADAPT, "--precision", "fp61"), "'fp16'"),
        ((*ADAPT, "--set", "precision=bf61"), "'bf16'"),
        ((*ADAPT, "--select", "label"), "'labels'"),
        ((*ADAPT, "--compile", "offf"), "'off'"),
        ((*ADAPT, "--readout", "clss"), "'cls'"),
        ((*ADAPT, "--set", "objective.name=simdin"), "'simdino'"),
        ((*ADAPT, "--set", "data.split_by=folders"), "'folder'"),
        ((*ADAPT, "--require-gain", "rank_me>=1"), "'rankme'"),
        ((*ADAPT, "--labels", "l", "--require-gain", "knn_top>=1"), "'knn_top1'"),
        (("export", "run", "--format", "onx", "--output", "x"), "'onnx'"),
        (("embed", "--backbone", "nano", "--data", ".", "--output", "x.parqet"), "'.parquet'"),
        (("codes", "run", "--precision", "fp61"), "'fp16'"),
    ],
)
def test_a_slip_of_the_finger_is_answered_with_what_was_meant(
    invoke: Callable[..., Result], words: tuple[str, ...], meant: str
) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert re.search(rf"[Dd]id you mean {re.escape(meant)}\?", line), line


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("probe", "--backbone", "nano", "--data", ""), "--data"),
        (("probe", "--backbone", "nano", "--data", "d", "--queries="), "--queries"),
        (("embed", "--backbone", "nano", "--data", "d", "--data=", "--output", "x.npy"), "--data"),
        (("codes", "run", "--labels="), "--labels"),
    ],
)
def test_an_empty_variable_of_a_script_is_not_the_folder_one_is_in(
    invoke: Callable[..., Result], words: tuple[str, ...], option: str
) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert f"{option} is empty; give it a value, or leave it out" in result.stderr


def test_a_misspelt_backbone(invoke: Callable[..., Result]) -> None:
    result = invoke("backbones", "dinov2_vits4")
    assert (result.exit_code, "did you mean 'dinov2_vits14'?" in result.stderr) == (4, True)


# --- --verbose


def test_verbose_shows_what_is_logged_and_where_an_error_came_from(invoke: Callable[..., Result]) -> None:
    wrong = ("adapt", "--backbone", "nano")
    assert "Traceback" not in invoke(*wrong).stderr
    for flag in ("-v", "--verbose"):
        result = invoke(*wrong, flag)
        assert result.exit_code == 2
        first, *_, last = result.stderr.splitlines()
        assert re.fullmatch(r"\d\d:\d\d:\d\d DEBUG adaptkit: adaptkit \d\S*, Python 3\.\S+, \S+", first)
        assert "Traceback" in result.stderr
        assert last == "error: no images; give --data FOLDER, or `data:` in the recipe"
        assert result.stdout == ""
    assert not logging.getLogger().handlers or LOG.getEffectiveLevel() > logging.DEBUG, "nothing stays behind"


def test_the_time_of_every_part_is_logged_and_other_libraries_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def work() -> None:
        with RichReporter(stream=io.StringIO()) as reporter:
            reporter.phase("reading")
            reporter.phase("training")
        logging.getLogger("some.library").info("fetched \x1b[31m")

    from adaptkit.cli.verbose import with_verbose

    monkeypatch.setenv("HF_HUB_VERBOSITY", "warning")
    with_verbose(work).main(["-v"], standalone_mode=False)
    _, reading, training, library = capsys.readouterr().err.splitlines()
    assert re.search(r"DEBUG adaptkit: reading: took \d+\.\d s$", reading)
    assert re.search(r"DEBUG adaptkit: training: took \d+\.\d s$", training)
    assert library.endswith("INFO some.library: fetched \\x1b[31m")


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_can_be_verbose(command: str) -> None:
    assert any({"-v", "--verbose"} <= set(option.opts) for option in main.commands[command].params)


# --- colours


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "is_terminal", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, False),  # pipelines read what a pipe gets
    ],
)
def test_colours_are_where_they_are_wanted(
    variables: dict[str, str], is_terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | variables).items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if is_terminal else io.StringIO()
    with RichReporter(stream=stream) as reporter:
        reporter.note("look here")
        reporter.training(10, 100, {"loss": 1.0})
    assert bool(re.search(r"\x1b\[[\d;]*3\dm", stream.getvalue())) == coloured
    assert ("step 10/100" in stream.getvalue()) == (not is_terminal or variables.get("TERM") == "dumb")


# --- sizes, times, the forecast


def test_sizes_and_times_are_in_units_of_people() -> None:
    shown = [spell(seconds) for seconds in (0.04, 9.94, 59.6, 217, 4000, 7199, 200_000)]
    assert shown == ["0.0 s", "9.9 s", "60 s", "4 min", "67 min", "2 h 0 min", "2 days 7 h"]
    assert [size(b) for b in (300 << 20, 3 << 29)] == ["300 MiB", "1.5 GiB"]
    assert [pace(seconds) for seconds in (0.0042, 3.481)] == ["4.2 ms a step", "3.48 s a step"]


def forecast(**plan: Any) -> dict[str, Any]:
    known = {"steps": 1250, "epochs": 10.0, "batch_size": 64, "head_draws": 4, "step_seconds": 0.21, "seconds": 4000.0}
    known |= {"peak_bytes": 3 << 30, "device_bytes": 40 << 30, "device": "cuda", "precision": "bf16"}
    known |= {"trained": "training 7.1 of 21.7 M backbone parameters (last-4-blocks)"}
    data = {"train": 8000, "selection": 1000, "report": 1000, "labels": None}
    return {"recipe": {}, "data": data, "plan": known | {"num_processes": 1} | plan}


@pytest.mark.parametrize("columns", [60, 80])
def test_the_forecast_fits_and_says_everything(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_forecast(forecast(num_processes=8))
    text = capsys.readouterr().out
    assert all(len(line) <= columns for line in text.splitlines())
    words = " ".join(text.split())
    for part in (
        "8,000 to train on, 1,000 to select, 1,000 to report",
        "1,250 steps of 64 images (10.0 epochs)".replace("steps ", ""),
        "training 7.1 of 21.7 M backbone parameters (last-4-blocks)",
        "about 67 min, 0.21 s a step",
        "about 3.0 GiB of 40.0 GiB",
        "cuda, bf16",
        "8, 8 images of a batch each; timed without messages between them",
    ):
        assert part in words
    print_forecast(forecast() | {"recipe": {"data": {"path": ["photos\u202egnp"]}}})
    text = capsys.readouterr().out
    assert "processes" not in text
    assert "data:\n  path:\n  - photos\\u202egnp\n" in text  # turned letters would show another name


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_hides_nothing(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = "dinov3_vits16plus = vit_small_plus_patch16_dinov3.lvd1689m"
    rows = [(longest, "256", "dinov3-license"), ("nano", "64", "research use, see its model card")]
    table(StreamConsole(sys.stdout), ("backbone", "px", "licence"), rows)
    text = capsys.readouterr().out
    assert all(len(line) <= columns for line in text.splitlines())
    assert (longest in text) == (columns == 80)
    for word in " ".join(" ".join(row) for row in rows).split():
        assert word in text


# --- a reader that has gone


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        (["recipes", "quick", "--verbose"], "stderr", 0),
        (["recipes", "nope"], "stderr", 2),
        (["recipes", "nope", "--json"], "stdout", 2),
    ],
)
def test_that_nobody_reads_changes_no_exit_code(words: list[str], closed: str, code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "adaptkit", *words]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: writing}
    try:
        done = subprocess.run(program, env=environment(), text=True, check=False, timeout=300, **streams)
    finally:
        os.close(writing)
    assert done.returncode == code
    assert "Traceback" not in (done.stderr or "")
    assert (done.stdout or "").startswith("#" if code == 0 else "")
