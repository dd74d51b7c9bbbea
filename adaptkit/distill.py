"""Student and teacher: two copies of a backbone, each with a projection head; the teacher is the student's EMA."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.microbatch import embed_in_parts
from adaptkit.objectives import Objective
from adaptkit.objectives.head import draw_, last_bias


class Branch(nn.Module):
    """A backbone and its projection head.

    `forward` takes one tensor of views for every view size, view-major, and gives the logits (V, N, B) in float32:
    all views of one size go through the backbone in one pass, unless `micro_batch` says otherwise, and the head sees
    all views at once.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.untrained = tuple(_untrained(backbone))

    def forward(
        self, views: Iterable[Tensor], num_images: int, frozen: bool = False, micro_batch: int | None = None
    ) -> Tensor:
        """Views [(G * N, 3, S, S), (L * N, 3, s, s)] -> (G + L, N, B). `frozen`: no gradient to the backbone."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            embeddings = embed_in_parts(self.backbone, views, num_images, micro_batch)  # (V * N, D)
        logits: Tensor = self.head(embeddings)
        return logits.float().view(-1, num_images, logits.shape[1])


def _untrained(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a network none of whose parameters has a gradient."""
    for part in module.children():
        trained = [parameter.requires_grad for parameter in part.parameters()]
        if trained and not any(trained):
            yield part
        elif not all(trained):
            yield from _untrained(part)


def build_pair(
    student_backbone: nn.Module, teacher_backbone: nn.Module, embed_dim: int, objective: Objective, seed: int
) -> tuple[Branch, Branch]:
    """A student and a teacher with the same freshly drawn head; the teacher is in eval mode and has no gradient."""
    student = Branch(student_backbone, objective.build_head(embed_dim))
    draw_(student.head, seed)
    teacher = Branch(teacher_backbone, copy.deepcopy(student.head))
    return student, teacher.eval().requires_grad_(False)


def train_mode_(student: Branch, frozen: bool) -> None:
    """Train mode, except that a frozen backbone also keeps its BatchNorm statistics and drops no path.

    The same holds for those parts of the backbone that are never trained.
    """
    student.train()
    student.backbone.train(not frozen)
    for part in student.untrained:
        part.eval()


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    buffers: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # one kernel copies tensors of one type
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        targets, sources = buffers.setdefault(mine.dtype, ([], []))
        targets.append(mine)
        sources.append(theirs)
    for targets, sources in buffers.values():
        torch._foreach_copy_(targets, sources)


def redraw_head_(student: Branch, teacher: Branch, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Give both heads the same new draw and drop the optimizer's state for the student's head."""
    draw_(student.head, seed)
    teacher.head.load_state_dict(student.head.state_dict())
    for parameter in student.head.parameters():
        optimizer.state.pop(parameter, None)


@torch.no_grad()
def balance_head_(student: Branch, teacher: Branch, teacher_logits: Tensor, medians: Tensor, fresh: bool) -> Tensor:
    """Move the last bias against the bits' `medians` (B,), so that each bit stays half 0 and half 1.

    A fresh head sees the embeddings' common offset as the same sign in almost all images: its bits are nearly
    constant and carry little, so both heads are shifted. Later only the teacher's bias follows the batch, and the
    student has to learn it: a bit that nobody can predict yet would otherwise drift to its majority value and
    stay there. The code remains the sign of the teacher's logits. Returns the shifted teacher logits.
    """
    last_bias(teacher.head).sub_(medians)
    if fresh:
        last_bias(student.head).sub_(medians)
    return teacher_logits - medians


@torch.no_grad()
def interpolate(original: Mapping[str, Tensor], adapted: Mapping[str, Tensor], alpha: float) -> dict[str, Any]:
    """The point alpha on the straight line from original (0) to adapted (1) weights; integer buffers are adapted's."""
    return {
        name: torch.lerp(original[name], end, alpha) if end.is_floating_point() else end.clone()
        for name, end in adapted.items()
    }
