"""The command line's contract: options, exit codes, streams. The work behind it is replaced by stand-ins."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from adaptkit import errors
from adaptkit.cli import main
from adaptkit.cli.command_adapt import adapt_command
from adaptkit.cli.command_codes import codes_command
from adaptkit.cli.command_demo import demo_command
from adaptkit.cli.command_embed import embed_command
from adaptkit.cli.command_export import export_command
from adaptkit.cli.command_probe import probe_command
from adaptkit.cli.command_report import report_command
from adaptkit.cli.command_resume import resume_command
from adaptkit.cli.console import RichReporter, clock
from adaptkit.cli.failure import heed_signals
from adaptkit.recipe import FLAGS, Recipe, load_recipe
from adaptkit.run import Run
from adaptkit.signals import SIGNALS

ANSI = "\x1b"


def score(value: float, *ci95: float) -> dict[str, Any]:
    return {"value": value, "ci95": list(ci95) or None}


def make_report(**changes: Any) -> dict[str, Any]:
    return {
        "schema": "adaptkit.report/1",
        "verdict": "improved",
        "evidence": "labels",
        "primary_metric": "knn_top1",
        "message": "Improved: knn_top1 rose.",
        "probes": {
            "before": {"rankme": score(20.5), "knn_top1": score(61.2, 58.1, 64.3)},
            "after": {"rankme": score(22.5), "knn_top1": score(64.4, 61.3, 67.5)},
            "delta": {"knn_top1": score(3.2, 1.1, 5.3)},
        },
        "selected": {"step": 40, "alpha": 0.5},
    } | changes


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `adaptkit ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args], prog_name="adaptkit")


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run, Any], Any]], list[Run]]:
    """Replace `adaptkit.train.run_adaptation`; gives the list of runs it was called with."""

    def install(behaviour: Callable[[Run, Any], Any]) -> list[Run]:
        runs: list[Run] = []

        def run_adaptation(run: Run, reporter: Any) -> Any:
            runs.append(run)
            return types.SimpleNamespace(report=behaviour(run, reporter))

        module = types.ModuleType("adaptkit.train")
        module.run_adaptation = run_adaptation  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "adaptkit.train", module)
        return runs

    return install


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace `adaptkit.evaluate.probe`; gives the list of its calls."""
    calls: list[dict[str, Any]] = []

    def probe(backbones: Any, data: Any, **options: Any) -> Any:
        calls.append({"backbones": tuple(backbones), "data": data, **options})
        document = {"schema": "adaptkit.probe/1", "backbone": backbones[0], "data": data, "seed": 0}
        document |= {"metrics": {"knn_top1": score(61.2, 58.1, 64.3)}, "num_gallery": 60, "num_queries": 60}
        if len(backbones) > 1:
            other = {"backbone": backbones[1], "metrics": {"knn_top1": score(64.4, 61.3, 67.5)}}
            document |= {"compared_with": other, "delta": {"knn_top1": score(3.2, 1.1, 5.3)}, "verdict": "B is better"}
        return types.SimpleNamespace(document=document)

    module = types.ModuleType("adaptkit.evaluate")
    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adaptkit.evaluate", module)
    return calls


def status(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "status.json").read_text(encoding="utf-8"))


ADAPT = ("adapt", "--backbone", "nano", "--data", "images", "--output", "out")


def test_commands_and_options_are_those_of_the_contract() -> None:
    expected = {
        adapt_command: "backbone data output labels recipe set epochs steps budget batch-size lr workers select "
        "require-gain max-bad cache compile track gpus weights no-pretrained allow-missing readout seed precision "
        "overwrite dry-run json quiet",
        probe_command: "backbone data queries metric reference cache weights no-pretrained allow-missing readout "
        "seed precision batch-size workers scale json quiet",
        resume_command: "gpus json quiet",
        embed_command: "backbone data output codes overwrite weights no-pretrained allow-missing readout seed "
        "precision batch-size workers scale json quiet",
        codes_command: "data labels attributes seed precision batch-size workers json quiet",
        export_command: "format output overwrite push-to-hub public json quiet",
        report_command: "schema json quiet",
        demo_command: "output overwrite gpus weights no-pretrained seed precision json quiet",
    }
    names = {"adapt", "backbones", "check", "codes", "demo", "embed", "export", "probe", "recipes", "report", "resume"}
    assert set(main.commands) == names
    for command in main.commands.values():
        assert {"--json", "--quiet"} <= {name for o in command.params for name in o.opts}
    for command, names in expected.items():
        options = {name for o in command.params if isinstance(o, click.Option) for name in o.opts}
        assert options == {f"--{name}" for name in names.split()} | {"-v", "--verbose"}


