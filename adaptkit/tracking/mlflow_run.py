"""MLflow: the server that the user's variables name, else a SQLite store in `RUN/tracking/mlflow`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate.tracking import MLflowTracker

from adaptkit.tracking.tracker import DONE, FAILED, INTERRUPTED, PROJECT, Result, Scalar

STATUS = {DONE: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
MAX_TAG = 5000  # characters; servers before MLflow 2 take no more
ANSWER_SECONDS = 10  # with MLflow's own patience a step would wait minutes for a server that is gone


class MlflowRun:
    """Numbers are metrics, parameters parameters, the end tags and the run's status, files and pictures artefacts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / "mlflow", name
        self.local = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.environment: Mapping[str, str] = {
            "MLFLOW_TRACKING_URI": self.local,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_LOGGING_LEVEL": "ERROR",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what is missing is sent with a later line
        }

    def start(self, known: str | None) -> str:
        import mlflow

        artefacts = None
        if mlflow.get_tracking_uri() == self.local:
            self.folder.mkdir(parents=True, exist_ok=True)
            artefacts = (self.folder / "artifacts").as_uri()
        nested = mlflow.active_run() is not None  # of the program that called us
        self.tracker = MLflowTracker(PROJECT, artefacts, run_id=known, run_name=self.name, nested_run=nested)
        self.tracker.start()
        return str(self.tracker.tracker.info.run_id)

    def parameters(self, values: Mapping[str, Scalar]) -> None:
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        self.tracker.store_init_configuration({key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in values.items()})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def finish(self, result: Result) -> None:
        import mlflow

        try:
            self.tracker.log(dict(result.numbers), step=result.step)
            for file in result.files:
                self.tracker.log_artifact(str(file))
            for name, picture in result.pictures.items():
                mlflow.log_image(picture, f"pictures/{name}.png")
            mlflow.set_tags({key: str(value)[:MAX_TAG] for key, value in result.summary.items()})
        finally:
            mlflow.end_run(STATUS[result.state])
