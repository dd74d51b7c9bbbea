"""The coding rate against numpy's slogdet, its failure path, and several processes against one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptkit.objectives.bits import Bits
from adaptkit.objectives.coding_rate import coding_rate, max_coding_rate
from adaptkit.settings import ObjectiveSettings

NUM_IMAGES, NUM_BITS, NUM_PROCESSES = 6, 8, 2


def logits(num_images: int, num_bits: int, offset: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(num_images * 100 + num_bits)
    return 3 * torch.randn(num_images, num_bits, generator=generator) + offset


def by_numpy(x: Tensor, eps: float, centre: bool) -> float:
    rows = x.detach().double().numpy()
    rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    if centre:
        rows = rows - rows.mean(0)
    num_images, num_bits = rows.shape
    sign, logdet = np.linalg.slogdet(np.eye(num_bits) + num_bits / (num_images * eps) * rows.T @ rows)
    assert sign == 1
    return float(logdet) / 2


@pytest.mark.parametrize("shape", [(1, 4), (4, 16), (16, 4), (64, 32), (32, 256)])
@pytest.mark.parametrize("eps", [0.5, 0.05])
@pytest.mark.parametrize("centre", [True, False])
def test_value_is_half_the_log_determinant(shape: tuple[int, int], eps: float, centre: bool) -> None:
    x = logits(*shape)
    assert float(coding_rate(x, eps, centre)) == pytest.approx(by_numpy(x, eps, centre), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("num_images", "num_bits"), [(4, 4), (4, 16), (16, 4), (1, 8)])
def test_no_rows_exceed_the_largest_rate_and_orthogonal_ones_reach_it(num_images: int, num_bits: int) -> None:
    most = max_coding_rate(num_bits, num_images, 0.5)
    even = torch.eye(num_bits).repeat(num_images, 1)[:num_images]
    assert float(coding_rate(even, centre=False)) == pytest.approx(most, rel=1e-5)
    for seed in range(20):
        x = torch.randn(num_images, num_bits, generator=torch.Generator().manual_seed(seed))
        assert float(coding_rate(x, centre=False)) <= most * (1 + 1e-6)


@pytest.mark.parametrize("centre", [True, False])
def test_gradient_is_that_of_the_formula(centre: bool) -> None:
    ours, naive = logits(12, 6).requires_grad_(), logits(12, 6).double().requires_grad_()
    coding_rate(ours, 0.5, centre).backward()
    rows = naive / naive.norm(dim=1, keepdim=True)
    rows = rows - rows.mean(0) if centre else rows
    (0.5 * torch.logdet(torch.eye(6).double() + 6 / (12 * 0.5) * rows.T @ rows)).backward()
    torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=1e-4, atol=1e-6)


def test_centred_rate_ignores_an_offset_shared_by_all_images() -> None:
    same = torch.full((10, 8), 2.0)
    assert float(coding_rate(same, centre=True)) == pytest.approx(0, abs=1e-4)
    assert float(coding_rate(same, centre=False)) > 1


def test_scale_of_a_row_does_not_matter() -> None:
    x = logits(9, 5)
    scaled = x * torch.linspace(0.1, 40, 9).unsqueeze(1)
    assert float(coding_rate(scaled)) == pytest.approx(float(coding_rate(x)), rel=1e-5)


def test_logits_of_an_autocast_network_are_computed_in_float32() -> None:
    layer = nn.Linear(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        x = layer(logits(24, 16))
    assert x.dtype == torch.bfloat16
    rate = coding_rate(x)
    assert rate.dtype == torch.float32
    assert float(rate.detach()) == pytest.approx(by_numpy(x.float(), 0.5, True), rel=1e-5)


def test_a_failed_factor_gives_nan_and_the_step_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (real(matrix)[0], torch.tensor(3)))
    x = logits(20, 6).requires_grad_()
    rate = coding_rate(x)
    assert math.isnan(rate.detach())
    rate.backward()  # the divergence check sees the NaN in the log


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 64])
def test_equal_or_few_directions_have_a_factor_at_the_smallest_eps_in_use(rank: int, centre: bool) -> None:
    x = logits(64, rank, offset=0.0) @ logits(rank, 512, offset=0.0)
    x = x.requires_grad_()
    rate = coding_rate(x, 0.05, centre)
    rate.backward()
    assert math.isfinite(rate.detach())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_matrix_that_really_has_no_factor_gives_nan() -> None:
    x = logits(40, 300)  # rank 40 of 300: at this eps the rounding of float32 makes it indefinite
    assert math.isnan(coding_rate(x, eps=1e-14))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_nan_out(bad: float) -> None:
    x = logits(5, 4)
    x[2, 1] = bad
    assert math.isnan(coding_rate(x))


def one_step(num_images: int, first: int) -> dict[str, Tensor]:
    """Loss of the whole objective, the rate, and their gradients on images `first`, ... of a fixed batch."""
    torch.manual_seed(0)
    network = nn.Linear(5, NUM_BITS)
    inputs = torch.randn(3, NUM_IMAGES * NUM_PROCESSES, 5)[:, first : first + num_images]  # (V, n, 5)
    targets = torch.randn(2, NUM_IMAGES * NUM_PROCESSES, NUM_BITS)[:, first : first + num_images]
    objective = Bits(ObjectiveSettings(num_bits=NUM_BITS, beta=5.0, rate_target=0.9))  # the rate's gradient must weigh
    losses = objective(network(inputs), targets, step=0)
    losses.loss.backward()
    result = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return result | {"loss": losses.loss.detach(), "rate": losses.report["coding_rate"]}


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    torch.save(one_step(NUM_IMAGES, rank * NUM_IMAGES), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_give_the_value_and_gradient_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_process, args=(str(tmp_path),), nprocs=NUM_PROCESSES)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(NUM_PROCESSES)]
    whole = one_step(NUM_IMAGES * NUM_PROCESSES, first=0)
    assert set(whole) == {"weight", "bias", "loss", "rate"}
    for name, expected in whole.items():
        mean = torch.stack([share[name] for share in shares]).mean(0)  # what DDP does to gradients
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)
    for share in shares:
        torch.testing.assert_close(share["rate"], whole["rate"])
    assert not torch.allclose(shares[0]["weight"], shares[1]["weight"])  # the shares do differ
