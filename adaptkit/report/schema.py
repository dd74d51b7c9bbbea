"""What `report.json` is made of, for tools that read it: `adaptkit report --schema` prints the JSON Schema.

Within `adaptkit.report/1` keys may be added, so readers ignore those they do not know; none goes, none changes its
meaning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"

Bounds = Annotated[list[float], Field(min_length=2, max_length=2, description="lower and upper end, 95 %")]


class Value(BaseModel):
    """A measure: percent or a number, and its 95 % interval over images, if it has one."""

    value: float
    ci95: Bounds | None


class Change(BaseModel):
    """A paired difference, after minus before, with its 95 % interval over images."""

    value: float
    ci95: Bounds


class Probes(BaseModel):
    """By metric: knn_top1, linear_top1, retrieval_map, view_retrieval_top1 (percent), rankme, d_eff, r_eff, ..."""

    before: dict[str, Value] = Field(description="the original backbone on the report split")
    after: dict[str, Value] = Field(description="what was exported, on the same images")
    delta: dict[str, Change] = Field(description="only metrics whose difference has an interval")


class Selected(BaseModel):
    """The point of the run that was exported; step 0 and alpha 0 are the original."""

    step: int = Field(ge=0)
    alpha: float = Field(ge=0, le=1, description="between the original (0) and the teacher of that step (1)")


class Guard(BaseModel):
    """The veto of the report split, which chose nothing."""

    fired: bool
    delta: Change | None


class Candidate(BaseModel):
    """A backbone that could have been chosen, on the selection split."""

    step: int = Field(ge=0)
    alpha: float = Field(ge=0, le=1)
    value: float
    delta: Value


class Training(BaseModel):
    """How training went."""

    steps: int = Field(ge=0)
    epochs: float = Field(ge=0)
    stopped: str | None = Field(description="why it ended early, after a collapse")
    head_redraws_after_collapse: int = Field(ge=0)
    last: dict[str, float | None] = Field(description="the last line of metrics.jsonl; null is not finite")


class BackboneFacts(BaseModel):
    """The original backbone."""

    name: str
    architecture: str = Field(description="of timm; empty for a class of your own")
    readout: str
    embed_dim: int = Field(ge=1)
    image_px: int = Field(ge=1)
    sha256: str | None = Field(description="of the weights' file")
    source: str | None = Field(description="the weights' file")


class LabelFacts(BaseModel):
    """The labelled images."""

    path: str
    num_classes: int = Field(ge=1)
    gallery: int = Field(ge=0)
    selection: int = Field(ge=0)
    report: int = Field(ge=0)
    without_gallery: int = Field(ge=0, description="queries left out: no image of their class is in the gallery")
    fingerprint: str


class DataFacts(BaseModel):
    """The target images: how many there are and what each was used for."""

    path: str
    num_images: int = Field(ge=0)
    train: int = Field(ge=0)
    selection: int = Field(ge=0)
    report: int = Field(ge=0)
    left_out: int = Field(ge=0, description="labelled images that were kept out of training")
    fingerprint: str = Field(description="of paths and sizes")
    labels: LabelFacts | None
    bad_images: int = Field(ge=0)


class Throughput(BaseModel):
    """Of the training steps."""

    images_per_second: float | None
    data_wait_percent: float | None
    compile_seconds: float | None
    device: str
    precision: str
    num_processes: int = Field(ge=1)


class RequiredGain(BaseModel):
    """What `--require-gain` asked for and what became of it."""

    metric: str
    points: float
    lower: float | None = Field(description="lower end of the interval; null: no interval")
    met: bool


class Report(BaseModel):
    """The result of a finished run of adaptkit."""

    schema_: Literal["adaptkit.report/1"] = Field(alias="schema")
    verdict: Literal["improved", "unchanged", "kept_original", "collapsed"]
    evidence: Literal["labels", "label_free"]
    primary_metric: str
    message: str = Field(description="the verdict in one sentence")
    probes: Probes
    selected: Selected
    guard: Guard
    selection_metric: str
    candidates: list[Candidate]
    training: Training
    backbone: BackboneFacts
    data: DataFacts
    recipe: dict[str, Any] = Field(description="fully resolved; see `adaptkit recipes --schema`")
    throughput: Throughput
    files: dict[str, str] = Field(description="relative to the run directory")
    timings: dict[str, float] = Field(description="seconds by phase, and their total")
    require_gain: RequiredGain | None


def report_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json`."""
    return {"$schema": SCHEMA_URI, "$id": "adaptkit.report/1", **Report.model_json_schema(by_alias=True)}
