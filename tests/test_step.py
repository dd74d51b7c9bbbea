"""What a training step costs beside its arithmetic: no waiting for the device, few kernels, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import adapt, assert_same_run, tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit import compiling
from adaptkit.backbones import load_backbone
from adaptkit.checkpoints import load_tensors
from adaptkit.distill import Branch, balance_head_, ema_update_
from adaptkit.embedding import embed
from adaptkit.errors import MachineError
from adaptkit.inputs import open_inputs
from adaptkit.loop import train_steps
from adaptkit.objectives import OBJECTIVES
from adaptkit.objectives.coding_rate import coding_rate
from adaptkit.objectives.head import ProjectionHead
from adaptkit.optimizer import place_state_
from adaptkit.recipe import load_recipe, overrides_of
from adaptkit.schedules import Plan
from adaptkit.session import Session, channels_last_, open_accelerator, open_session
from adaptkit.views import photometric
from adaptkit.views.photometric import _change_all

ALL_PARTS = frozenset({"jitter", "hue", "grey", "blur", "solarize"})
TORCHS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it where it only warns
NUM_GRAPHS = 5  # student and frozen student on global and local crops, teacher on global crops


def open_tiny(backbone: Path, images: Path, notes: list[str] | None = None, **changes: Any) -> Session:
    recipe = load_recipe(overrides=overrides_of(tiny(data=str(images), **changes)))
    inputs, original = open_inputs(recipe), load_backbone(str(backbone), drop_path=0.0)
    plan = Plan.make(recipe, len(inputs.train))
    accelerator = open_accelerator("fp32")
    note = (notes if notes is not None else []).append
    return open_session(accelerator, plan, inputs.train, original, original.clone(), 0, list, note)


def losses(session: Session, steps: int) -> list[float]:
    """The loss of every step."""
    found: list[float] = []

    def read(step: int) -> str | None:
        found.append(session.meter.read()["loss"])
        return "enough" if step == steps else None

    train_steps(session, read)
    return found


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any] | str) -> None:
    """torch.compile with another backend than its code generator."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    torch.compiler.reset()
    counters.clear()


