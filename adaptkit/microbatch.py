"""Less memory for the same step: the backbone takes the batch in parts, or computes activations twice.

An objective is of the whole batch, so the gradients of its parts cannot simply be added up. Instead every part is
embedded without keeping its activations; head and objective see the embeddings of the whole batch; and when the
gradient comes back to the embeddings of a part, that part is embedded once more, now to take its gradient further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from adaptkit.backbones import Backbone
from adaptkit.errors import BackboneError, UsageError
from adaptkit.recipe import Recipe


def embed_in_parts(
    backbone: nn.Module, views: Iterable[Tensor], num_images: int, micro_batch: int | None = None
) -> Tensor:
    """Views [(G * N, 3, S, S), (L * N, 3, s, s)] -> (V * N, D), with the views of `micro_batch` images at once.

    None: of all. A part is as many rows as that many images have views of one size, whosever they are: no backbone
    that this is for mixes rows. The last part of a size may be smaller.
    """
    if micro_batch is None or micro_batch >= num_images:
        return torch.cat([backbone(view) for view in views])
    parts = [part for view in views for part in _cut(view, len(view) // num_images * micro_batch)]
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    embeddings: Tensor = _EmbedParts.apply(backbone, parts, *parameters)
    return embeddings


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class _EmbedParts(torch.autograd.Function):
    """(N, D) embeddings of the parts, N rows together, as a function of the parameters.

    As these get their gradients through the graph, all at the end, DDP and the gradient scaler need not know.
    """

    @staticmethod
    def forward(ctx: Any, backbone: nn.Module, parts: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        device = parts[0].device.type
        ctx.backbone, ctx.parts, ctx.parameters = backbone, parts, parameters
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.seeds = torch.randint(2**62, (len(parts),)).tolist()  # for drop path; from the seed of the step
        return torch.cat([_embed(ctx, part, seed) for part, seed in zip(parts, ctx.seeds, strict=True)])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        slices = gradient.tensor_split(list(accumulate(len(part) for part in ctx.parts))[:-1])
        for part, seed, its_gradient in zip(ctx.parts, ctx.seeds, slices, strict=True):
            with torch.enable_grad():
                embeddings = _embed(ctx, part, seed)
            _add_(sums, list(torch.autograd.grad(embeddings, ctx.parameters, its_gradient, allow_unused=True)))
        return None, None, *sums


def _add_(sums: list[Tensor | None], gradients: list[Tensor | None]) -> None:
    """Add tensor by tensor, and let go of what is added; not in place, as two gradients may share their memory."""
    for index in range(len(sums)):
        total, new, gradients[index] = sums[index], gradients[index], None
        sums[index] = new if total is None else total if new is None else total + new


def _embed(ctx: Any, part: Tensor, seed: int) -> Tensor:
    """The same for the same seed. A cast that autocast has kept from a pass without gradient would have none."""
    device, dtype, is_on = ctx.autocast
    torch.manual_seed(seed)
    with torch.autocast(device, dtype, is_on, cache_enabled=False):
        embeddings: Tensor = ctx.backbone(part)
    return embeddings


def has_batchnorm(network: nn.Module) -> bool:
    """Whether embeddings depend on the other images of the batch."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


@contextmanager
def fixed_statistics(network: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics as they were: a forward pass that is repeated would move them again."""
    buffers = [b for module in network.modules() if isinstance(module, _BatchNorm) for b in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def checkpoint_blocks_(network: nn.Module, on: bool = True) -> bool:
    """Keep only what lies between the network's blocks, as timm's networks can; whether this one could."""
    switch = getattr(network, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(on)
    except Exception:  # timm asserts where it cannot; modules of others raise what they like
        return False
    return True


def check_memory_settings(recipe: Recipe, backbone: Backbone) -> None:
    """Raise `UsageError` or `BackboneError` if the recipe would save memory in a way this backbone does not allow."""
    network = backbone.module
    if recipe.micro_batch is not None and has_batchnorm(network):
        what = f"micro_batch {recipe.micro_batch}: the BatchNorm of {backbone.name} needs the whole batch at once"
        raise UsageError(f"{what}; instead use {advice(recipe, network)}")
    if recipe.grad_checkpointing and not (checkpoint_blocks_(network) and checkpoint_blocks_(network, False)):
        what = f"{backbone.name}: knows no grad_checkpointing (timm's set_grad_checkpointing)"
        raise BackboneError(f"{what}; instead use {advice(recipe, network, recipe.batch_size)}")


def advice(recipe: Recipe, network: nn.Module, images: int = 1) -> str:
    """Settings with which a step takes less memory than with this many images at once, in words."""
    settings = [f"--set micro_batch={images // 2}"] if images > 1 and not has_batchnorm(network) else []
    if not recipe.grad_checkpointing and checkpoint_blocks_(network) and checkpoint_blocks_(network, False):
        settings.append("--set grad_checkpointing=true")
    settings += [f"a --batch-size below {recipe.batch_size}", "fewer views.num_local"]
    return f"{', '.join(settings)} or a smaller image_px"