def test_help_takes_descriptions_and_defaults_from_the_recipe(invoke: Callable[..., Result]) -> None:
    text = " ".join(invoke("adapt", "--help").output.split())
    for key in ("batch_size", "lr", "select", "seed"):
        group: Any = Recipe
        *parents, leaf = FLAGS.get(key, key).split(".")
        for parent in parents:
            group = group.model_fields[parent].annotation
        field = group.model_fields[leaf]
        assert (field.description or "")[1:] in text
        shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert f"{(field.description or '')[1:]}. [default: {shown}]" in text


def test_version(invoke: Callable[..., Result]) -> None:
    assert re.fullmatch(r"adaptkit, version \d+\.\d+\.\d+\n", invoke("--version").output)


def test_flags_and_assignments_reach_the_recipe(invoke: Callable[..., Result], train: Any) -> None:
    runs = train(lambda run, reporter: make_report())
    flags = ("--lr", "1e-5", "--steps", "7", "--no-pretrained", "--allow-missing", "a*", "--allow-missing", "b*")
    result = invoke(*ADAPT, *flags, "--select", "label-free", "--max-bad", "3", "--set", "optim.clip_norm=0.5")
    assert result.exit_code == 0, result.output
    recipe = runs[0].recipe
    assert (recipe.optim.lr, recipe.steps, recipe.pretrained, recipe.allow_missing) == (1e-5, 7, False, ("a*", "b*"))
    assert (recipe.select.by, recipe.data.max_bad, recipe.optim.clip_norm) == ("label-free", "3", 0.5)
    assert recipe.backbone == "nano"  # a name, not a folder: stays a name
    assert recipe.data.path == (os.path.abspath("images"),)


def test_paths_are_absolute_so_that_resume_works_from_anywhere(invoke: Callable[..., Result], train: Any) -> None:
    runs = train(lambda run, reporter: make_report())
    Path("mine").mkdir()
    Path("mine/config.json").touch()
    invoke("adapt", "--backbone", "mine", "--data", "a", "--labels", "b.csv", "--weights", "w.pth", "--output", "out")
    recipe = runs[0].recipe
    given = (recipe.backbone, *recipe.data.path, recipe.labels, recipe.weights)
    assert given == tuple(os.path.abspath(name) for name in ("mine", "a", "b.csv", "w.pth"))


