"""What is trained of the backbone: its last layers, or LoRA matrices; what stays as it was, and what leaves a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbone_files import drawn, embeddings, pixels
from safetensors.torch import load_file
from test_processes import launch, length
from test_resume import Killed, resume
from test_step import TORCHS_OWN, losses, open_tiny, use_backend
from tiny_runs import Recorder, adapt, assert_same_run, flags, log, read, tiny
from torch import Tensor, nn

import adaptkit
from adaptkit import compiling, outcome, schedules
from adaptkit.backbones import Backbone, load_backbone
from adaptkit.distill import Branch, train_mode_
from adaptkit.errors import UsageError
from adaptkit.estimate import dry_run
from adaptkit.objectives.head import ProjectionHead
from adaptkit.optimizer import build_optimizer
from adaptkit.recipe import Recipe, load_recipe, overrides_of
from adaptkit.schedules import Plan
from adaptkit.tuning import SCALE, layers_from_the_end, lora_matrices, merged, plan_tuning, tune_

pytestmark = pytest.mark.long

RANK = 4
ADAPTABLE = ["vit", "vit_relpos", "dinov2_giant", "dinov3", "dinov3_qkvb", "swin", "convnext"]
SETTINGS: dict[str, Any] = {  # as in test_resume: a line of the log, a checkpoint and a redraw at steps of their own
    "steps": 12,
    "log_every": 3,
    "checkpoint_every": "4 steps",
    "probe__every": "3 steps",
    "head__reset_every": "50%",
    "drop_path": 0.1,
    "optim__lr": 1e-3,
}


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


def recipe(tune: str, rank: int = RANK, **changes: Any) -> Recipe:
    return Recipe(tune=tune, lora_rank=rank, **changes)


def tuned(backbone: Backbone, tune: str, seed: int = 0) -> nn.Module:
    """A copy of the network with what `tune` adds and freezes."""
    module = backbone.clone().module
    tune_(module, plan_tuning(backbone, recipe(tune)), seed)
    return module


def shaken(module: nn.Module) -> nn.Module:
    """The same network, as if its LoRA matrices had learnt something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for matrix in lora_matrices(module):
            matrix.add_(0.1 * torch.randn(matrix.shape, generator=generator))
    return module


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def branch(module: nn.Module) -> Branch:
    return Branch(module, ProjectionHead(int(module.num_features), 4, 8))


# --- the last layers


@pytest.mark.parametrize(
    ("network", "last", "count"),
    [
        ("vit", ("blocks.4.", "blocks.5.", "norm."), 7),
        ("vit_relpos", ("blocks.7.", "blocks.8.", "fc_norm."), 10),  # timm takes fc_norm for a layer
        ("convnext", ("stages.3.blocks.0.", "stages.3.downsample.", "stages.3.blocks.1.", "head.norm."), 10),
        ("resnet", ("layer3.", "layer4."), 5),
        ("swin", ("layers.1.", "layers.2.", "norm."), 4),
    ],
)
def test_last_layers_are_timms(network: str, last: tuple[str, ...], count: int, tmp_path: Path) -> None:
    backbone = drawn(network, tmp_path)
    names = {name for name, _ in backbone.module.named_parameters()}
    assert trained(tuned(backbone, "last-2-blocks")) == {name for name in names if name.startswith(last)}
    assert len(layers_from_the_end(backbone.module)) == count
    assert trained(tuned(backbone, f"last-{count}-blocks")) == names
    with pytest.raises(
        UsageError, match=f"^tune last-{count + 1}-blocks: .* has {count} layers; choose fewer, or full$"
    ):
        plan_tuning(backbone, recipe(f"last-{count + 1}-blocks"))


def test_what_the_user_froze_stays_frozen(tmp_path: Path) -> None:
    backbone = drawn("vit", tmp_path)
    names = trained(backbone.module)
    backbone.module.get_submodule("blocks.5.mlp").requires_grad_(False)
    frozen = {name for name in names if name.startswith("blocks.5.mlp.")}
    assert trained(tuned(backbone, "full")) == names - frozen
    assert not trained(tuned(backbone, "last-2-blocks")) & frozen
    backbone.module.get_submodule("blocks.5.norm1").requires_grad_(False)
    assert not {name for name in trained(tuned(backbone, "lora")) if name.startswith("blocks.5.norm1")}


def test_nothing_is_computed_backwards_below_the_last_layers(tmp_path: Path) -> None:
    module = tuned(drawn("vit", tmp_path), "last-2-blocks")
    needs: dict[str, bool] = {}
    for name in ("blocks.3", "blocks.4"):
        module.get_submodule(name).register_forward_hook(
            lambda part, inputs, output, name=name: needs.update({name: output.requires_grad})
        )
    module(pixels(64)).square().sum().backward()
    assert needs == {"blocks.3": False, "blocks.4": True}
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == trained(module)


