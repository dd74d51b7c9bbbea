"""The groups of settings a recipe is made of: types, defaults and descriptions, each in one place.

All are frozen and refuse unknown keys. `recipe.py` puts them together and reads them from YAML and `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic import model_validator as pydantic_model_validator
from pydantic.fields import FieldInfo

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(%|epochs?|steps?|images?)")
TUNE = re.compile(r"full|lora|last-([1-9]\d{0,3})-blocks")
TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
SHARE = re.compile(r"\d+(\.\d+)?%?")

# Far beyond any use; a slip of the finger or a forged recipe must not hang or fill the memory.
MAX_STEPS = 100_000_000
MAX_EPOCHS = 1_000_000
MAX_COUNT = 1_000_000  # images at once, outputs of a layer
MAX_CROPS = 1_000  # of one kind, per image
MAX_WORKERS = 1_024
MAX_PX = 4_096
MAX_AMOUNT = 1_000_000_000_000  # of a duration, in its unit


def _check_duration(text: str) -> str:
    match = DURATION.fullmatch(text)
    if text != "never" and match is None:
        raise ValueError("write 'never' or a number with a unit, as in 25%, 2 epochs, 500 steps, 10000 images")
    if match and float(match[1]) > MAX_AMOUNT:
        raise ValueError(f"the number must be at most {MAX_AMOUNT}; for not at all write 'never'")
    return text


def check_budget(text: str | None) -> str | None:
    if text is not None and not (TIME.fullmatch(text) and 0 < budget_seconds(text) <= MAX_AMOUNT):
        raise ValueError("write a time with its unit, as in 90s, 30m, 2h")
    return text


def budget_seconds(text: str) -> float:
    """`30m` -> 1800. Raises ValueError for anything else."""
    match = TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _check_tune(text: str) -> str:
    if TUNE.fullmatch(text) is None:
        raise ValueError("write full, lora, or last-N-blocks with a number, as in last-4-blocks")
    return text


def none_from_text(value: object) -> object:
    return None if value in ("null", "none", "None", "~", "") else value


def _check_share(text: str) -> str:
    if SHARE.fullmatch(text) is None:
        raise ValueError("write a number or a share, as in 12 or 1%")
    return text


def _several(value: object) -> object:
    """One text or none as a tuple of texts."""
    value = none_from_text(value) if isinstance(value, str) else value
    return () if value is None else (value,) if isinstance(value, str) else value


def names_from_text(value: object) -> object:
    """`a,b`, or several such -> a, b; each once."""
    value = _several(value)
    if not isinstance(value, list | tuple):
        return value
    names = [part.strip() for each in value for part in (each.split(",") if isinstance(each, str) else [each])]
    return tuple(dict.fromkeys(names))


def path_from_text(value: object) -> object:
    return value if isinstance(value, Mapping | BaseModel) else {"path": value}


def in_schema(**changes: object) -> FieldInfo:
    """For editors: what the JSON Schema says beyond the type. Validation itself is the validators' alone."""
    info: FieldInfo = Field(json_schema_extra=changes)  # type: ignore[arg-type]
    return info


Tune = Annotated[str, AfterValidator(_check_tune), in_schema(pattern=f"^({TUNE.pattern})$")]

Duration = Annotated[str, AfterValidator(_check_duration), in_schema(pattern=f"^(never|{DURATION.pattern})$")]
"""`never`, or a share of the run (`25%`), `epochs`, `steps` or `images`; `schedules.to_steps` converts."""


Probability = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SETTINGS_OF = {  # those of ObjectiveSettings that not every objective has
    "num_bits": ("bits",),
    "beta": ("bits",),
    "rate_target": ("bits",),
    "eps": ("bits", "simdino"),
    "centre": ("bits",),
    "balance": ("bits",),
    "output_dim": ("simdino", "dino"),
    "num_prototypes": ("dino",),
    "final_teacher_temperature": ("dino",),
}


