"""Trackers: what they hold is what the run's files say, over interruptions, several processes and lost servers.

TensorBoard is read back with its own accumulator, W&B from its offline file, MLflow through the client of a server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_image
from several import together
from tiny_runs import Recorder, SignalAt, adapt, command, flags, read

import adaptkit
from adaptkit.errors import Interrupted, MachineError, UsageError
from adaptkit.pictures import jpeg
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.requirement import check_trackers
from adaptkit.run import Run
from adaptkit.tracking import Tracked, tracked
from adaptkit.tracking.contents import contact_sheets, numbers_of, parameters_of
from adaptkit.tracking.tracker import Result, environment

TRAIN = {"step": 2, "kind": "train", "loss": 0.5, "lr": 1e-4, "grad_norm": None}
DELTA = {"value": 2.5, "ci95": [-1.0, 6.0]}
EVALUATION = {"step": 2, "kind": "evaluation", "metric": "knn_top1", "alpha": 1.0, "value": 62.5, "delta": DELTA}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What a tracker should hold, computed anew from the run's files: name -> [(step, value)]."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run):
        if line["kind"] == "train":
            values = {key: value for key, value in line.items() if key not in ("step", "kind") and value is not None}
        else:
            values = {line["metric"]: line["value"], f"{line['metric']}_delta": line["delta"]["value"]}
        for key, value in values.items():
            points.setdefault(key, []).append((line["step"], value))
    if (run / "report.json").is_file():
        report = read(run, "report.json")
        for part, scores in report["probes"].items():
            for metric, score in scores.items():
                points[f"probes/{part}/{metric}"] = [(report["training"]["steps"], score["value"])]
    return points


def assert_holds(found: Mapping[str, list[tuple[int, float]]], run: Path) -> None:
    """Every number once, at its step; TensorBoard keeps float32."""
    wanted = expected(run)
    assert wanted
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name
    extra = {name for name in set(found) - set(wanted) if not name.endswith(("_lower", "_upper"))}
    assert not extra


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(accumulator: Any) -> dict[str, list[tuple[int, float]]]:
    names = accumulator.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def text(accumulator: Any, name: str) -> str:
    return str(accumulator.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode())


def session(accumulator: Any, part: str) -> Any:
    """The start or end that the HPARAMS plugin is told."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = accumulator.summary_metadata[f"_hparams_/session_{part}_info"].plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), f"session_{part}_info")


def started(path: Path, *names: str) -> Run:
    """A run directory with two lines of the log, as training would have left it."""
    run = Run.create(load_recipe(overrides={"backbone": "nano", "data": "images", "track": list(names)}), path)
    run.log(TRAIN)
    run.log(EVALUATION)
    return run


def test_lines_of_the_log_become_numbers_of_the_same_names() -> None:
    assert numbers_of(TRAIN) == {"loss": 0.5, "lr": 1e-4}
    bounds = {"knn_top1_delta_lower": -1.0, "knn_top1_delta_upper": 6.0}
    assert numbers_of(EVALUATION) == {"knn_top1": 62.5, "knn_top1_delta": 2.5} | bounds
    assert "knn_top1_delta_lower" not in numbers_of(EVALUATION | {"delta": {"value": 2.5, "ci95": None}})
    assert numbers_of(EVALUATION | {"value": None}).keys() == bounds.keys() | {"knn_top1_delta"}
    assert numbers_of({"step": 3, "kind": "collapse", "reason": "no"}) == {}


def test_parameters_are_the_whole_recipe_by_dotted_key() -> None:
    recipe = load_recipe(overrides={"optim.lr": 2e-4, "data": ["a", "b"]})
    parameters = parameters_of(recipe)
    assert parameters["optim.lr"] == 2e-4
    assert parameters["data.path"] == '["a", "b"]'
    assert parameters["steps"] == "null"

    def count(tree: Mapping[str, Any]) -> int:
        return sum(count(value) if isinstance(value, dict) else 1 for value in tree.values())

    assert len(parameters) == count(recipe.model_dump(mode="json"))