def test_frozen_parts_are_in_evaluation_mode(tmp_path: Path) -> None:
    student = branch(tuned(drawn("resnet", tmp_path), "last-1-blocks"))
    train_mode_(student, frozen=False)
    modes = {name: module.training for name, module in student.backbone.named_modules()}
    assert modes[""]
    assert {modes["layer4"], modes["layer4.0.bn1"], student.head.training} == {True}
    assert {modes["bn1"], modes["layer3"], modes["layer3.0.bn1"], modes["layer1.0.conv1"]} == {False}


# --- LoRA


@pytest.mark.parametrize("network", ADAPTABLE)
def test_lora_starts_as_the_original_learns_everywhere_and_merges(network: str, tmp_path: Path) -> None:
    """timm computes qkv of `dinov3_qkvb` from the layer's weight: matrices passed by would have no gradient."""
    backbone = drawn(network, tmp_path)
    px, original = backbone.image_px, embeddings(backbone.module, backbone.image_px)
    module = tuned(backbone, "lora")
    assert torch.equal(embeddings(module, px), original)
    assert merged(backbone.module, module).state_dict().keys() == backbone.module.state_dict().keys()
    shaken(module)(pixels(px)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    with_matrices, plain = embeddings(module, px), embeddings(merged(backbone.module, module), px)
    assert float((with_matrices - original).abs().max()) > 1e-3
    torch.testing.assert_close(plain, with_matrices, rtol=1e-4, atol=1e-5)


def test_merged_weights_against_numpy(tmp_path: Path) -> None:
    """Slow twin: W + (alpha / r) B A for every linear layer of attention and MLP; all else is the original's."""
    backbone = drawn("vit", tmp_path)
    state = {name: tensor.double().numpy() for name, tensor in backbone.module.state_dict().items()}
    module = shaken(tuned(backbone, "lora"))
    own = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    plain = merged(backbone.module, module).state_dict()
    layers = {f"blocks.{n}.{part}" for n in range(6) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for name, tensor in plain.items():
        expected, layer = state[name], name.removesuffix(".weight")
        if layer in layers:
            a, b = own[f"{layer}.lora_A.adaptkit.weight"], own[f"{layer}.lora_B.adaptkit.weight"]
            assert (a.shape[0], b.shape[1], SCALE) == (RANK, RANK, 2)
            expected = expected + (2 * RANK / RANK) * np.einsum("or,ri->oi", b, a)
            assert np.abs(expected - state[name]).max() > 1e-3
            np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=0, atol=1e-5)
        else:
            assert np.array_equal(tensor.double().numpy(), expected), name


def test_without_lora_the_network_itself_leaves(tmp_path: Path) -> None:
    backbone = drawn("vit", tmp_path)
    module = tuned(backbone, "last-2-blocks")
    assert merged(backbone.module, module) is module


def test_lora_trains_its_matrices_and_the_norms(tmp_path: Path) -> None:
    for network in ("vit", "dinov3", "convnext"):
        module = tuned(drawn(network, tmp_path), "lora")
        norms = {name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)}
        own = {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in norms}
        assert len(own) > 4
        matrices = {name for name in trained(module) if name.endswith(("_A.adaptkit.weight", "_B.adaptkit.weight"))}
        assert trained(module) == own | matrices


