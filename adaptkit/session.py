"""What training works on: the networks, the optimizer, and the state that a checkpoint holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adaptkit.backbones import Backbone, LoadReport
from adaptkit.backbones.build import is_vit
from adaptkit.checkpoints import load_tensors, pack_training, save_tensors, unpack_training_, with_prefix
from adaptkit.collapse import Channel
from adaptkit.distill import Branch, build_pair
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.meter import Meter
from adaptkit.microbatch import check_memory_settings, checkpoint_blocks_
from adaptkit.objectives import OBJECTIVES, Objective
from adaptkit.optimizer import build_optimizer, place_state_
from adaptkit.processes import on_main
from adaptkit.recipe import Recipe
from adaptkit.schedules import Plan
from adaptkit.shortage import shortage
from adaptkit.sources import FolderSource
from adaptkit.tuning import plan_tuning, sentence, tune_
from adaptkit.views import MultiCrop, photometric

PATIENCE = timedelta(hours=2)  # of processes whose main one looks through millions of files; a dead one is found sooner
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Reporter(Protocol):
    """Who tells the user what happens. The library itself never prints."""

    def phase(self, title: str) -> None:
        """A new part of the run begins."""

    def load_report(self, report: LoadReport) -> None:
        """How the weights matched."""

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """A line of the log."""

    def evaluation(self, step: int, metric: str, before: float, value: float, lower: float, upper: float) -> None:
        """The teacher on the selection split; `lower` and `upper` bound the paired difference."""

    def note(self, message: str) -> None:
        """Something the user should read."""


class Silent:
    """A reporter that says nothing."""

    def phase(self, title: str) -> None: ...

    def load_report(self, report: LoadReport) -> None: ...

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metric: str, before: float, value: float, lower: float, upper: float) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass
class TrainState:
    """Everything beside tensors that decides the future of a run."""

    step: int = 0
    last_draw: int = 0  # step of the head's last draw
    redraw_now: bool = False
    lr_factor: float = 1.0
    channel: Channel = field(default_factory=Channel)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    last_record: dict[str, float] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    wait: float = 0.0

    @classmethod
    def read(cls, file: Path, state: Mapping[str, Any]) -> tuple[TrainState, int]:
        """It and the steps since the last line of the log, of a checkpoint's JSON. Raises `DataError`."""
        try:
            train = state["train"]
            return cls(**(train | {"channel": Channel(**train["channel"])})), state["window_steps"]
        except (KeyError, TypeError):
            raise DataError(f"{file}: damaged checkpoint; start again with --overwrite") from None