def test_sheets_show_every_picture_in_its_place() -> None:
    jpegs = [jpeg(draw_image(label, 0)) for label in range(3)]
    images = [{"jpeg": jpegs[0]}, {"jpeg": None}, {"jpeg": jpegs[2]}]
    views = [{"jpeg": jpegs[1], "global": jpegs[:2], "local": jpegs[:1]}]
    neighbours = {"queries": [0, 2], "before": [[1, 2], [0, 1]]}
    sheets = contact_sheets({"images": images, "views": views, "neighbours": neighbours})
    assert {name: sheet.size for name, sheet in sheets.items()} == {
        "views": (4 * 100 - 4, 96),
        "neighbours_before": (3 * 100 - 4, 2 * 100 - 4),
    }
    sheet = sheets["neighbours_before"]
    assert sheet.getpixel((100, 0)) == sheet.getpixel((295, 195)) == (211, 211, 211), "a missing picture is grey"
    assert sheet.crop((0, 0, 96, 96)).tobytes() == sheet.crop((100, 100, 196, 196)).tobytes(), "image 0 twice"
    assert contact_sheets({"images": [], "views": None, "missing": {"views": "why"}}) == {}


@pytest.mark.parametrize("given", ["tensorboard,mlflow", ["tensorboard", "mlflow"], "tensorboard, mlflow,tensorboard"])
def test_trackers_are_given_together_or_one_by_one(given: object) -> None:
    assert load_recipe(overrides={"track": given}).track == ("tensorboard", "mlflow")
    assert load_recipe(assignments=[f"track={given}"]).track == ("tensorboard", "mlflow")
    assert load_recipe(assignments=["track=null"]).track == ()


def test_an_unknown_tracker_is_a_usage_error_that_lists_them() -> None:
    with pytest.raises(UsageError, match=r"track.*'tensorboard', 'wandb' or 'mlflow'"):
        load_recipe(overrides={"track": "comet"})


def test_a_missing_package_is_said_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "absent_tracker").mkdir()  # what W&B leaves in the working directory is not the package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"pip install 'adaptkit\[absent_tracker\]'"):
        check_trackers(Recipe.model_construct(track=("absent_tracker",)))
    check_trackers(load_recipe(overrides={"track": "tensorboard"}))


def test_variables_of_the_user_stay_and_others_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACK_SET", "user")
    monkeypatch.setenv("TRACK_EMPTY", "")
    with environment({"TRACK_SET": "ours", "TRACK_EMPTY": "ours", "TRACK_NEW": "ours"}):
        assert [os.environ[f"TRACK_{name}"] for name in ("SET", "EMPTY", "NEW")] == ["user", "ours", "ours"]
    assert os.environ["TRACK_EMPTY"] == ""
    assert "TRACK_NEW" not in os.environ


def test_a_resumed_run_goes_on_where_its_tracker_is(tmp_path: Path) -> None:
    run = started(tmp_path / "run", "tensorboard")
    with Tracked(run, Recorder()) as first:
        first.begin()
        first.training(2, 6, {})
        run.log(TRAIN | {"step": 4})
        first.training(4, 6, {})
        run.status("interrupted", 75, "stopped at step 4")
    folder = run.path / "tracking" / "tensorboard" / "run"
    assert "interrupted" in text(events(folder), "summary")
    run.rewind_log(2)  # the checkpoint was older than the log: step 4 is done again
    with Tracked(Run.open(run.path), Recorder()) as second:
        second.begin()
        run.log(TRAIN | {"step": 4})
        second.training(4, 6, {})
        run.log(TRAIN | {"step": 6})
        second.training(6, 6, {})
        run.status("failed", 8, "disk full")
    found = events(folder)
    assert_holds(scalars(found), run.path)
    assert [step for step, _ in expected(run.path)["loss"]] == [2, 4, 6]
    summary = text(found, "summary")
    assert all(f"| {key} | {value} |" in summary for key, value in {"state": "failed", "exit_code": 8}.items())
    assert "_hparams_/session_end_info" not in found.summary_metadata, "it may be resumed once more"


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "run", "lines": "2", "parameters": true}', '{"lines": 2}'])
def test_a_damaged_record_costs_a_new_run_of_the_tracker_and_a_note(tmp_path: Path, text: str) -> None:
    run = started(tmp_path / "run", "tensorboard")
    with Tracked(run, Recorder()) as first:
        first.begin()
        first.training(2, 6, {})
    (run.path / "tracking" / "tensorboard.json").write_text(text)
    reporter = Recorder()
    with Tracked(run, reporter) as second:
        second.begin()
        run.log(TRAIN | {"step": 4})
        second.training(4, 6, {})
    assert [note for note in reporter.notes if "damaged, so tensorboard gets a new run" in note] == reporter.notes != []
    assert_holds(scalars(events(run.path / "tracking" / "tensorboard" / "run-2")), run.path)


