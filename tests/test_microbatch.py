"""Large backbones on small memory: parts of the batch, activations computed twice, fewer images where memory ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_processes import launch, length
from test_step import TORCHS_OWN, open_tiny, use_backend
from tiny_runs import ROOT, Recorder, SignalAt, adapt, assert_same_run, environment, flags, log, read, tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters

import adaptkit
from adaptkit.backbones import load_backbone
from adaptkit.cli.failure import describe
from adaptkit.collapse import RANK, LastInput
from adaptkit.distill import Branch
from adaptkit.errors import BackboneError, DeviceMemoryError, Interrupted, MachineError, UsageError
from adaptkit.estimate import Passes, StepCost, fit_budget, time_steps
from adaptkit.inputs import open_inputs
from adaptkit.loop import train_steps
from adaptkit.memory import train_in_memory
from adaptkit.microbatch import checkpoint_blocks_, embed_in_parts
from adaptkit.objectives.head import ProjectionHead
from adaptkit.preflight.story import check_recipe
from adaptkit.recipe import load_recipe, overrides_of
from adaptkit.schedules import Plan
from adaptkit.session import Session, open_accelerator

pytestmark = pytest.mark.long

CONTINUOUS = {"objective__num_bits": 256, "objective__output_dim": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bits": {},
    "simdino": CONTINUOUS | {"objective__name": "simdino"},
    "dino": CONTINUOUS | {"objective__name": "dino", "objective__num_prototypes": 24},
}
N = 6  # images of `views_of`


def branch_of(drop_path: float = 0.0) -> Branch:
    backbone = load_backbone("test_vit", pretrained=False, image_px=32, drop_path=drop_path, seed=1).module
    torch.manual_seed(0)
    return Branch(backbone, ProjectionHead(64, 8, 16)).train()


def views_of() -> list[Tensor]:
    """Two global views of 32 px and three local ones of 16 px of N images, view-major."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * N, 3, 32, 32, generator=generator), torch.randn(3 * N, 3, 16, 16, generator=generator)]


