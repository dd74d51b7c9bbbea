"""The projection head: embedding -> logits of the binary channel. Redrawn now and then, never exported.

DINO's head without its bottleneck normalisation and prototypes (arXiv 2104.14294; arXiv 2602.09764, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INIT_STD = 0.02


class ProjectionHead(nn.Sequential):
    """3-layer MLP with GELU: (N, embed_dim) -> (N, num_bits)."""

    def __init__(self, embed_dim: int, num_bits: int, hidden_dim: int = 2048) -> None:
        super().__init__(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, num_bits),
        )


@torch.no_grad()
def draw_(head: nn.Module, seed: int) -> None:
    """Draw every linear layer anew: truncated normal weights (std 0.02), zero biases.

    The draw is made on the CPU from its own generator, so that all processes and devices get the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            weight = torch.empty(layer.weight.shape, dtype=torch.float32)
            nn.init.trunc_normal_(weight, std=INIT_STD, a=-2.0, b=2.0, generator=generator)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def last_bias(head: nn.Module) -> Tensor:
    """The bias of the head's last linear layer, (num_bits,)."""
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1].bias