def test_the_draw_is_the_seeds_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    backbone = drawn("vit", tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (tuned(backbone, "lora", seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    for one, two, three in zip(*(lora_matrices(module) for module in (first, again, other)), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three) == (not one.any())  # B = 0


@pytest.mark.parametrize("network", ["resnet", "efficientnet", "mobilenetv4"])
def test_networks_without_such_layers_are_refused(network: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^tune lora: .* has no attention or MLP of linear layers; use last-N-blocks"):
        plan_tuning(drawn(network, tmp_path), recipe("lora"))


def test_a_rank_as_large_as_the_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^lora_rank 64: must be below 64, the width of .*'s layers$"):
        plan_tuning(drawn("vit", tmp_path), recipe("lora", 64))
    narrow = plan_tuning(drawn("swin", tmp_path), recipe("lora", 16)).adapted  # 16, 32 and 64 wide
    assert {name.split(".")[1] for name in narrow} == {"1", "2"}


def test_without_peft_the_error_says_how_to_get_it(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    recorder = Recorder()
    with pytest.raises(UsageError, match=r"^tune lora needs peft: pip install 'adaptkit\[lora\]'$"):
        adapt(vit, images, tmp_path / "run", tune="lora", reporter=recorder)
    assert recorder.phases == ["loading the backbone"]
    assert read(tmp_path / "run", "status.json")["exit_code"] == 2


# --- the optimizer


def groups(module: nn.Module, layer_decay: float) -> dict[str, dict[str, Any]]:
    student = branch(module)
    plan = Plan.make(Recipe(steps=2, optim={"layer_decay": layer_decay}), num_images=64)
    found = {id(p): group for group in build_optimizer(student, plan).param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in student.named_parameters() if id(p) in found}


def test_the_optimizer_knows_only_what_is_trained(tmp_path: Path) -> None:
    for tune in ("last-2-blocks", "lora"):
        module = tuned(drawn("vit", tmp_path), tune)
        known = {name.removeprefix("backbone.") for name in groups(module, 0.5) if name.startswith("backbone.")}
        assert known == trained(module)


def test_matrices_have_the_full_rate_in_every_layer_and_norms_that_of_theirs(tmp_path: Path) -> None:
    found = groups(tuned(drawn("vit", tmp_path), "lora"), 0.5)
    for block in range(6):
        matrix = found[f"backbone.blocks.{block}.attn.qkv.lora_B.adaptkit.weight"]
        assert (matrix["lr_scale"], matrix["decays"], matrix["is_head"]) == (1, True, False)
        norm = found[f"backbone.blocks.{block}.norm1.weight"]
        assert (norm["lr_scale"], norm["decays"]) == (0.5 ** (5 - block), False)


def test_the_last_layers_keep_their_rates(tmp_path: Path) -> None:
    backbone = drawn("vit", tmp_path)
    whole, last = groups(backbone.module, 0.5), groups(tuned(backbone, "last-3-blocks"), 0.5)
    assert {name: group["lr_scale"] for name, group in last.items()} == {name: whole[name]["lr_scale"] for name in last}


# --- whole runs


def selected_between(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    """A point on the line is handed over, whatever the probes say."""
    monkeypatch.setattr(outcome, "choose", lambda found: max(found, key=lambda c: (c.alpha == alpha, c.value)))
    monkeypatch.setattr(outcome, "verdict", lambda selected, delta, collapsed: ("unchanged", False))


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_frozen_layers_never_change(
    network: str, alpha: float, images: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    """Weights and BatchNorm statistics, bit for bit, in the student, the teacher, a candidate and the export."""
    selected_between(monkeypatch, alpha)
    folder = request.getfixturevalue(network)
    run = adapt(folder, images, tmp_path / "run", tune="last-1-blocks", optim__lr=1e-3).run
    original = load_file(folder / "model.safetensors")
    last = ("blocks.5.", "norm.") if network == "vit" else ("layer4.",)
    training = load_file(run / "checkpoints" / "last.safetensors")
    stages = [part_of(training, "student.backbone."), part_of(training, "teacher.backbone.")]
    stages += [part_of(load_file(run / "checkpoints" / "candidate-00000006.safetensors"), "backbone.")]
    stages += [load_file(run / "backbone" / "model.safetensors")]
    for state in stages:
        assert state.keys() == original.keys()
        moved = {name for name, tensor in state.items() if not torch.equal(tensor, original[name])}
        assert moved == {name for name in original if name.startswith(last)}
    known = part_of(training, "optimizer.exp_avg.")
    assert {name for name in known if not name.startswith("head.")} <= {f"backbone.{name}" for name in moved}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_lora_run_hands_over_a_plain_backbone(
    alpha: float, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected_between(monkeypatch, alpha)
    recorder = Recorder()
    result = adapt(vit, images, tmp_path / "run", tune="lora", lora_rank=2, optim__lr=1e-2, reporter=recorder)
    run, original = result.run, load_file(vit / "model.safetensors")
    assert recorder.notes[0] == "training 0.01 of 0.30 M backbone parameters (lora, rank 2)"
    assert (result.report["recipe"]["tune"], result.report["recipe"]["lora_rank"]) == ("lora", 2)
    assert load_recipe(run / "recipe.yaml").tune == "lora"
    teacher = branch(load_backbone(str(vit)).module)
    tune_(teacher.backbone, plan_tuning(load_backbone(str(vit)), recipe("lora", 2)), 0)
    assert read(run, "manifest.json")["trained_parameters"] == sum(
        p.numel() for p in teacher.backbone.parameters() if p.requires_grad
    )
    training = load_file(run / "checkpoints" / "last.safetensors")
    teacher.backbone.load_state_dict(part_of(training, "teacher.backbone."))
    plain = merged(load_backbone(str(vit)).module, teacher.backbone).state_dict()
    candidate = part_of(load_file(run / "checkpoints" / "candidate-00000006.safetensors"), "backbone.")
    monkeypatch.setitem(sys.modules, "peft", None)
    exported = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True, num_classes=0).state_dict()
    step = result.report["selected"]["step"]
    assert result.report["selected"]["alpha"] == alpha
    assert candidate.keys() == exported.keys() == original.keys()
    chosen = part_of(load_file(run / "checkpoints" / f"candidate-{step:08d}.safetensors"), "backbone.")
    for name, start in original.items():
        assert torch.equal(candidate[name], plain[name]), name
        assert torch.equal(exported[name], torch.lerp(start, chosen[name], alpha)), name
    assert not torch.equal(exported["blocks.0.attn.qkv.weight"], original["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("tune", ["lora", pytest.param("last-2-blocks", marks=pytest.mark.slow)])
def test_a_killed_run_ends_bit_for_bit_where_an_undisturbed_one_does(
    tune: str, vit: Path, images: Path, tmp_path: Path
) -> None:
    """The last checkpoint is of step 4, the log and a candidate already of step 6."""

    class KillAt(Recorder):
        def evaluation(self, step: int, *rest: Any) -> None:
            if step == 6:
                raise Killed

    undisturbed = adapt(vit, images, tmp_path / "undisturbed", tune=tune, **SETTINGS).run
    with pytest.raises(Killed):
        adapt(vit, images, tmp_path / "run", tune=tune, reporter=KillAt(), **SETTINGS)
    recorder = Recorder()
    resume(tmp_path / "run", recorder)
    assert recorder.steps == [6, 9, 12]
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_checkpoint_of_lora_fits_no_other_rank(vit: Path, images: Path, tmp_path: Path) -> None:
    session = open_tiny(vit, images, tune="lora", lora_rank=2)
    session.save(tmp_path / "last.safetensors")
    with pytest.raises(adaptkit.errors.DataError, match="does not fit this network"):
        open_tiny(vit, images, tune="lora", lora_rank=3).restore(tmp_path / "last.safetensors")


@pytest.mark.slow
@TORCHS_OWN
@pytest.mark.parametrize("tune", ["lora", "last-2-blocks"])
def test_a_compiled_student_has_the_losses_of_an_eager_one(
    tune: str, vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "eager")
    notes: list[str] = []
    eager = open_tiny(vit, images, tune=tune, compile="off", head__warmup="never")
    session = open_tiny(vit, images, notes, tune=tune, compile="on", head__warmup="never")
    assert compiling.compile_backbones(session, "on") is not None
    assert losses(session, 3) == losses(eager, 3)


def test_check_and_dry_run_take_the_setting_and_refuse_as_a_run_does(vit: Path, resnet: Path, images: Path) -> None:
    def settings(backbone: Path, **changes: Any) -> Recipe:
        return load_recipe(overrides=overrides_of({"backbone": str(backbone), **tiny(data=str(images), **changes)}))

    assert dry_run(settings(vit, tune="lora"), Recorder())["recipe"]["tune"] == "lora"
    with pytest.raises(UsageError, match="no attention or MLP"):
        dry_run(settings(resnet, tune="lora"), Recorder())
    found = adaptkit.check(str(vit), images, **tiny(tune="last-9-blocks"))
    assert str(found.error).endswith("has 7 layers; choose fewer, or full")
    assert adaptkit.check(str(vit), images, **tiny(tune="last-2-blocks")).document["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "last-2-blocks"])
def test_two_processes_tune_as_one(tune: str, vit: Path, images: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "optim.lr": 1e-3, "tune": tune}
    options = ["--backbone", vit, "--data", images, "--output", tmp_path / "two", *flags(settings), "--quiet"]
    done = launch("adapt", *options)
    assert done.returncode == 0, done.stderr
    one = adapt(vit, images, tmp_path / "one", **{key.replace(".", "__"): value for key, value in settings.items()}).run
    lines = [[line["loss"] for line in log(run) if line["kind"] == "train"] for run in (one, tmp_path / "two")]
    assert len(lines[0]) == 2
    assert lines[1] == pytest.approx(lines[0], rel=1e-4)
    original = load_file(vit / "model.safetensors")
    ends = [load_file(run / "checkpoints" / "candidate-00000004.safetensors") for run in (one, tmp_path / "two")]
    first, second = (part_of(end, "backbone.") for end in ends)
    moved = length([first[name] - value for name, value in original.items()])
    assert length([first[name] - second[name] for name in original]) < 1e-3 * moved
