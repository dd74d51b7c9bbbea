"""Key layouts: where in a weights file a network lies, and what its keys are called there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]

# Names under which projects keep a whole network: as a key of the file (`teacher`), or in front of its keys
# (`teacher.`). The average of the training comes first (it is what the authors evaluate), the student last.
TEACHERS = (
    "teacher", "teacher_backbone", "teacher_embedding_model", "ema_teacher", "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
PLACES = (
    "state_dict", "model", "module", "backbone", "net", "encoder",
    "embedding_model", "model_wrapper", "wrapped_model", "_model", "_features", "vit",  # Lightly, LightlyTrain
)  # fmt: skip
STUDENTS = ("student", "student_backbone", "student_embedding_model")
WRAPPERS = (*TEACHERS, *PLACES, *STUDENTS)
INVISIBLE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
MAX_DEPTH = 8


@dataclass(frozen=True)
class Network:
    """One network of a weights file: its tensors under the names it would have alone."""

    state: State
    layout: str  # "DINO (teacher.backbone)": whose names, and in brackets the place in the file


def networks(content: Mapping[str, Any], module: nn.Module) -> Iterator[Network]:
    """Every network in the file that could be `module`, the one to prefer first.

    Each comes from one place of the file: keys of two places are never mixed.
    """
    own = set(module.state_dict())
    for place, state in _places(content, (), {key.split(".")[0] for key in own}, set()):
        marks = _marks(content, place, state)
        if not any(CHUNKED.match(key) for key in own):
            state, chunked = _without_chunks(state)
            marks += ["block chunks"] if chunked else []
        state = _with_names(state, module)
        layout = ", ".join(marks or ["timm"]) + (f" ({'.'.join(place)})" if place else "")
        yield Network(state, layout)


def _places(
    content: Mapping[str, Any], place: tuple[str, ...], own: set[str], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], State]]:
    """The networks below `content`, then what lies there itself."""
    if len(place) > MAX_DEPTH:
        return
    tensors = _visible({k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)})
    for name in WRAPPERS:
        if name in own:  # the network itself has a part of this name
            continue
        nested = content.get(name)
        if isinstance(nested, Mapping) and id(nested) not in seen:  # a pickle may contain itself
            seen.add(id(nested))
            yield from _places(nested, (*place, name), own, seen)
        inner = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if inner:
            yield from _places(inner, (*place, name), own, seen)
    if tensors:
        yield place, tensors


def _visible(state: State) -> State:
    """Without the names that `torch.compile` and FSDP put between others."""
    cleaned = {INVISIBLE.sub("", key): tensor for key, tensor in state.items()}
    return cleaned if len(cleaned) == len(state) else state


def _marks(content: Mapping[str, Any], place: tuple[str, ...], state: State) -> list[str]:
    """The projects whose signs the file bears."""
    marks = []
    if "lightly_train" in content or any(name.endswith("embedding_model") for name in place):
        marks.append("LightlyTrain")
    elif any(name in ("teacher_backbone", "student_backbone") for name in place):
        marks.append("Lightly")
    elif "pytorch-lightning_version" in content:
        marks.append("Lightning")
    if "storage_tokens" in state:
        marks.append("DINOv3")
    elif "mask_token" in state and any(key.endswith(".ls1.gamma") for key in state):
        marks.append("DINOv2")
    elif "dino_loss" in content or {"teacher", "student"} <= content.keys():
        marks.append("DINO")
    return marks


def _without_chunks(state: State) -> tuple[State, bool]:
    """DINOv2's `blocks.CHUNK.i.` as `blocks.i.`: i counts through all chunks."""
    renamed = {CHUNKED.sub(r"blocks.\1.", key, count=1): tensor for key, tensor in state.items()}
    chunked = len(renamed) == len(state) and renamed.keys() != state.keys()
    return (renamed, True) if chunked else (state, False)


def _with_names(state: State, module: nn.Module) -> State:
    """`4.0.conv1.weight` of `nn.Sequential(*resnet.children())` as `layer1.0.conv1.weight`."""
    names = [name for name, _ in module.named_children()]
    if not all(key.split(".")[0].isdecimal() for key in state) or any(name.isdecimal() for name in names):
        return state
    return {_named(key, names): tensor for key, tensor in state.items()}


def _named(key: str, names: list[str]) -> str:
    index, _, rest = key.partition(".")
    known = len(index) < 4 and int(index) < len(names)
    return f"{names[int(index)]}.{rest}" if known else key