class ObjectiveSettings(Settings):
    """What is learnt: BITS (arXiv 2602.09764), or a continuous baseline, SimDINO (2502.10385) or DINO (2104.14294)."""

    name: Literal["bits", "simdino", "dino"] = Field("bits", description="training objective")
    num_bits: int = Field(256, ge=2, le=MAX_COUNT, description="bits: bits of the code (B)")
    hidden_dim: int = Field(2048, ge=1, le=MAX_COUNT, description="width of the projection head's two hidden layers")
    beta: float = Field(0.1, ge=0, description="bits: weight of the coding rate")
    rate_target: Annotated[float | None, BeforeValidator(none_from_text)] = Field(
        0.4,
        gt=0,
        lt=1,
        description="bits: share of the largest possible coding rate at which its weight is beta; more below, less "
        "above; null: always beta",
    )
    eps: float = Field(0.5, gt=0, description="bits, simdino: distortion of the coding rate")
    centre: bool = Field(True, description="bits: subtract the batch mean from the logits in the coding rate")
    balance: Literal["never", "draw", "always"] = Field(
        "always",
        description="bits: keep the teacher's bits half 0 and half 1, at every draw of the head or at every step",
    )
    output_dim: int = Field(
        256, ge=2, le=MAX_COUNT, description="simdino: outputs of the head; dino: width before the prototypes"
    )
    num_prototypes: int = Field(
        4096, ge=2, le=MAX_COUNT, description="dino: outputs of the head; the paper's 65536 are for millions of images"
    )
    final_teacher_temperature: float = Field(
        0.04, gt=0, description="dino: reached from 0.04 over the first 30 % of the run; 0.07 is for long ones"
    )

    @pydantic_model_validator(mode="after")
    def _settings_belong_to_the_objective(self) -> ObjectiveSettings:
        """A recipe that was written out names every setting, so only a value that is not the default is an error."""
        for key, users in SETTINGS_OF.items():
            if self.name not in users and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is a setting of {' and '.join(users)}, not of {self.name}")
        return self


class HeadSettings(Settings):
    """When the projection head is drawn anew, and how long it trains alone afterwards."""

    reset_every: Duration = Field("25%", description="draw the head anew this often")
    min_steps: int = Field(1, ge=1, description="a head trains at least this many steps, the last one too")
    warmup: Duration = Field("5%", description="backbone frozen this long after every draw")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the projection head")


class ViewSettings(Settings):
    """What a view is: crops and flips in the workers, photometrics on the device."""

    num_global: int = Field(2, ge=2, le=MAX_CROPS, description="global crops per image")
    num_local: int = Field(6, ge=0, le=MAX_CROPS, description="local crops per image")
    local_ratio: float = Field(96 / 224, gt=0, le=1, description="local crop side / global crop side")
    global_scale: tuple[float, float] = Field((0.4, 1.0), description="area share of a global crop")
    local_scale: tuple[float, float] = Field((0.05, 0.4), description="area share of a local crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    vflip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    jitter: float = Field(0.8, ge=0, le=1, description="probability of colour jitter")
    brightness: float = Field(0.2, ge=0, le=1, description="jitter strength")
    contrast: float = Field(0.2, ge=0, le=1, description="jitter strength")
    saturation: float = Field(0.1, ge=0, le=1, description="jitter strength")
    hue: float = Field(0.02, ge=0, le=0.5, description="jitter strength, in turns of the colour circle")
    grey: float = Field(0.05, ge=0, le=1, description="probability of a grey view")
    blur: tuple[Probability, Probability, Probability] = Field(
        (0.5, 0.1, 0.3), description="probability of blur: first global, further global, local crops"
    )
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="blur in pixels at 224 px crops")
    solarize: float = Field(0.0, ge=0, le=1, description="probability of solarising the second global crop")

    @pydantic_model_validator(mode="after")
    def _ranges_are_ordered(self) -> ViewSettings:
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name != "blur_sigma" and high > 1):
                raise ValueError(f"{name} must be a range 0 < low <= high{'' if name == 'blur_sigma' else ' <= 1'}")
        return self