@dataclass
class Session:
    """The working parts of a run. `wrapped` is the student as Accelerate prepared it; `student` the bare one."""

    accelerator: Accelerator
    plan: Plan
    source: FolderSource
    backbone: Backbone
    multicrop: MultiCrop
    objective: Objective
    student: Branch
    teacher: Branch
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    workers: int
    on_failures: Callable[[Iterable[tuple[str, str]]], None]
    note: Callable[[str], None]
    state: TrainState = field(default_factory=TrainState)
    photometric: Callable[..., Tensor] = photometric  # compiled or not
    compile_seconds: float | None = None  # None: nothing is compiled
    compile_tried: bool = False

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.plan.recipe

    def normalised(self, pixels: Tensor, factors: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 views and their (N, 8) factors on the device -> what the backbone takes, float32."""
        return self.photometric(pixels, factors, self.backbone.mean, self.backbone.std, self.multicrop.parts)

    def save(self, file: Path) -> None:
        """Write a checkpoint that decides the rest of the run; only the main process writes. Raises `MachineError`."""
        sums = {f"{meter_prefix(i)}{k}": v for i, share in enumerate(self.meter.shares()) for k, v in share.items()}

        def write() -> None:
            tensors = pack_training(self.student, self.teacher, self.optimizer) | sums
            tensors |= {f"objective.{name}": value for name, value in self.objective.state.items()}
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None  # fp16 only
            state = {"train": asdict(self.state), "window_steps": self.meter.num_steps, "scaler": scaler}
            save_tensors(file, tensors, state | {"recipe": self.recipe.model_dump(mode="json")})

        on_main(write)

    def restore(self, file: Path) -> None:
        """Go back to what `save` wrote. Raises `DataError` if the file is damaged or of another network."""
        tensors, state = load_tensors(file)
        self.state, window_steps = TrainState.read(file, state)
        self.optimizer.state.clear()
        unpack_training_(tensors, self.student, self.teacher, self.optimizer)
        place_state_(self.optimizer)
        if scaler := self.accelerator.scaler:
            # a step that was cut off may have unscaled its gradients: `update` forgets that, but wants a scale
            scaler.scale(torch.ones((), device=self.accelerator.device))
            scaler.update(scaler.get_scale())
            scaler.load_state_dict(state["scaler"])
        self.meter.restart()
        device = self.accelerator.device
        sums = with_prefix(tensors, meter_prefix(self.accelerator.process_index)) or with_prefix(tensors, "meter.")
        self.meter.sums = {name: value.to(device) for name, value in sums.items()}
        self.meter.num_steps = window_steps
        self.objective.state = {name: value.to(device) for name, value in with_prefix(tensors, "objective.").items()}


def meter_prefix(process: int) -> str:
    """Of a process's sums in a checkpoint; resumed with more processes, those that have none take the first one's."""
    return f"meter{process}." if process else "meter."


def open_session(
    accelerator: Accelerator,
    plan: Plan,
    source: FolderSource,
    original: Backbone,
    student: Backbone,
    workers: int,
    on_failures: Callable[[Iterable[tuple[str, str]]], None],
    note: Callable[[str], None] = lambda message: None,
) -> Session:
    """Build student and teacher from the original under one seed, so that all processes hold the same networks.

    `note` is told what the user should read.
    """
    recipe = plan.recipe
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, plan)
    side = local_px(original, recipe.views.local_ratio)
    check_views(original, side, recipe.views.num_local)
    check_memory_settings(recipe, student)
    if recipe.grad_checkpointing:
        checkpoint_blocks_(student.module)
    pair = tuned_pair(original, student, objective, recipe, note)
    student_branch, teacher = (branch.to(accelerator.device) for branch in pair)
    for branch in pair:
        if accelerator.device.type == "cpu":
            plain_attention_(branch)
        elif accelerator.device.type == "cuda" and not is_vit(original.module):
            channels_last_(branch.backbone)
    optimizer = build_optimizer(student_branch, plan)
    wrapped, prepared = accelerator.prepare(student_branch, optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.broadcast_buffers = False  # they are averaged; as an argument it is deprecated
    multicrop = MultiCrop(recipe.views, original.image_px, side)
    return Session(
        accelerator=accelerator,
        plan=plan,
        source=source,
        backbone=original,
        multicrop=multicrop,
        objective=objective,
        student=student_branch,
        teacher=teacher,
        wrapped=wrapped,
        optimizer=prepared,
        meter=Meter(accelerator, objective),
        workers=workers,
        on_failures=on_failures,
        note=note,
    )


def tuned_pair(
    original: Backbone, student: Backbone, objective: Objective, recipe: Recipe, note: Callable[[str], None]
) -> tuple[Branch, Branch]:
    """Student and teacher, in both of them the parameters that `recipe.tune` adds and freezes."""
    tuning, teacher = plan_tuning(student, recipe), original.clone()
    if recipe.tune != "full":
        note(sentence(tuning, student.module, recipe))
    for network in (student.module, teacher.module):
        tune_(network, tuning, recipe.seed)
    return build_pair(student.module, teacher.module, original.embed_dim, objective, recipe.seed)


@torch.no_grad()
def check_views(backbone: Backbone, side: int, num_local: int) -> None:
    """Refuse early if the backbone cannot take local crops. Raises `BackboneError`."""
    if num_local == 0 or side == backbone.image_px:
        return
    training, device = backbone.module.training, next(backbone.module.parameters()).device
    try:
        backbone.module.eval()(torch.zeros(1, 3, side, side, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if shortage(error):
            raise
        reason = " ".join(str(error).split())[:120]
        advice = "use --set views.local_ratio=1, or --set views.num_local=0"
        raise BackboneError(f"{backbone.name}: cannot take {side} px local crops ({reason}); {advice}") from None
    finally:
        backbone.module.train(training)


def plain_attention_(network: nn.Module) -> None:
    """Let timm's attention be plain matrix products.

    In bf16 on CPUs the fused kernel's backward pass makes a training step 1.2 to 1.4 times as long, for 17 tokens as
    for 197; in float32 the two differ by a tenth at most, either way.
    """
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  (an attribute of timm's, unknown to torch's types)


def channels_last_(network: nn.Module) -> None:
    """Lay the kernels of convolutions out as GPUs want them; on CPUs it gains nothing. Names and values stay."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def local_px(backbone: Backbone, ratio: float) -> int:
    """Side of a local crop: the ratio of the global side, rounded up to whole patches (96 px for 224 and patch 16)."""
    patch = getattr(getattr(backbone.module, "patch_embed", None), "patch_size", 8)
    patch = max(patch) if isinstance(patch, tuple | list) else patch
    return min(backbone.image_px, patch * -(-round(backbone.image_px * ratio) // patch))


def open_accelerator(precision: str) -> Accelerator:
    """Accelerate's engine in the asked precision. `auto`: bf16 where the CPU or GPU computes in it, else fp32."""
    AcceleratorState._reset_state(reset_partial_state=False)  # a second run in one process may differ in precision
    has_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if (torch.cuda.is_bf16_supported() if has_gpu else cpu_has_bf16()) else "fp32"
    if precision == "fp16" and not has_gpu:
        raise UsageError("precision fp16 needs a GPU; use --precision bf16 or fp32")
    # a warm-up leaves the backbone without gradients, which plain DDP does not expect
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return Accelerator(mixed_precision=PRECISIONS[precision], kwargs_handlers=handlers)


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16 or AMX); without them bf16 is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)
