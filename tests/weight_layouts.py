"""Weight files in the exact key layouts of other projects, made from the state of a small timm network.

Every builder takes timm's tensors and gives what `torch.save` was given there. The student and all else that lies in
such a file beside the wanted network is noise.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def noise(state: State, seed: int = 3) -> State:
    """Another network of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 1
        for key, tensor in state.items()
    }


def dino_head(prefix: str = "head.") -> State:
    """DINO's projection head; `last_layer` has weight norm."""
    head = {"mlp.0.weight": (8, 4), "mlp.0.bias": (8,), "last_layer.weight_g": (9, 1), "last_layer.weight_v": (9, 8)}
    return {prefix + key: torch.randn(shape) for key, shape in head.items()}


def optimizer_state(state: State) -> dict[str, Any]:
    """AdamW's, with moments as large as the parameters."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in state.values() if tensor.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


# --- DINO, SimDINO


def dino_checkpoint(state: State) -> dict[str, Any]:
    """main_dino.py: the student is in DistributedDataParallel, the teacher is not."""
    args = argparse.Namespace(arch="vit_small", patch_size=16, lr=np.float64(5e-4), global_crops_scale=(0.4, 1.0))
    return {
        "student": prefixed(noise(state), "module.backbone.") | dino_head("module.head."),
        "teacher": prefixed(state, "backbone.") | dino_head(),
        "optimizer": optimizer_state(state),
        "epoch": 100,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 9)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def dino_checkpoint_with_batchnorm(state: State) -> dict[str, Any]:
    """With synchronised BatchNorm the teacher is in DistributedDataParallel too."""
    content = dino_checkpoint(state)
    return content | {"teacher": prefixed(content["teacher"], "module.")}


def simdino_checkpoint(state: State) -> dict[str, Any]:
    """DINO's file after `torch.compile` of both networks; the coding rate loss has no state."""
    content = dino_checkpoint(state)
    return content | {
        "student": prefixed(content["student"], "_orig_mod."),
        "teacher": prefixed(content["teacher"], "_orig_mod."),
        "dino_loss": {},
    }


# --- DINOv2, SimDINOv2


def dinov2_backbone(state: State) -> State:
    """The hub's file: a mask token; registers by another name, and the class token's position embedding apart."""
    content = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for key, v in state.items()}
    if state["blocks.0.mlp.fc1.weight"].shape[0] == state["blocks.0.mlp.fc2.weight"].shape[1]:  # no gate: a plain MLP
        content = dict(state)
    if "reg_token" in content:
        class_position = torch.randn(1, 1, state["cls_token"].shape[-1])
        content["register_tokens"] = content.pop("reg_token")
        content["pos_embed"] = torch.cat((class_position, content["pos_embed"]), dim=1)
        content["cls_token"] = content["cls_token"] - class_position
        state["cls_token"].copy_(content["cls_token"] + class_position)  # what rounding made of it
    return content | {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}