def test_a_run_repeats_from_its_recipe(invoke: Callable[..., Result], train: Any) -> None:
    runs = train(lambda run, reporter: make_report())
    invoke(*ADAPT, "--lr", "1e-5")
    assert invoke("adapt", "--recipe", "out/recipe.yaml", "--output", "again").exit_code == 0
    assert runs[0].recipe == runs[1].recipe == load_recipe("again/recipe.yaml")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("adpt",), "did you mean 'adapt'"),
        (("zzz",), "commands: adapt, backbones, check, codes, demo, embed, export, probe, recipes"),
        ((*ADAPT, "--bacth-size", "3"), "--batch-size"),
        ((*ADAPT, "--steps", "many"), "many"),
        ((*ADAPT, "--lr", "1e-4", "--set", "optim.lr=1e-4"), "given twice"),
        ((*ADAPT, "--set", "optim.lrr=1"), "did you mean 'lr'"),
        ((*ADAPT, "--batch-size", "1"), "batch_size"),
        ((*ADAPT, "--recipe", "bits-rest"), "did you mean 'bits-reset'"),
        (("adapt", "--data", "images"), "--backbone"),
        (("adapt", "--backbone", "nano"), "--data"),
        (("probe", "--backbone", "nano"), "--data"),
        (("probe", "--backbone", "a", "--backbone", "b", "--backbone", "c", "--data", "d"), "3 times"),
        (("probe", "--backbone", "a", "--data", "d", "--metric", ","), "--metric"),
        (("resume", "nowhere"), "nowhere"),
        (("resume",), "RUN"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(invoke: Callable[..., Result], args: tuple[str, ...], words: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    as_json = invoke(*args, "--json")
    assert as_json.exit_code == 2
    document = json.loads(as_json.stdout)
    assert document["error"]["exit_code"] == 2
    assert f"error: {document['error']['message']}\n" == as_json.stderr


def test_without_arguments_help(invoke: Callable[..., Result]) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "adapt" in result.output
    assert "error:" not in result.output


FAILURES = [
    (errors.UsageError("a"), 2, "a"),
    (errors.DataError("images: no usable image"), 3, "images: no usable image"),
    (errors.BackboneError("b"), 4, "b"),
    (errors.GainNotMet("c"), 5, "c"),
    (errors.Collapsed("d"), 6, "d"),
    (errors.DeviceMemoryError("e"), 7, "e"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 7, "--batch-size"),
    (errors.MachineError("f"), 8, "f"),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 8, "free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 8, "Permission denied"),
    (OSError(errno.EROFS, "Read-only file system", "x"), 8, "Read-only"),
    (errors.Interrupted("stopped at step 4"), 75, "step 4"),
    (KeyboardInterrupt(), 75, "adaptkit resume"),
    (ValueError("a bug"), 1, "internal error: ValueError: a bug"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda value: repr(value)[:30])
def test_every_error_has_its_exit_code_status_and_line(
    invoke: Callable[..., Result], train: Any, error: BaseException, code: int, words: str
) -> None:
    def fail(run: Run, reporter: Any) -> Any:
        raise error

    train(fail)
    result = invoke(*ADAPT, "--quiet", "--json")
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert document["error"]["exit_code"] == code
    assert words in document["error"]["message"]
    assert ("Traceback" in result.stderr) == (code == 1)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    written = status()
    assert (written["exit_code"], written["message"]) == (code, document["error"]["message"])
    assert written["state"] == {5: "done", 6: "done", 75: "interrupted"}.get(code, "failed")


def test_sigterm_before_training_is_recorded(invoke: Callable[..., Result], train: Any) -> None:
    train(lambda run, reporter: os.kill(os.getpid(), signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        heed_signals()  # as the process of the command line does
        result = invoke(*ADAPT)
        assert (result.exit_code, status()["state"]) == (75, "interrupted")
        os.kill(os.getpid(), signal.SIGTERM)  # the rest of a burst: the record is written, the process about to end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_of_another_program_stay_its_own(invoke: Callable[..., Result], train: Any) -> None:
    def interrupt(run: Run, reporter: Any) -> Any:
        raise errors.Interrupted("asked to")

    train(interrupt)
    before = [signal.getsignal(number) for number in SIGNALS]
    assert invoke(*ADAPT).exit_code == 75
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_full_disk_does_not_hide_the_error(
    invoke: Callable[..., Result], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Run, reporter: Any) -> Any:
        monkeypatch.setattr(Run, "status", lambda *_: (_ for _ in ()).throw(errors.MachineError("disk full")))
        raise errors.DataError("the cause")

    train(fail)
    result = invoke(*ADAPT)
    assert result.exit_code == 3
    assert "the cause" in result.stderr


def test_json_is_one_document_and_everything_else_is_on_stderr(invoke: Callable[..., Result], train: Any) -> None:
    def work(run: Run, reporter: Any) -> Any:
        reporter.phase("probing the original backbone")
        reporter.note("batch size 40 instead of 128")
        return make_report()

    train(work)
    result = invoke(*ADAPT, "--json")
    assert json.loads(result.stdout) == make_report()
    assert "probing the original backbone" in result.stderr
    assert "batch size 40" in result.stderr
    assert ANSI not in result.output
    quiet = invoke(*ADAPT, "--json", "--quiet", "--overwrite")
    assert json.loads(quiet.stdout) == make_report()
    assert quiet.stderr == ""


@pytest.mark.parametrize(("error", "code"), [(errors.GainNotMet("not met"), 5), (errors.Collapsed("collapsed"), 6)])
def test_an_unwanted_result_is_still_shown(
    invoke: Callable[..., Result], train: Any, error: Exception, code: int
) -> None:
    def work(run: Run, reporter: Any) -> Any:
        run.write_json("report.json", make_report())
        raise error

    train(work)
    result = invoke(*ADAPT, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == make_report() | {"error": {"exit_code": code, "message": str(error)}}
    result = invoke(*ADAPT, "--overwrite")
    assert result.exit_code == code
    assert "Improved: knn_top1 rose." in result.stdout
    assert result.stderr.endswith(f"error: {error}\n")


def test_the_summary_says_verdict_numbers_and_how_to_load(invoke: Callable[..., Result], train: Any) -> None:
    train(lambda run, reporter: make_report())
    lines = invoke(*ADAPT, "--quiet").stdout.strip().splitlines()
    assert lines[0] == "Improved: knn_top1 rose."
    rows = [" ".join(line.split()) for line in lines if line.startswith(("knn_top1", "rankme"))]
    assert rows[0] == "knn_top1 61.2% [58.1, 64.3] 64.4% [61.3, 67.5] +3.2 [+1.1, +5.3]"
    assert rows[1] == "rankme 20.5 22.5 n/a"
    folder = os.path.abspath("out/backbone")
    assert f"    backbone = timm.create_model('local-dir:{folder}', pretrained=True, num_classes=0)" in lines
    assert "Without pretrained=True timm gives random weights." in lines
    assert any("over images, not over seeds" in line for line in lines)


def test_a_label_free_summary_does_not_speak_of_accuracy(invoke: Callable[..., Result], train: Any) -> None:
    train(lambda run, reporter: make_report(evidence="label_free"))
    text = invoke(*ADAPT, "--quiet").stdout
    assert "No labels were given." in text
    assert "accura" not in text


def test_resume_goes_on_with_the_recorded_recipe(invoke: Callable[..., Result], train: Any) -> None:
    def stop(run: Run, reporter: Any) -> Any:
        raise errors.Interrupted("stopped")

    first = train(stop)
    assert invoke(*ADAPT, "--lr", "1e-5").exit_code == 75
    assert status()["state"] == "interrupted"

    def go_on(run: Run, reporter: Any) -> Any:
        assert status()["state"] == "running"
        return make_report()

    second = train(go_on)
    assert invoke("resume", "out").exit_code == 0
    assert first[0] == second[0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 0), ({"verdict": "collapsed"}, 6), ({"require_gain": {"met": False}}, 5), ({"require_gain": None}, 0)],
)
def test_resume_of_a_finished_run_shows_its_report(
    invoke: Callable[..., Result], train: Any, changes: dict[str, Any], code: int
) -> None:
    train(lambda run, reporter: make_report())
    invoke(*ADAPT)
    runs = train(lambda run, reporter: pytest.fail("nothing is left to do"))
    Path("out/report.json").write_text(json.dumps(make_report(**changes)), encoding="utf-8")
    result = invoke("resume", "out", "--json")
    assert (result.exit_code, runs) == (code, [])
    assert json.loads(result.stdout)["schema"] == "adaptkit.report/1"


def test_other_processes_are_silent_but_not_when_they_fail_alone(
    invoke: Callable[..., Result], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(lambda run, reporter: reporter.note("hello") or make_report())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("adaptkit.cli.failure.HEAD_START_SECONDS", 0.0)
    assert invoke(*ADAPT, "--json").output == ""
    assert invoke("adapt", "--backbone", "nano").output == ""

    def fail(run: Run, reporter: Any) -> Any:
        run.path.mkdir(exist_ok=True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    train(fail)
    result = invoke(*ADAPT, "--json")
    assert result.stdout == ""
    assert result.stderr.startswith("[process 1] error: out of GPU memory")
    assert status()["exit_code"] == 7


def test_a_stop_does_not_cover_the_failure_that_caused_it(invoke: Callable[..., Result], train: Any) -> None:
    def stopped_by_the_launcher(run: Run, reporter: Any) -> Any:
        run.status("failed", 7, "another process ran out of memory")
        raise errors.Interrupted("stopped")

    train(stopped_by_the_launcher)
    assert invoke(*ADAPT).exit_code == 75
    assert status()["exit_code"] == 7


def test_several_processes_need_an_output(invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("adapt", "--backbone", "nano", "--data", "images")
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_probe_passes_its_options_on(invoke: Callable[..., Result], probed: list[dict[str, Any]]) -> None:
    assert invoke("probe", "--backbone", "nano", "--data", "d").exit_code == 0
    defaults = {"queries": None, "metrics": None, "precision": "fp32", "batch_size": 128, "allow_missing": ()}
    assert probed[0] == {"backbones": ("nano",), "data": "d"} | defaults
    more = ("--queries", "q", "--metric", "knn, rank", "--seed", "3", "--workers", "0", "--no-pretrained")
    result = invoke("probe", "--backbone", "nano", "--data", "d", *more, "--json")
    assert probed[1]["metrics"] == ["knn", "rank"]
    assert (probed[1]["queries"], probed[1]["seed"], probed[1]["workers"], probed[1]["pretrained"]) == (
        "q",
        3,
        0,
        False,
    )
    assert json.loads(result.stdout)["schema"] == "adaptkit.probe/1"


def test_probe_prints_numbers_with_intervals_images_and_seed(invoke: Callable[..., Result], probed: Any) -> None:
    text = invoke("probe", "--backbone", "nano", "--data", "d", "--quiet").stdout
    assert "knn_top1 61.2% [58.1, 64.3]" in text
    assert "60 gallery images, 60 queries, seed 0" in text
    text = invoke("probe", "--backbone", "a", "--backbone", "b", "--data", "d").stdout
    assert "61.2% [58.1, 64.3] 64.4% [61.3, 67.5] +3.2 [+1.1, +5.3]" in text
    assert "B is better" in text


def test_the_widest_row_of_a_run_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from adaptkit.cli.console import StreamConsole
    from adaptkit.cli.summary import _table

    row = ("view_retrieval_top1", "18.2% [15.4, 21.6]", "22.1% [18.9, 25.3]", "-34.5 [-36.1, -32.9]")
    _table(StreamConsole(sys.stdout), ("metric", "before", "after", "change"), [row])
    assert " ".join(row) in capsys.readouterr().out.splitlines()[1]


def test_interrupting_a_probe_exits_75(
    invoke: Callable[..., Result], probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["adaptkit.evaluate"], "probe", interrupt)
    result = invoke("probe", "--backbone", "a", "--data", "d", "--json")
    assert result.exit_code == 75
    assert "nothing was saved" in json.loads(result.stdout)["error"]["message"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {"loss": 0.5, "bit_agreement": 81.0, "bit_information": 0.4, "images_per_second": 1234.0}


def train_for(reporter: RichReporter, steps: int) -> None:
    with reporter:
        reporter.phase("adapting")
        for step in range(10, steps + 1, 10):
            reporter.training(step, steps, METRICS)
        reporter.evaluation(steps, "knn_top1", 61.2, 64.4, 1.1, 5.3)


def test_off_a_terminal_about_ten_plain_lines() -> None:
    stream = io.StringIO()
    train_for(RichReporter(stream=stream), 1000)
    lines = [line for line in stream.getvalue().splitlines() if "/1000" in line]
    assert 10 <= len(lines) <= 12
    assert "step 1000/1000  loss 0.500  agree 81%  info 0.40  1234 img/s" in lines[-1]
    assert "0:00:0" in lines[3]
    assert lines[3].endswith("left")
    assert ANSI not in stream.getvalue()
    assert "knn_top1 61.2% -> 64.4%, change +3.2 [+1.1, +5.3]" in stream.getvalue()


def test_on_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    train_for(RichReporter(stream=stream), 1000)
    assert "1000/1000" in stream.getvalue()
    assert "step 100/1000" not in stream.getvalue()
    assert not re.search(r"\x1b\[(3|4|9)\dm", stream.getvalue()), "NO_COLOR is respected"


def test_hostile_names_stay_text() -> None:
    stream = io.StringIO()
    with RichReporter(stream=stream) as reporter:
        reporter.note("bad image \x1b[31m[bold]a\nb\udcff.jpg")
    assert stream.getvalue().endswith("note: bad image \\x1b[31m[bold]a\\nb\\udcff.jpg\n")


def test_the_load_report_names_what_matters() -> None:
    stream = io.StringIO()
    report = types.SimpleNamespace(
        matched=("a", "b"),
        missing=(),
        unexpected=tuple(f"head.{i}" for i in range(9)),
        resampled=("pos_embed",),
        sha256="ab" * 32,
        source="timm",
        layout="DINO (teacher)",
    )
    with RichReporter(stream=stream) as reporter:
        reporter.load_report(report)  # type: ignore[arg-type]
    text = stream.getvalue()
    assert "weights timm, sha256 abababababab, DINO (teacher) layout: 2 parameters matched" in text
    assert "1 resampled to this size: pos_embed" in text
    assert "9 in the weights, not in the backbone, ignored: head.0, head.1, head.2, head.3, head.4, ..." in text


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 4000, 360000)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:06:40",
        "100:00:00",
    ]


def test_the_recipe_of_a_run_is_yaml_with_every_setting(invoke: Callable[..., Result], train: Any) -> None:
    train(lambda run, reporter: make_report())
    invoke(*ADAPT)
    written = yaml.safe_load(Path("out/recipe.yaml").read_text(encoding="utf-8"))
    open_until_the_images_are_counted = {"batch_size"}
    assert set(written) == set(Recipe.model_fields) - open_until_the_images_are_counted