def gradients(branch: Branch, micro_batch: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Of a loss that mixes all rows, at every parameter."""
    branch.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = branch(views_of(), N, micro_batch=micro_batch).flatten(0, 1)
    torch.logdet(torch.eye(8) + logits.T @ logits).backward()
    return torch.cat([p.grad.flatten() for p in branch.parameters() if p.grad is not None])


class Counting(nn.Module):
    """Notes how many rows go through it, and whether with gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.rows.append((len(images), torch.is_grad_enabled()))
        embeddings: Tensor = self.network(images)
        return embeddings


class Full(nn.Module):
    """A device that holds the activations of `limit` rows, or fewer once `room` is taken from all of its class."""

    room = 1_000

    def __init__(self, limit: int = 1_000, batchnorm: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.limit = limit
        self.kernel = nn.Parameter(0.3 * torch.randn(12, 3, 4, 4, generator=generator))
        self.weight = nn.Parameter(0.3 * torch.randn(12, 12, generator=generator))
        self.norm = nn.BatchNorm2d(12) if batchnorm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(images) > min(self.limit, self.room):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        maps = self.norm(nn.functional.conv2d(images, self.kernel, stride=4)).relu()
        return maps.mean((2, 3)) @ self.weight


class Shared(Full):
    """Another program takes room in the middle of a run."""


class Insatiable(Full):
    """Asks this machine for more memory than any has, once it is trained."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            torch.empty(1 << 55)
        return super().forward(images)


def adapt_module(module: nn.Module, data: Path, output: Path, **changes: Any) -> adaptkit.AdaptResult:
    reporter, backbone = changes.pop("reporter", None), load_backbone(module, image_px=32)
    return adaptkit.adapt(backbone, data, output=output, reporter=reporter, **tiny(**changes))


def each_step(session: Session, steps: int) -> Iterator[tuple[float, Tensor]]:
    """The loss and the student's parameters after every step."""
    found: list[tuple[float, Tensor]] = []

    def note(step: int) -> str | None:
        parameters = [parameter.detach().flatten() for parameter in session.student.parameters()]
        found.append((session.meter.read()["loss"], torch.cat(parameters)))
        return "enough" if step == steps else None

    train_steps(session, note)
    yield from found


# --- the same gradients


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_gradients_of_parts_are_those_of_the_whole_batch(micro_batch: int) -> None:
    branch = branch_of()
    torch.testing.assert_close(gradients(branch, micro_batch), gradients(branch, None), rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients(branch, N), gradients(branch, None))  # no part, and nothing computed twice


def test_only_one_part_at_a_time_keeps_its_activations() -> None:
    branch = branch_of()
    branch.backbone = counting = Counting(branch.backbone)
    gradients(branch, 4)
    sizes = [8, 4, 12, 6]  # 2 global and 3 local views of 4 images, then of 2
    assert counting.rows == [(size, False) for size in sizes] + [(size, True) for size in sizes]
    counting.rows.clear()
    branch(views_of(), N, True, 4)
    assert counting.rows == [(size, False) for size in sizes]


def test_what_a_forward_pass_saves_does_not_grow_with_the_backbone() -> None:
    saved = {}
    for micro_batch in (None, 2):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            branch_of()(views_of(), N, micro_batch=micro_batch)
        saved[micro_batch] = sum(sizes)
    assert saved[2] < 0.05 * saved[None]


def test_drop_path_draws_the_same_paths_twice() -> None:
    """Against the same parts with their activations kept, from the same seeds."""
    branch = branch_of(drop_path=0.5)
    views, weights = views_of()[:1], torch.randn(2 * N, 64, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    (embed_in_parts(branch.backbone, views, N, 4) * weights).sum().backward()
    found = [parameter.grad for parameter in branch.backbone.parameters()]
    branch.zero_grad()
    torch.manual_seed(7)
    seeds, rows = torch.randint(2**62, (2,)).tolist(), []
    for seed, part in zip(seeds, views[0].split([8, 4]), strict=True):
        torch.manual_seed(seed)
        rows.append(branch.backbone(part))
    (torch.cat(rows) * weights).sum().backward()
    for mine, parameter in zip(found, branch.backbone.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-6)


def test_bf16_loses_no_more_in_parts() -> None:
    branch = branch_of()
    exact = gradients(branch, None)
    whole, parts = (length([gradients(branch, size, torch.bfloat16) - exact]) for size in (None, 1))
    assert 0 < whole < 0.1 * length([exact])
    assert parts < 1.2 * whole


def test_no_cast_without_gradient_is_used_again() -> None:
    """Autocast keeps casts of weights; those of a pass without gradient would leave the weights without one."""
    branch = branch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch(views_of(), N, micro_batch=4).square().sum().backward()
    found = {name: parameter.grad for name, parameter in branch.backbone.named_parameters()}
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []


def test_two_parameters_with_one_gradient_do_not_add_up_twice() -> None:
    """`a + b` hands the same tensor to both."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def forward(self, images: Tensor) -> Tensor:
            return (self.a + self.b).expand(len(images), 3) * images.mean((1, 2, 3))[:, None]

    network = Sum()
    embed_in_parts(network, [torch.ones(4, 3, 2, 2)], 4, 1).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [4.0] * 3


def test_a_parameter_that_only_some_parts_use() -> None:
    """Such as one for large images, which come first."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))[:, None] * (self.large if images.shape[-1] > 2 else self.small)

    network = Sizes()
    embed_in_parts(network, [torch.ones(4, 3, 4, 4), torch.ones(6, 3, 2, 2)], 2, 1).sum().backward()
    assert [float(parameter.grad or 0) for parameter in network.parameters()] == [4, 6]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("setting", [{"micro_batch": 3}, {"micro_batch": 3, "grad_checkpointing": True}], ids=str)
def test_training_in_parts_is_training(name: str, setting: dict[str, Any], vit: Path, images: Path) -> None:
    """Five steps, a warm-up and a second head among them."""
    changes = OBJECTIVES[name] | {"head__reset_every": "3 steps", "steps": 5, "optim__lr": 1e-3}
    whole, parts = open_tiny(vit, images, **changes), open_tiny(vit, images, **changes, **setting)
    start = torch.cat([parameter.detach().flatten() for parameter in whole.student.parameters()])
    for (loss, weights), (its_loss, its_weights) in zip(each_step(whole, 5), each_step(parts, 5), strict=True):
        assert its_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
        # not entry by entry: where a gradient is nearly 0, Adam turns a difference of rounding into one of direction
        assert length([its_weights - weights]) < 2e-3 * length([weights - start])
    for key, value in whole.objective.state.items():
        torch.testing.assert_close(parts.objective.state[key], value, rtol=1e-4, atol=1e-5)


def test_a_gradient_scaler_scales_once(vit: Path, images: Path) -> None:
    session, found = open_tiny(vit, images), []
    for factor, micro_batch in ((1.0, None), (512.0, 4)):
        session.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor)  # type: ignore[attr-defined]
        logits = session.student(views_of()[:1], N, micro_batch=micro_batch)
        session.accelerator.backward(logits.square().mean())
        found.append(torch.cat([p.grad.flatten() for p in session.student.parameters() if p.grad is not None]))
        session.student.zero_grad()
    torch.testing.assert_close(found[1] / 512, found[0], rtol=1e-4, atol=1e-7)


# --- activations computed twice


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointed_blocks_have_the_same_gradients(drop_path: float) -> None:
    branch = branch_of(drop_path)
    kept = gradients(branch, None)
    passes: list[bool] = []
    branch.backbone.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: passes.append(True))
    assert checkpoint_blocks_(branch.backbone)
    torch.testing.assert_close(gradients(branch, None), kept, rtol=1e-6, atol=1e-7)
    assert len(passes) == 4  # two sizes, forward and again


def test_checkpointing_moves_the_statistics_of_batchnorm_once(resnet: Path, images: Path) -> None:
    plain, twice = (open_tiny(resnet, images, steps=3, grad_checkpointing=on) for on in (False, True))
    passes: list[bool] = []
    twice.student.backbone.get_submodule("layer1.0").register_forward_pre_hook(lambda *_: passes.append(True))
    for (loss, _), (its_loss, _) in zip(each_step(plain, 3), each_step(twice, 3), strict=True):
        assert its_loss == pytest.approx(loss, rel=1e-5)
    assert len(passes) == 2 + 2 * 4  # a frozen step, then two with both sizes, forward and again
    theirs = dict(twice.teacher.named_buffers())
    for name, buffer in plain.teacher.named_buffers():
        torch.testing.assert_close(theirs[name], buffer, rtol=1e-5, atol=1e-6)


def test_what_a_backbone_does_not_allow_is_said_before_the_first_step(
    resnet: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^micro_batch 4: the BatchNorm of .*; instead use --set grad_checkpointing="):
        adapt(resnet, images, tmp_path / "run", micro_batch=4)
    with pytest.raises(UsageError, match=r"instead use a --batch-size below 8, fewer views\.num_local or a smaller"):
        adapt_module(Full(batchnorm=True), images, tmp_path / "own bn", micro_batch=4)
    with pytest.raises(BackboneError, match=r"^module:Full: knows no grad_checkpointing .*; instead use --set micro_"):
        adapt_module(Full(), images, tmp_path / "own", grad_checkpointing=True)
    assert not list(tmp_path.rglob("checkpoints"))


# --- fewer images where memory ends


def test_a_run_goes_on_with_as_many_images_as_fit(images: Path, tmp_path: Path) -> None:
    """8 images have 16 views of each size; 5 rows fit, so 2 images do. Also after an interruption."""
    told, again = SignalAt(4), Recorder()
    with pytest.raises(Interrupted):
        adapt_module(Full(5), images, tmp_path / "run", reporter=told)
    assert told.notes == [
        "out of memory with 8 images at once; going on with 4",
        "out of memory with 4 images at once; going on with 2",
    ]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").micro_batch == 2
    adaptkit.resume(tmp_path / "run", backbone=load_backbone(Full(5), image_px=32), reporter=again)
    assert again.notes == []
    asked = adapt_module(Full(5), images, tmp_path / "asked", micro_batch=2).run
    assert_same_run(tmp_path / "run", asked)
    assert read(tmp_path / "run", "report.json")["recipe"]["micro_batch"] == 2
    assert all(RANK in line for line in log(asked) if line["kind"] == "train")  # one part has too few views for it


def test_memory_that_ends_in_the_middle_of_a_run(images: Path, tmp_path: Path) -> None:
    """Back to the last checkpoint: no line of the log comes twice, and what was learnt is kept."""

    class Other(Recorder):
        def training(self, step: int, total_steps: int, metrics: Any) -> None:
            super().training(step, total_steps, metrics)
            Shared.room = 4 if step >= 4 else 1_000

    told, changes = Other(), {"checkpoint_every": "3 steps", "log_every": 1, "probe__every": "never"}
    adapt_module(Shared(), images, tmp_path / "run", reporter=told, select__alphas=[], **changes)
    assert [note[-1] for note in told.notes] == ["4", "2"]
    assert told.steps == [1, 2, 3, 4, 4, 5, 6]
    assert read(tmp_path / "run", "report.json")["recipe"]["micro_batch"] == 2
    assert [line["step"] for line in log(tmp_path / "run") if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Full(1), r"^out of memory with 1 image at once; use a --batch-size below 8, fewer views\.num_local or a"),
        (Full(9, batchnorm=True), r"^out of memory with 8 images at once; use a --batch-size below 8"),
    ],
    ids=["one image", "batchnorm"],
)
def test_memory_that_does_not_suffice(module: nn.Module, words: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceMemoryError, match=words) as raised:
        adapt_module(module, images, tmp_path / "run")
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 7, str(raised.value))


