"""The coding rate: the log-volume that the normalised logits of a batch fill, in nats.

    R(a) = 1/2 logdet(I_B + B / (N eps) A^T A),   A = rows of a / ||a||_2      (SimDINO, arXiv 2502.10385, eq. 5)

N counts the images of all processes: A^T A is summed over them, so that one process with batch 2n and two with
batch n give the same rate and, with DDP's mean over processes, the same gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; the backward pass sums the gradients too, as every process uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """Differentiable sum of `x` over all processes; `x` itself when there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _AllReduceSum.apply(x)  # type: ignore[no-any-return]
    return x


def num_processes() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def coding_rate(logits: Tensor, eps: float = 0.5, centre: bool = True) -> Tensor:
    """(N, B) logits of this process -> scalar coding rate of the global batch, nats.

    `centre` subtracts the global mean of A's rows, so that the rate is of their covariance (the paper's
    Cov[a / ||a||]); without it an offset shared by all images counts as volume.
    """
    return rate_of_rows(torch.nn.functional.normalize(logits.float(), dim=1), eps, centre)


def rate_of_rows(rows: Tensor, eps: float, centre: bool) -> Tensor:
    """The coding rate of the rows as they are, (N, B) float32 of length at most 1 -> scalar, nats.

    Call it outside autocast. The matrix has eigenvalues in [1, 1 + B / eps], so the Cholesky factor of finite rows
    exists, unless eps is so small that float32 rounds the 1 away; then, and for rows that are not finite, the rate is
    NaN and the loop's divergence check takes over. Whether it exists is not read back: the host would wait for it.
    """
    num_images = rows.shape[0] * num_processes()
    num_bits = rows.shape[1]
    moments = all_reduce_sum(torch.cat([rows.T @ rows, rows.sum(0, keepdim=True)]))  # (B + 1, B), one message
    gram, total = moments[:-1], moments[-1]
    if centre:
        gram = gram - torch.outer(total, total) / num_images
    eye = torch.eye(num_bits, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(eye + num_bits / (num_images * eps) * gram)
    rate: Tensor = factor.diagonal().log().sum()  # 1/2 logdet(L L^T)
    return torch.where(failed == 0, rate, math.nan)


def rate_weight(num_bits: int, num_images: int) -> float:
    """gamma = (B + N) / (B N), which balances the coding rate (SimDINO's code)."""
    return (num_bits + num_images) / (num_bits * num_images)


def max_coding_rate(num_bits: int, num_images: int, eps: float) -> float:
    """The rate of rows of length 1 that spread evenly over as many directions as they can, nats.

    r = min(B, N) equal eigenvalues N / r of A^T A: r / 2 log(1 + B / (r eps)). Centred rows stay slightly below it.
    """
    directions = min(num_bits, num_images)
    return directions / 2 * math.log1p(num_bits / (directions * eps))