def test_without_its_folder_the_tracker_gets_everything_again(tmp_path: Path) -> None:
    run = started(tmp_path / "run", "tensorboard")
    for _ in range(2):
        with Tracked(run, reporter := Recorder()) as tracking:
            tracking.begin()
            tracking.training(2, 6, {})
        assert reporter.notes == []
        assert_holds(scalars(events(run.path / "tracking" / "tensorboard" / "run")), run.path)
        shutil.rmtree(run.path / "tracking")


def test_what_a_tracker_says_of_a_server_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-hunter2")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    said = "http://joe:p@ss@host:5000/api refused hunter2-hunter2 and 0123456789abcdef of http://host/a@b"

    def refuse(self: Broken, known: str | None) -> str:
        raise ConnectionError(said)

    monkeypatch.setitem(tracked.TRACKERS, "mlflow", Broken)
    monkeypatch.setattr(Broken, "start", refuse)
    run, reporter = started(tmp_path / "run", "mlflow"), Recorder()
    with pytest.raises(MachineError) as raised, Tracked(run, reporter) as first:
        first.begin()
    run.write_json("tracking/mlflow.json", {"id": "id", "lines": 0, "parameters": True})
    with Tracked(run, reporter) as second:
        second.begin()
    for text in (str(raised.value), *reporter.notes):
        assert "(ConnectionError: http://***@host:5000/api refused *** and *** of http://host/a@b)" in text
    assert len(reporter.notes) == 1


class Broken:
    """A tracker whose server answers to `start`, and from a line of the log on no more, for a while."""

    environment: Mapping[str, str] = {}
    fails_at_start = fails = False

    def __init__(self, folder: Path, name: str) -> None:
        self.steps: list[int] = []
        self.results: list[Result] = []

    def start(self, known: str | None) -> str:
        if self.fails_at_start:
            raise ConnectionError("nobody\nthere")
        return known or "id"

    def parameters(self, values: Mapping[str, object]) -> None: ...

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails:
            raise ConnectionError("gone")
        self.steps.append(step)

    def finish(self, result: Result) -> None:
        self.results.append(result)


def test_a_tracker_that_fails_later_costs_one_note_and_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracked.TRACKERS, "mlflow", Broken)
    run, reporter = started(tmp_path / "run", "mlflow"), Recorder()
    with Tracked(run, reporter) as reporting:
        reporting.begin()
        broken = reporting.followers[0].tracker
        assert isinstance(broken, Broken)
        broken.fails = True
        for step in (4, 6, 8):
            run.log(TRAIN | {"step": step})
            reporting.training(step, 8, {})
        assert broken.steps == []
        broken.fails = False
        run.status("interrupted", 75, "stopped")
    assert reporter.steps == [4, 6, 8]
    assert len(reporter.notes) == 1
    assert "mlflow fails (ConnectionError: gone); the run goes on" in reporter.notes[0]
    assert broken.steps == [2, 2, 4, 6, 8]
    assert [(result.state, result.exit_code) for result in broken.results] == [("interrupted", 75)]


def test_a_tracker_that_does_not_start_ends_a_new_run_but_not_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracked.TRACKERS, "mlflow", Broken)
    run = started(tmp_path / "run", "mlflow")
    monkeypatch.setattr(Broken, "fails_at_start", True)
    unheard = Recorder()
    wanted = pytest.raises(MachineError, match=r"mlflow does not start \(ConnectionError: nobody there\)")
    with wanted, Tracked(run, unheard) as never:
        never.begin()
    assert unheard.notes == [], "the error says it"
    monkeypatch.setattr(Broken, "fails_at_start", False)
    with Tracked(run, Recorder()) as first:
        first.begin()
        first.training(2, 6, {})
    monkeypatch.setattr(Broken, "fails_at_start", True)
    reporter = Recorder()
    with Tracked(run, reporter) as second:
        second.begin()
        second.training(4, 6, {})
    assert len(reporter.notes) == 1


@pytest.mark.long
def test_tensorboard_holds_a_whole_run_that_was_interrupted(
    vit: Path, images: Path, labelled: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"labels": labelled, "track": "tensorboard"}
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        adapt(vit, images, run, reporter=SignalAt(step=4), **options)
    adaptkit.resume(run)
    found = events(run / "tracking" / "tensorboard" / "run")
    assert_holds(scalars(found), run)
    assert {"views", "neighbours_before"} <= set(found.Tags()["images"])
    assert text(found, "report") == (run / "report.md").read_text(encoding="utf-8")
    assert f"| verdict | {read(run, 'report.json')['verdict']} |" in text(found, "summary")
    hparams = session(found, "start").hparams
    assert hparams["batch_size"].number_value == 8
    assert hparams["precision"].string_value == "fp32"
    assert session(found, "end").status == 1, "success, in the words of the plugin"
    assert sorted(each.name for each in (run / "tracking").iterdir()) == ["tensorboard", "tensorboard.json"]