def chunks_of_two(state: State) -> State:
    """`block_chunks`: the index in a chunk counts on from the chunk before."""
    return {re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", k): v for k, v in state.items()}


def dinov2_teacher(state: State) -> dict[str, Any]:
    """eval/training_N/teacher_checkpoint.pth."""
    heads = dino_head("dino_head.") | dino_head("ibot_head.")
    return {"teacher": prefixed(dinov2_backbone(state), "backbone.") | heads}


def dinov2_teacher_chunked(state: State) -> dict[str, Any]:
    heads = dino_head("dino_head.") | dino_head("ibot_head.")
    return {"teacher": prefixed(chunks_of_two(dinov2_backbone(state)), "backbone.") | heads}


def dinov2_training(state: State) -> dict[str, Any]:
    """model_0001.pth of a run on one GPU: student and teacher in one mapping."""
    content = dinov2_backbone(state)
    both = prefixed(noise(content), "student.backbone.") | prefixed(content, "teacher.backbone.")
    both |= dino_head("student.dino_head.") | dino_head("teacher.dino_head.") | {"dino_loss.center": torch.zeros(1, 9)}
    return {"model": both, "optimizer": optimizer_state(state), "iteration": 1249}


def simdinov2_teacher(state: State) -> dict[str, Any]:
    """SimDINOv2 compiles the backbone itself."""
    return {"teacher": prefixed(dinov2_backbone(state), "backbone._orig_mod.") | dino_head("dino_head.")}


def dinov2_activation_checkpointing(state: State) -> dict[str, Any]:
    content = dinov2_backbone(state)
    content = {re.sub(r"^(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", k): v for k, v in content.items()}
    return {"teacher": prefixed(content, "backbone._fsdp_wrapped_module.")}


# --- DINOv3


def dinov3_backbone(state: State) -> State:
    """timm's Eva names back to DINOv3's; the bias mask is 0 for the keys, whose bias is anything."""
    content: State = {}
    for key, tensor in state.items():
        if key.endswith(("attn.q_bias", "attn.v_bias")):
            continue
        content[key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = tensor
    content["storage_tokens"] = content.pop("reg_token")
    dim = state["cls_token"].shape[-1]
    for block in {key.split(".")[1] for key in state if key.startswith("blocks.")}:
        attention = f"blocks.{block}.attn"
        query, value = (state.get(f"{attention}.{x}_bias", torch.zeros(dim)) for x in "qv")
        content[f"{attention}.qkv.bias"] = torch.cat((query, torch.randn(dim), value))
        content[f"{attention}.qkv.bias_mask"] = torch.cat((torch.ones(dim), torch.zeros(dim), torch.ones(dim)))
    content["mask_token"] = torch.zeros(1, dim)
    content["rope_embed.periods"] = torch.ones(4, dtype=torch.bfloat16)
    return content


def dinov3_teacher(state: State) -> dict[str, Any]:
    return {"teacher": prefixed(dinov3_backbone(state), "backbone.") | dino_head("dino_head.")}


def dinov3_convnext(state: State) -> State:
    """The names of ConvNeXt's own authors, which DINOv3 kept."""
    content = {}
    for key, tensor in state.items():
        name = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", key)
        name = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        content[name] = tensor
    return content | {f"norms.3.{part}": content[f"norm.{part}"] for part in ("weight", "bias")}


# --- Lightly, LightlyTrain, Lightning


def lightning(state: State) -> dict[str, Any]:
    """What Lightning's `ModelCheckpoint` writes around a `LightningModule`'s tensors."""
    return {
        "epoch": 9,
        "global_step": 1000,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [optimizer_state(state)],
        "lr_schedulers": [{"last_epoch": 9, "base_lrs": [np.float64(0.1)]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "options": argparse.Namespace(a=1)},
    }


def under(prefix: str) -> Callable[[State], dict[str, Any]]:
    """A Lightning module that keeps its network under one name, beside a metric and a head."""
    others = {"head.weight": torch.ones(2, 4), "criterion.center": torch.zeros(1, 9)}
    return lambda state: lightning(prefixed(state, f"{prefix}.") | others)


def lightly_dino(state: State) -> dict[str, Any]:
    """lightly's example: `student_backbone`, `teacher_backbone`, and their heads."""
    both = prefixed(noise(state), "student_backbone.") | prefixed(state, "teacher_backbone.")
    return lightning(both | dino_head("student_head.") | dino_head("teacher_head."))


def lightly_dinov2(state: State) -> dict[str, Any]:
    """`MaskedVisionTransformerTIMM` keeps timm's ViT as `vit`, beside a mask token of its own."""
    both = prefixed(noise(state), "student_backbone.vit.") | prefixed(state, "teacher_backbone.vit.")
    return lightning(both | {"teacher_backbone.mask_token": torch.zeros(1, 1, 64)})


def sequential_resnet(state: State) -> State:
    """`nn.Sequential(*list(resnet.children())[:-1])`, as lightly's examples cut off the classifier."""
    index = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = {key: key.split(".", 1) for key in state}
    return {f"{index[split[key][0]]}.{split[key][1]}": tensor for key, tensor in state.items()}


def lightly_resnet(state: State) -> dict[str, Any]:
    other = prefixed(sequential_resnet(noise(state)), "backbone_momentum.")
    return lightning(prefixed(sequential_resnet(state), "backbone.") | other | dino_head("projection_head."))


def lightly_train(content: State, other: State, wrapper: str = "wrapped_model") -> dict[str, Any]:
    """LightlyTrain's `last.ckpt`: Lightning's file, and the network once more as a pickled module."""
    both = prefixed(other, f"student_embedding_model.{wrapper}._model.")
    both |= prefixed(content, f"teacher_embedding_model.{wrapper}._model.") | dino_head("teacher_dino_head.")
    models = {"model": torch.nn.Linear(2, 2), "wrapped_model": torch.nn.Sequential(torch.nn.GELU())}
    return lightning(both) | {"lightly_train": {"version": "0.11.0", "models": models, "normalize_args": {"mean": 0}}}


def lightly_train_dino(state: State) -> dict[str, Any]:
    return lightly_train(state, noise(state))


def lightly_train_dinov2(state: State) -> dict[str, Any]:
    content = chunks_of_two(dinov2_backbone(state))
    return lightly_train(content, noise(content), wrapper="model_wrapper")


def lightly_train_distillation(state: State) -> dict[str, Any]:
    """The teacher is another, larger network; the student is what was trained."""
    teacher = {key: torch.randn(*(2 * side for side in tensor.shape)) for key, tensor in state.items()}
    return lightly_train(teacher, state)


def lightly_train_embedding_model(state: State) -> State:
    """`export(part="embedding_model", format="torch_state_dict")`, with an embedding layer."""
    return prefixed(state, "wrapped_model._model.") | {"embed_head.weight": torch.ones(8, 64, 1, 1)}


def lightly_train_torchvision(state: State) -> dict[str, Any]:
    """LightlyTrain keeps the layers of torchvision's networks that it uses as `_features`."""
    return lightning(prefixed(state, "embedding_model.wrapped_model._features.") | dino_head("projection_head."))


# --- timm, torch


def timm_with_classifier(state: State) -> State:
    return state | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}


def timm_training(state: State) -> dict[str, Any]:
    """timm's `CheckpointSaver`, without an average."""
    args = argparse.Namespace(model="test_vit", opt="adamw", mean=None)
    content = {"epoch": 3, "arch": "test_vit", "optimizer": optimizer_state(state), "version": 2, "args": args}
    return content | {"state_dict": timm_with_classifier(state), "metric": 81.5}


def timm_training_with_ema(state: State) -> dict[str, Any]:
    return timm_training(noise(state)) | {"state_dict_ema": timm_with_classifier(state)}


def data_parallel(state: State) -> State:
    return prefixed(state, "module.")


def compiled(state: State) -> State:
    return prefixed(state, "_orig_mod.")


def compiled_in_ddp(state: State) -> dict[str, Any]:
    return {"model": prefixed(state, "module._orig_mod."), "epoch": 3}
