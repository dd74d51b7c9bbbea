"""What the tests of the two continuous baselines share: outputs, pairs of views, plans, and one of two processes."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from adaptkit.objectives import OBJECTIVES, Objective
from adaptkit.objectives.head import draw_
from adaptkit.recipe import Recipe
from adaptkit.schedules import Plan
from adaptkit.settings import ObjectiveSettings

SHAPES = [(2, 2, 1, 2), (2, 2, 5, 3), (3, 2, 4, 7), (6, 2, 3, 8), (5, 3, 4, 4), (3, 3, 2, 8)]  # V, G, N, outputs
NAMES = ["simdino", "dino"]
SIZES: dict[str, dict[str, Any]] = {
    "simdino": {"output_dim": 8, "hidden_dim": 12},
    "dino": {"output_dim": 8, "hidden_dim": 12, "num_prototypes": 10},
}
NUM_IMAGES, NUM_PROCESSES, EMBED_DIM = 6, 2, 5  # images of one process


def pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    """(teacher view i, student view j), j != i."""
    return [(i, j) for i, j in product(range(num_global), range(num_views)) if i != j]


def draw(num_views: int, num_global: int, num_images: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Student and teacher outputs that agree more often than not, with an offset shared by all images."""
    generator = torch.Generator().manual_seed(num_views * 1000 + num_outputs)
    common = torch.randn(1, num_images, num_outputs, generator=generator) + 0.3
    student = common + 0.5 * torch.randn(num_views, num_images, num_outputs, generator=generator)
    teacher = common + 0.5 * torch.randn(num_global, num_images, num_outputs, generator=generator)
    return student, teacher


def unit(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """The same with rows of length 1."""
    student, teacher = draw(*shape)
    return normalize(student, dim=-1), normalize(teacher, dim=-1)


def plan(total_steps: int = 100, steps_per_epoch: int = 20) -> Plan:
    return Plan.make(Recipe(data="images", steps=total_steps, batch_size=2), 2 * steps_per_epoch)


def objective(name: str, total_steps: int = 100, steps_per_epoch: int = 20, **settings: Any) -> Objective:
    return OBJECTIVES[name](ObjectiveSettings(name=name, **settings), plan(total_steps, steps_per_epoch))


def two_steps(name: str, num_images: int, first: int) -> dict[str, dict[str, Tensor]]:
    """Two steps on images `first`, ... of a fixed batch: the second one's gradients and report, and the state."""
    ours = objective(name, **SIZES[name])
    student, teacher = ours.build_head(EMBED_DIM), ours.build_head(EMBED_DIM)
    draw_(student, 1)
    draw_(teacher, 2)
    generator = torch.Generator().manual_seed(3)
    embeddings = 9 * torch.randn(3, NUM_IMAGES * NUM_PROCESSES, EMBED_DIM, generator=generator)
    share = embeddings[:, first : first + num_images]
    for step in range(2):
        student.zero_grad()
        targets = teacher(share[:2].flatten(0, 1)).view(2, num_images, -1).detach()
        losses = ours(student(share.flatten(0, 1)).view(3, num_images, -1), targets, step)
        losses.loss.backward()
    grads = {key: parameter.grad for key, parameter in student.named_parameters() if parameter.grad is not None}
    return {"grads": grads, "report": losses.report, "state": ours.state}


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    torch.save({name: two_steps(name, NUM_IMAGES, rank * NUM_IMAGES) for name in NAMES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
