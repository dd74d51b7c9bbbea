"""What is trained of the backbone: all of it, its last layers, or LoRA matrices beside its linear layers.

LoRA (arXiv 2106.09685) replaces a frozen weight W by W + SCALE B A, with B (out, r) = 0 at the start. To go on with
self-supervised pre-training that way is ExPLoRA (arXiv 2406.10973). As there, norms are trained too: they hold few
numbers, and what they scale differs most between domains. No block is trained as a whole, unlike there.

Only student and teacher of a session hold such matrices. Whatever leaves them goes through `merged`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from adaptkit.backbones import Backbone
from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe
from adaptkit.settings import TUNE

SCALE = 2.0  # alpha / r: fixed, so that another rank does not ask for another learning rate
ADAPTER = "adaptkit"  # peft's name for the matrices; a module of the user's own may hold others
ATTENTION = {"qkv", "qk", "kv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "proj"}  # as timm calls its linear layers
MLP = {"fc1", "fc2", "fc1_g", "fc1_x", "w12", "w3"}  # the last two as in DINOv2's own code


@dataclass(frozen=True)
class Tuning:
    """`whole`: parameters that are trained as they are; `adapted`: linear layers that get matrices of rank `rank`."""

    whole: frozenset[str]
    adapted: tuple[str, ...] = ()
    rank: int = 0

    def num_trained(self, module: nn.Module) -> int:
        """How many numbers are trained, of the module as it was loaded."""
        layers: list[Any] = [module.get_submodule(name) for name in self.adapted]
        matrices: int = sum(self.rank * (layer.in_features + layer.out_features) for layer in layers)
        return matrices + sum(p.numel() for name, p in module.named_parameters() if name in self.whole)


def plan_tuning(backbone: Backbone, recipe: Recipe) -> Tuning:
    """What `recipe.tune` means for this backbone. Raises `UsageError` when it has no such layers, or without peft."""
    trainable = {name: p for name, p in backbone.module.named_parameters() if p.requires_grad}
    if recipe.tune == "full":
        return Tuning(frozenset(trainable))
    if recipe.tune == "lora":
        return _plan_lora(backbone, recipe.lora_rank, frozenset(trainable))
    count, layers = _asked_layers(recipe.tune), layers_from_the_end(backbone.module)
    if count > len(layers):
        raise UsageError(f"tune {recipe.tune}: {backbone.name} has {len(layers)} layers; choose fewer, or full")
    last = {id(parameter) for layer in layers[:count] for parameter in layer}
    return Tuning(frozenset(name for name, parameter in trainable.items() if id(parameter) in last))


def _asked_layers(tune: str) -> int:
    match = TUNE.fullmatch(tune)
    return int(match[1]) if match and match[1] else 0


def layers_from_the_end(module: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters by layer, last layer first, grouped as for the layer-wise learning rate.

    timm counts the stem as a layer, and what no pattern of the network's names too, as one last layer: if that is a
    norm alone, it belongs to the layer before.
    """
    by_rate: dict[float, list[nn.Parameter]] = {}
    for group in param_groups_layer_decay(module, layer_decay=0.9):
        by_rate.setdefault(group["lr_scale"], []).extend(group["params"])
    layers = [by_rate[rate] for rate in sorted(by_rate, reverse=True)]
    if len(layers) > 1 and all(parameter.ndim == 1 for parameter in layers[0]):
        layers[:2] = [layers[0] + layers[1]]
    return layers


def _plan_lora(backbone: Backbone, rank: int, trainable: frozenset[str]) -> Tuning:
    _import_peft()
    modules = dict(backbone.module.named_modules())
    widths = {
        name: min(module.in_features, module.out_features)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ATTENTION | MLP
    }
    if not widths:
        raise UsageError(
            f"tune lora: {backbone.name} has no attention or MLP of linear layers; use last-N-blocks or full"
        )
    adapted = tuple(name for name, width in widths.items() if width > rank)  # not the tiny MLPs of relative positions
    if not adapted:
        raise UsageError(
            f"lora_rank {rank}: must be below {max(widths.values())}, the width of {backbone.name}'s layers"
        )
    norms = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
    own = {f"{name}.{key}" for name in norms for key, _ in modules[name].named_parameters(recurse=False)}
    return Tuning(trainable & own, adapted, rank)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("tune lora needs peft: pip install 'adaptkit[lora]'") from None
    return peft


def tune_(module: nn.Module, tuning: Tuning, seed: int) -> None:
    """Freeze all that is not trained, and put LoRA matrices in place, drawn by `seed`.

    The outputs stay what they were, as B = 0. timm computes qkv from the layer's weight where q and v alone have a
    bias; the matrices would be passed by, so there the bias is added separately, which may round differently.
    """
    if tuning.adapted:
        peft = _import_peft()
        for each in module.modules():
            if hasattr(each, "qkv_bias_separate"):
                setattr(each, "qkv_bias_separate", True)  # noqa: B010  (an attribute of timm's)
        names = "|".join(name.replace(".", r"\.") for name in tuning.adapted)
        config = peft.LoraConfig(r=tuning.rank, lora_alpha=SCALE * tuning.rank, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # peft draws on the CPU and moves
            peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        for _, layer in _lora_layers(module):
            layer.cast_input_dtype_enabled = False  # to float32 and back: autocast knows what it wants
    matrices = {id(parameter) for parameter in lora_matrices(module)}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in tuning.whole or id(parameter) in matrices)


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer, wherever `tune_` has put matrices."""
    if hasattr(module, "peft_config"):  # peft's mark
        from peft.tuners.lora import LoraLayer

        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
                yield name, layer


def lora_matrices(module: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer that has them; empty without LoRA."""
    pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for _, layer in _lora_layers(module)]
    return [matrix for pair in pairs for matrix in pair]


@torch.no_grad()
def merged(original: nn.Module, tuned: nn.Module) -> nn.Module:
    """`tuned` as a network of the original's own layers: a copy with W + SCALE B A; without LoRA `tuned` itself."""
    layers = list(_lora_layers(tuned))
    if not layers:
        return tuned
    state = tuned.state_dict()
    for name, layer in layers:
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in layer.get_base_layer().state_dict().items()}
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    plain = copy.deepcopy(original)
    plain.load_state_dict(state)
    return plain


def sentence(tuning: Tuning, module: nn.Module, recipe: Recipe) -> str:
    """`training 0.59 of 21.7 M backbone parameters (lora, rank 16)`, of the module as it was loaded."""
    trained, total = (_millions(n) for n in (tuning.num_trained(module), sum(p.numel() for p in module.parameters())))
    how = f"lora, rank {tuning.rank}" if tuning.adapted else recipe.tune
    return f"training {trained} of {total} M backbone parameters ({how})"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.{2 if count >= 1e4 else 4}f}"