def test_timing_finds_how_many_images_fit(images: Path) -> None:
    recipe = load_recipe(overrides=overrides_of(tiny(data=str(images))))
    inputs = open_inputs(recipe)
    for limit, micro_batch in ((1_000, None), (9, 4)):
        backbone = load_backbone(Full(limit), image_px=32)
        cost = time_steps(open_accelerator("fp32"), recipe, inputs, backbone, workers=0, timed=2)
        assert cost.micro_batch == micro_batch
        assert cost.seconds > 0


def test_a_budget_keeps_what_timing_found() -> None:
    plan = Plan.make(load_recipe(overrides={"steps": 100, "budget": "10m"}), 1_000)
    fitted = fit_budget(plan, 1_000, Passes(10, 10, 10), StepCost(0.1, 0, micro_batch=4), 0.0, 0.0)
    assert (fitted.recipe.micro_batch, fitted.recipe.budget) == (4, None)


def test_a_machine_without_memory_is_no_internal_error(images: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="the machine ran out of memory; use --set micro_batch=N") as raised:
        adapt_module(Insatiable(), images, tmp_path / "run")
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 8, str(raised.value))
    assert raised.value.__context__ is not None
    assert describe(raised.value.__context__).exit_code == 8


def test_going_back_forgets_a_step_that_was_cut_off(vit: Path, images: Path, tmp_path: Path) -> None:
    """fp16's scaler refuses to unscale twice."""
    session = open_tiny(vit, images)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
    session.accelerator.scaler = scaler
    session.save(tmp_path / "last.safetensors")
    for _ in range(2):
        session.restore(tmp_path / "last.safetensors")
        assert scaler.get_scale() == 64.0
        scaler.scale(session.student.head.get_parameter("0.weight").sum()).backward()
        scaler.unscale_(session.optimizer.optimizer)