class OptimSettings(Settings):
    """AdamW with layer-wise decay of the learning rate and a cosine or an infinite schedule (arXiv 2503.02844).

    To adapt an adapted backbone again at the constant rate, with no second rise to the peak: `schedule: infinite`,
    `warmup: never`, `constant_lr: 1`, and from the first run `lr * constant_lr` as `lr`, `final_lr / constant_lr` as
    `final_lr`. The head then keeps `head.lr` until the annealing.
    """

    schedule: Literal["cosine", "infinite"] = Field(
        "cosine",
        description="after the warm-up: cosine to final_lr; or cosine to constant_lr over 30 % of the run, constant, "
        "and over the last 20 % an exponential decay to final_lr",
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate of the backbone's last layer")
    final_lr: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    constant_lr: float = Field(
        0.5, gt=0, le=1, description="infinite: learning rate of the constant phase, as a share of the peak"
    )
    warmup: Duration = Field("10%", description="linear warm-up of the learning rate")
    layer_decay: float = Field(0.75, gt=0, le=1, description="learning rate factor per layer towards the input")
    weight_decay: float = Field(0.04, ge=0, description="AdamW weight decay at the start")
    final_weight_decay: float = Field(0.04, ge=0, description="AdamW weight decay at the end")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")

    @pydantic_model_validator(mode="after")
    def _rates_suit_the_schedule(self) -> OptimSettings:
        if self.schedule == "cosine":
            if self.constant_lr != type(self).model_fields["constant_lr"].default:
                raise ValueError("constant_lr is a setting of schedule infinite, not of cosine")
        elif self.final_lr == 0:
            raise ValueError("final_lr must be above 0 with schedule infinite, whose decay to it is exponential")
        elif self.constant_lr < self.final_lr:
            raise ValueError(f"constant_lr {self.constant_lr} must lie in [final_lr, 1], here [{self.final_lr}, 1]")
        return self


class TeacherSettings(Settings):
    """The exponential moving average of the student."""

    momentum: Annotated[float | None, BeforeValidator(none_from_text)] = Field(
        None, ge=0, le=1, description="EMA momentum at the start; null: 1 - 10 / steps"
    )
    final_momentum: Annotated[float | None, BeforeValidator(none_from_text)] = Field(
        None, ge=0, le=1, description="EMA momentum at the end; null: 1 - 3 / steps"
    )


CACHE_WORDS = ("auto", "on", "off")


class DataSettings(Settings):
    """The images, which of them are held out, how deep pixels are read, and how many bad ones are accepted."""

    path: Annotated[tuple[str, ...], BeforeValidator(_several, json_schema_input_type=str | tuple[str, ...])] = Field(
        (),
        description="folder of images, a list of files (.txt, .csv), tar shards ('shards/{000..099}.tar'), Parquet "
        "files, or a URL (s3://bucket/images) of files or shards; repeatable",
    )
    split_by: Literal["file", "folder"] = Field("file", description="unit that is held out together")
    max_bad: Annotated[
        str, AfterValidator(_check_share), in_schema(type=["string", "number"], pattern=f"^{SHARE.pattern}$", minimum=0)
    ] = Field("1%", description="bad images accepted; at least 5 always are")
    scale: Literal["range", "percentile"] = Field(
        "range", description="pixels of more than 8 bits: by their type's range, or from their 1st to 99th percentile"
    )
    cache: str = Field(
        "auto",
        min_length=1,
        description="keep large images decoded small: off, on (in the run directory), a folder for several runs, "
        "or auto: on where decoding is slower than training",
    )

    @property
    def shown(self) -> str:
        """The paths in one line, for messages."""
        return ", ".join(self.path)


class ProbeSettings(Settings):
    """What is measured, how often, on how many images."""

    every: Duration = Field("25%", description="probe the teacher on the selection split this often")
    max_gallery: int = Field(5_000, ge=1, description="labelled gallery images used at most")
    max_queries: int = Field(4_000, ge=2, description="labelled query images used at most, both halves together")
    batch_size: int = Field(128, ge=1, le=MAX_COUNT, description="images per forward pass when embedding")


class SelectSettings(Settings):
    """How the checkpoint is chosen."""

    by: Literal["auto", "labels", "label-free"] = Field("auto", description="auto: labels when they are given")
    alphas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.25, 0.5, 0.75), description="points between original (0) and adapted (1), which are always candidates"
    )
    keep: int = Field(3, ge=1, description="candidate checkpoints kept on disk")
