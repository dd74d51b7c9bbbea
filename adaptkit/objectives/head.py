"""Projection heads: embedding -> what the objective compares. Redrawn now and then, no part of the backbone.

All are DINO's 3-layer MLP (arXiv 2104.14294). BITS takes its outputs as logits (arXiv 2602.09764, section 3), SimDINO
scales them to length 1 (arXiv 2502.10385), and DINO compares those with prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

INIT_STD = 0.02


class ProjectionHead(nn.Sequential):
    """3-layer MLP with GELU: (N, embed_dim) -> (N, output_dim)."""

    def __init__(self, embed_dim: int, output_dim: int, hidden_dim: int = 2048) -> None:
        super().__init__(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, output_dim),
        )


class UnitRows(nn.Module):
    """Scales rows to length 1, in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return normalize(x.float(), dim=1)


class UnitHead(ProjectionHead):
    """The same with outputs of length 1."""

    def __init__(self, embed_dim: int, output_dim: int, hidden_dim: int = 2048) -> None:
        super().__init__(embed_dim, output_dim, hidden_dim)
        self.append(UnitRows())


class Prototypes(nn.Linear):
    """Cosines between rows of length 1 and the rows of `weight`: a weight-normalised layer whose norms stay 1.

    `weight` is the unnormalised parameter, so a state dict holds plain tensors. The product is float32 also under
    autocast: DINO divides it by temperatures of 0.04 and 0.1, and the rounding of bf16 with it.
    """

    def __init__(self, input_dim: int, num_prototypes: int) -> None:
        super().__init__(input_dim, num_prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, input_dim) -> (N, num_prototypes)."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), normalize(self.weight, dim=1))


class PrototypeHead(nn.Module):
    """DINO's head: MLP, rows of length 1, prototypes. (N, embed_dim) -> (N, num_prototypes)."""

    def __init__(self, embed_dim: int, bottleneck_dim: int, num_prototypes: int, hidden_dim: int = 2048) -> None:
        super().__init__()
        self.mlp = UnitHead(embed_dim, bottleneck_dim, hidden_dim)
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, embed_dim) -> (N, num_prototypes), float32."""
        logits: Tensor = self.prototypes(self.mlp(x))
        return logits


@torch.no_grad()
def draw_(head: nn.Module, seed: int) -> None:
    """Draw every linear layer anew: truncated normal weights (std 0.02), zero biases.

    Prototypes are uniform within 1 / sqrt(inputs), as DINO's code leaves them: their length decides how fast they turn.
    The draw is made on the CPU from its own generator, so that all processes and devices get the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            weight = torch.empty(layer.weight.shape, dtype=torch.float32)
            if isinstance(layer, Prototypes):
                bound = layer.in_features**-0.5
                nn.init.uniform_(weight, -bound, bound, generator=generator)
            else:
                nn.init.trunc_normal_(weight, std=INIT_STD, a=-2.0, b=2.0, generator=generator)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def last_bias(head: nn.Module) -> Tensor:
    """The bias of the head's last linear layer, (num_bits,)."""
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1].bias