def several(vit: Path, images: Path, run: Path) -> str:
    return adapt(vit, images, run, track="tensorboard").verdict


@pytest.mark.slow
def test_two_processes_are_one_run_of_the_tracker(vit: Path, images: Path, tmp_path: Path) -> None:
    together(2, several, vit, images, tmp_path / "run")
    folder = tmp_path / "run" / "tracking" / "tensorboard" / "run"
    assert len(list(folder.iterdir())) == 1
    assert_holds(scalars(events(folder)), tmp_path / "run")


@pytest.fixture
def _track_extra() -> None:
    missing = [name for name in ("wandb", "mlflow", "flask") if find_spec(name) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not installed; pip install '.[test,track]'", pytrace=False)


def tracked_command(vit: Path, images: Path, labelled: Path, run: Path, *more: object, **variables: str) -> Path:
    """`adaptkit adapt` in a process of its own, in an empty folder that is also its home; returns that folder."""
    home = run.parent / "home"
    home.mkdir(exist_ok=True)
    what = ("--backbone", vit, "--data", images, "--labels", labelled, "--output", run)
    variables |= {"HOME": str(home), "CI": "", "GITHUB_ACTIONS": ""}
    done = command("adapt", *what, *flags(), "--json", *more, timeout=600, **variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "adaptkit.report/1", "nothing but the document on stdout"
    return home


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format, blocks of 32 KiB, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def wandb_item(item: Any) -> tuple[str, Any]:
    return item.key or "/".join(item.nested_key), json.loads(item.value_json)


@pytest.mark.slow
@pytest.mark.usefixtures("_track_extra")
def test_wandb_is_offline_within_the_run_and_holds_all_of_it(
    vit: Path, images: Path, labelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "named"
    home = tracked_command(vit, images, labelled, run, "--track", "wandb", WANDB_API_KEY="", WANDB_MODE="")
    assert list(home.rglob("*")) == [], "nothing hidden outside the run directory"
    (file,) = (run / "tracking" / "wandb").glob("offline-run-*/*.wandb")
    points: dict[str, list[tuple[int, float]]] = {}
    summary, config, names, pictures, artefacts, codes = {}, {}, set(), [], [], []
    for record in wandb_records(file):
        row = dict(map(wandb_item, record.history.item))
        pictures += [key.removesuffix("/_type") for key in row if key.endswith("/_type")]
        for key, value in row.items():
            if key != "step" and not key.startswith("_") and "/" not in key:
                points.setdefault(key, []).append((row["step"], value))
        summary |= dict(map(wandb_item, record.summary.update))
        config |= dict(map(wandb_item, record.config.update)) | dict(map(wandb_item, record.run.config.update))
        names |= {record.run.display_name} - {""}
        artefacts += [entry.path for entry in record.request.log_artifact.artifact.manifest.contents]
        artefacts += [entry.path for entry in record.artifact.manifest.contents]
        codes += [record.exit.exit_code] if record.HasField("exit") else []
    report = read(run, "report.json")
    steps = report["training"]["steps"]
    points |= {key: [(steps, value)] for key, value in summary.items() if key.startswith("probes/")}
    assert_holds(points, run)
    assert (summary["verdict"], summary["exit_code"], codes) == (report["verdict"], 0, [0])
    assert names == {"named"}
    assert (config["batch_size"], config["track"]) == (8, '["wandb"]')
    assert {"views", "neighbours_before"} <= set(pictures)
    assert {"report.html", "report.json", "report.md"} <= set(artefacts)


class Server:
    """A real MLflow server on 127.0.0.1 with a store of its own, that can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        store = ("--backend-store-uri", f"sqlite:///{self.folder / 'store.db'}")
        artefacts = ("--artifacts-destination", (self.folder / "artefacts").as_uri())
        words = [sys.executable, "-m", "mlflow", "server", *where, *store, *artefacts]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(self.folder)}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(600):
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server does not answer")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def mlflow_run(server: Server, run: Path) -> tuple[Any, Any, dict[str, list[tuple[int, float]]]]:
    """Client, the run of this run directory's name (there is exactly one), and its metrics."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("adaptkit")
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run.name}'")
    names = found.data.metrics
    history = {name: client.get_metric_history(found.info.run_id, name) for name in names}
    return client, found, {name: sorted((m.step, m.value) for m in points) for name, points in history.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("_track_extra")
def test_mlflow_holds_a_run_on_a_server(
    vit: Path, images: Path, labelled: Path, server: Server, tmp_path: Path
) -> None:
    run = tmp_path / "on-server"
    home = tracked_command(vit, images, labelled, run, "--track", "mlflow", MLFLOW_TRACKING_URI=server.uri)
    client, found, metrics = mlflow_run(server, run)
    report = read(run, "report.json")
    assert_holds(metrics, run)
    assert found.info.status == "FINISHED"
    tags, delta = found.data.tags, report["probes"]["delta"]["knn_top1"]
    assert (tags["verdict"], tags["exit_code"], tags["primary_metric"]) == (report["verdict"], "0", "knn_top1")
    assert float(tags["primary_delta"]) == delta["value"]
    wanted = parameters_of(Run.open(run).recipe)
    assert found.data.params == {key: str(value) for key, value in wanted.items()}
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {
        *("pictures", "report.html", "report.json", "report.md")
    }
    pictures = {file.path for file in client.list_artifacts(found.info.run_id, "pictures")}
    assert {"pictures/views.png", "pictures/neighbours_before.png"} <= pictures
    assert list(home.rglob("*")) == []
    assert [each.name for each in (run / "tracking").iterdir()] == ["mlflow.json"], "nothing of the store is here"


@pytest.mark.slow
@pytest.mark.usefixtures("_track_extra")
def test_mlflow_without_a_server_keeps_its_store_in_the_run(
    vit: Path, images: Path, labelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "local"
    home = tracked_command(vit, images, labelled, run, "--track", "mlflow", MLFLOW_TRACKING_URI="")
    assert list(home.rglob("*")) == [], "nothing hidden outside the run directory"
    assert (run / "tracking" / "mlflow" / "mlflow.db").is_file()
    known = read(run, "tracking/mlflow.json")["id"]
    artefacts = run / "tracking" / "mlflow" / "artifacts" / known / "artifacts"
    assert (artefacts / "report.json").read_bytes() == (run / "report.json").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("_track_extra")
def test_mlflow_goes_on_with_the_same_run_when_resumed(
    vit: Path, images: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = tmp_path / "interrupted"
    with pytest.raises(Interrupted):
        adapt(vit, images, run, track="mlflow", reporter=SignalAt(step=4))
    _, first, _ = mlflow_run(server, run)
    assert (first.info.status, first.data.tags["exit_code"]) == ("KILLED", "75")
    adaptkit.resume(run)
    _, second, metrics = mlflow_run(server, run)
    assert second.info.run_id == first.info.run_id
    assert (second.info.status, second.data.tags["exit_code"]) == ("FINISHED", "0")
    assert_holds(metrics, run)


class At(Recorder):
    """Does something once at a step of the log, and something else when a phase of that name begins."""

    def __init__(self, step: int, then: Callable[[], None], phase: str = "-", later: Callable[[], None] = lambda: None):
        super().__init__()
        self.at_step, self.then, self.at_phase, self.later = step, then, phase, later

    def phase(self, title: str) -> None:
        super().phase(title)
        if self.at_phase in title:
            self.later()

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        super().training(step, total_steps, metrics)
        if step == self.at_step:
            self.then()


@pytest.mark.slow
@pytest.mark.usefixtures("_track_extra")
def test_a_server_that_goes_away_costs_one_note_and_has_everything_when_it_is_back(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with pytest.raises(MachineError, match="mlflow does not start"):
        adapt(vit, images, tmp_path / "early", track="mlflow")
    server.start()
    try:
        gone = At(4, server.stop)
        assert adapt(vit, images, tmp_path / "gone", track="mlflow", reporter=gone).verdict
        assert read(tmp_path / "gone", "status.json")["exit_code"] == 0
        assert len([note for note in gone.notes if "mlflow" in note]) == 1
        server.start()
        _, found, metrics = mlflow_run(server, tmp_path / "gone")
        assert (found.info.status, [step for step, _ in metrics["loss"]]) == ("RUNNING", [2])
        back = At(4, server.stop, "exporting", server.start)
        adapt(vit, images, tmp_path / "back", track="mlflow", reporter=back)
        assert len([note for note in back.notes if "mlflow" in note]) == 1
        _, found, metrics = mlflow_run(server, tmp_path / "back")
        assert found.info.status == "FINISHED"
        assert_holds(metrics, tmp_path / "back")
    finally:
        server.stop()