class Copies(TorchDispatchMode):
    """Counts copies between devices that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].device != result.device
            and not kwargs.get("non_blocking")
        ):
            self.blocking.append(f"{args[0].device.type} -> {result.device.type}")
        return result


def test_photometrics_wait_for_no_copy() -> None:
    with FakeTensorMode(), Copies() as copies:
        views = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        photometric(views, torch.empty(4, 8, device="cuda"), (0.5,) * 3, (0.2,) * 3, ALL_PARTS)
        assert copies.blocking == []
        torch.tensor([1.0, 2.0], device="cuda")  # the check itself works
        views.cpu()
    assert copies.blocking == ["cpu -> cuda", "cuda -> cpu"]


def test_the_coding_rate_is_not_read_back() -> None:
    with FakeTensorMode(), Copies() as copies:
        rate = coding_rate(torch.empty(16, 8, device="cuda"))
    assert (rate.device.type, rate.shape, copies.blocking) == ("cuda", (), [])


@pytest.mark.parametrize("name", ["bits", "simdino", "dino"])
def test_no_objective_reads_a_value(name: str) -> None:
    recipe = load_recipe(overrides={"objective.name": name, "batch_size": 8})
    objective = OBJECTIVES[name](recipe.objective, Plan.make(recipe, 100))
    width = objective.build_head(6)(torch.empty(1, 6)).shape[1]
    with FakeTensorMode(), Copies() as copies:
        student, teacher = (torch.empty(views, 8, width, device="cuda") for views in (4, 2))
        objective.state = {key: torch.empty(value.shape, device="cuda") for key, value in objective.state.items()}
        result = objective(student, teacher, step=3)
        assert result.loss.device.type == "cuda"
        assert {value.device.type for value in result.report.values()} == {"cuda"}
        assert copies.blocking == []
        with pytest.raises(DataDependentOutputException):  # the check itself works
            bool(result.loss > 0)


def test_moving_the_teacher_reads_nothing() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        student, teacher = (
            Branch(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), ProjectionHead(6, 4, 8)) for _ in range(2)
        )
        logits = torch.empty(2, 8, 4)
        with Copies() as copies:
            ema_update_(teacher.requires_grad_(False), student, 0.9)
            balance_head_(student, teacher, logits, logits.flatten(0, 1).median(0).values, fresh=True)
    assert copies.blocking == []


def test_fused_adamw_and_a_gradient_scaler_skip_what_overflowed(vit: Path, images: Path) -> None:
    session = open_tiny(vit, images)
    optimizer, scaler = session.optimizer.optimizer, torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    weight = session.student.head.get_parameter("0.weight")
    assert all(group["fused"] for group in optimizer.param_groups)
    for factor, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        scaler.scale(weight.sum() * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weight) != moves
        assert weight.isfinite().all()
    assert scaler.get_scale() == 4.0


def test_restored_state_lies_as_its_parameter_does() -> None:
    parameter = nn.Parameter(torch.empty(4, 3, 2, 2, device="meta").to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([parameter], fused=False)
    for fused, device in ((False, "cpu"), (True, "meta")):
        optimizer.param_groups[0]["fused"] = fused
        optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(4, 3, 2, 2, device="meta")}
        place_state_(optimizer)
        state = optimizer.state[parameter]
        assert (state["step"].device.type, state["exp_avg"].stride()) == (device, parameter.stride())


def test_channels_last_changes_neither_the_training_nor_the_checkpoint(
    resnet: Path, images: Path, tmp_path: Path
) -> None:
    plain, other, restored = (open_tiny(resnet, images, steps=4) for _ in range(3))
    for session in (other, restored):
        for branch in (session.student, session.teacher):
            channels_last_(branch.backbone)
    kernel = next(p for p in other.student.backbone.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    assert not kernel.is_contiguous()
    assert losses(other, 2) == pytest.approx(losses(plain, 2), rel=1e-4)
    other.save(tmp_path / "two.safetensors")
    restored.restore(tmp_path / "two.safetensors")
    restored.save(tmp_path / "again.safetensors")
    first, second = (load_tensors(tmp_path / name)[0] for name in ("two.safetensors", "again.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(restored, 4) == losses(other, 4)
    for key, value in restored.student.state_dict().items():
        assert torch.equal(value, other.student.state_dict()[key]), key


@TORCHS_OWN
def test_compiled_blocks_share_their_graphs_and_nothing_else_changes(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "eager")
    notes: list[str] = []
    eager, session = open_tiny(vit, images, compile="off"), open_tiny(vit, images, notes, compile="on")
    names, before = list(session.student.state_dict()), {k: v.clone() for k, v in session.student.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    seconds = compiling.compile_backbones(session, "on")
    assert torch.equal(torch.rand(2), expected)
    assert seconds is not None
    assert session.compile_seconds == seconds
    assert notes == [f"compiled in {seconds:.0f} s"]
    assert counters["stats"]["unique_graphs"] == NUM_GRAPHS
    assert all(torch.equal(value, before[name]) for name, value in session.student.state_dict().items())
    assert all(parameter.grad is None for parameter in session.student.parameters())
    assert losses(session, 3) == losses(eager, 3)
    assert counters["stats"]["unique_graphs"] == NUM_GRAPHS
    assert list(session.student.state_dict()) == names


@TORCHS_OWN
def test_embedding_with_a_compiled_teacher_is_eager(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "eager")
    session = open_tiny(vit, images)
    expected = embed(session.backbone, session.source.subset(torch.arange(10).numpy()), batch_size=3)
    compiling.compile_backbones(session, "on")
    session.backbone.module = session.teacher.backbone
    source = session.source.subset(torch.arange(10).numpy())
    for backbone in (session.backbone, session.backbone.clone()):
        torch.testing.assert_close(embed(backbone, source, batch_size=3).vectors, expected.vectors)
    assert counters["stats"]["unique_graphs"] == NUM_GRAPHS


@pytest.mark.slow
@TORCHS_OWN
def test_a_compiled_run_hands_over_what_an_eager_one_does(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "eager")
    reports = [adapt(vit, images, tmp_path / word, steps=2, compile=word).report for word in ("off", "on")]
    seconds = [report["throughput"]["compile_seconds"] for report in reports]
    assert seconds[0] is None
    assert seconds[1] > 0
    assert_same_run(tmp_path / "off", tmp_path / "on")


def broken(graph: Any, inputs: Any) -> Any:
    raise OSError("no C++ compiler\nsee the manual")


@TORCHS_OWN
def test_a_compiler_that_fails_is_done_without_or_is_an_error(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, broken)
    notes: list[str] = []
    session, eager = open_tiny(vit, images, notes, compile="on"), open_tiny(vit, images, compile="off")
    with pytest.raises(
        MachineError, match=r"^torch.compile failed here \(.*no C\+\+ compiler see.*; use --compile off$"
    ):
        train_steps(session, lambda step: None)
    session = open_tiny(vit, images, notes)
    monkeypatch.setattr(compiling, "_is_worth_it", lambda s, setting: True)  # auto compiles on GPUs only
    assert losses(session, 2) == losses(eager, 2)
    assert session.compile_seconds is None
    assert [note.endswith("training goes on without it") for note in notes] == [True]


@pytest.mark.parametrize(
    ("changes", "setting"), [({}, "off"), ({}, "auto"), ({"steps": 600}, "auto"), ({"head__warmup": "100%"}, "on")]
)
def test_what_is_not_worth_compiling_stays_eager(
    vit: Path, images: Path, changes: dict[str, Any], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, broken)
    assert compiling.compile_backbones(open_tiny(vit, images, **changes), setting) is None


def test_batchnorm_is_not_compiled(resnet: Path, images: Path) -> None:
    notes: list[str] = []
    assert compiling.compile_backbones(open_tiny(resnet, images, notes), "on") is None
    assert len(notes) == 1
    assert "not compiled" in notes[0]


def test_photometrics_are_one_graph() -> None:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (4, 3, 20, 24), generator=generator).byte()
    factors = torch.rand(4, 8, generator=generator)
    scaled = (views / 255, factors, ALL_PARTS)
    changed: Callable[..., Tensor] = torch.compile(_change_all, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(changed(*scaled), _change_all(*scaled))
    whole: Callable[..., Tensor] = torch.compile(photometric, backend="eager", fullgraph=True, dynamic=False)
    on_device = (views.to("meta"), factors.to("meta"))  # any but the CPU, which goes view by view
    assert whole(*on_device, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), ALL_PARTS).shape == views.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the code generator's own
def test_compiled_training_has_the_losses_of_eager(vit: Path, images: Path) -> None:
    torch.compiler.reset()
    eager, session = (open_tiny(vit, images, compile=word) for word in ("off", "on"))
    assert losses(session, 3) == pytest.approx(losses(eager, 3), abs=1e-4)
    assert session.compile_seconds is not None
    assert list(session.student.state_dict()) == list(eager.student.state_dict())