# --- what else looks at a step


def test_the_detector_sees_the_whole_batch(vit: Path, images: Path) -> None:
    seen: list[Tensor] = []
    for micro_batch in (None, 1):
        session = open_tiny(vit, images, micro_batch=micro_batch)
        watched = LastInput(session.teacher.head)
        train_steps(session, lambda step: "enough")
        assert watched.rows is not None
        seen.append(watched.rows)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert len(seen[0]) == 2 * 8


def test_a_forecast_of_several_processes_ends_as_they_would(images: Path) -> None:
    """One process takes fewer images at once by itself, one of several cannot."""
    settings = tiny(backbone="module:Full", data=str(images), image_px=32)
    recipe = load_recipe(overrides={key.replace("__", "."): value for key, value in settings.items()})
    alone = check_recipe(recipe, Recorder(), 1, Full(limit=4))
    assert alone.error is None
    assert alone.document["plan"]["images_at_once"] == 2
    shared = check_recipe(recipe, Recorder(), 2, Full(limit=4))
    assert isinstance(shared.error, DeviceMemoryError)
    assert "with 4 images at once in each of 2 processes; use --set micro_batch=2, a --batch-size" in str(shared.error)


@TORCHS_OWN
def test_parts_of_both_sizes_are_compiled_before_the_first_step(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again, when memory ends and the parts become smaller."""
    use_backend(monkeypatch, "eager")
    session, notes, graphs = open_tiny(vit, images, compile="on", micro_batch=6), [], []

    def note(message: str) -> None:
        notes.append(message.split()[0])
        graphs.append(counters["stats"]["unique_graphs"])

    def after_step(step: int) -> str | None:
        if step == 2 and notes == ["compiled"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "enough" if step == 4 else None

    session.note = note
    assert train_in_memory(session, after_step, lambda: None) == "enough"
    assert notes == ["compiled", "out", "compiled"]
    assert graphs[0] == graphs[1] < graphs[2] == counters["stats"]["unique_graphs"]


# --- several processes, and the benchmark


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"micro_batch": 3}, {"grad_checkpointing": True}], ids=str)
def test_two_processes_in_parts_train_as_one(setting: dict[str, Any], vit: Path, images: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "optim.lr": 1e-3, "head.reset_every": "50%"}
    options = ["--backbone", vit, "--data", images, "--output", tmp_path / "two", *flags(settings | setting), "--quiet"]
    done = launch("adapt", *options)
    assert done.returncode == 0, done.stderr
    one = adapt(vit, images, tmp_path / "one", **{key.replace(".", "__"): value for key, value in settings.items()}).run
    for mine, theirs in zip(log(one), log(tmp_path / "two"), strict=True):
        for key in ("loss", "bce", "coding_rate", "grad_norm"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
    original = load_file(vit / "model.safetensors")
    first, second = (load_file(run / "checkpoints" / "last.safetensors") for run in (one, tmp_path / "two"))
    names = {name: f"student.backbone.{name}" for name in original}
    moved = length([first[key] - original[name] for name, key in names.items()])
    assert length([first[key] - second[key] for key in names.values()]) < 1e-3 * moved


OUT_OF_MEMORY = """
import sys
import adaptkit
from adaptkit.backbones import load_backbone
from adaptkit.errors import DeviceMemoryError
from test_microbatch import Full
from tiny_runs import tiny

try:
    adaptkit.adapt(load_backbone(Full(3), image_px=32), sys.argv[1], output=sys.argv[2], **tiny())
except DeviceMemoryError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_one_process_of_several_does_not_go_back_alone(images: Path, tmp_path: Path) -> None:
    """Each holds 4 images of the 8, 8 views of a size."""
    (tmp_path / "script.py").write_text(OUT_OF_MEMORY)
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = launch(images, tmp_path / "run", program=(str(tmp_path / "script.py"),), PYTHONPATH=path)
    assert done.returncode != 0
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 7), done.stderr
    assert status["message"].startswith("out of memory with 4 images at once; use --set micro_batch=2, a --batch-size")


@pytest.mark.slow
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    words = ["--backbone", "test_vit", "--batch-size", 4, "--micro-batch", 2, "--precision", "fp32", "--steps", 1]
    script = ROOT / "benchmarks" / "scaling" / "memory.py"
    command = [sys.executable, script, *words, "--output", tmp_path / "memory.json"]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2 + 4
    rows = read(tmp_path, "memory.json")["rows"]
    assert [row["way"] for row in rows] == ["plain", "micro-batch", "checkpointing", "both"]
    assert all(row["step_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
