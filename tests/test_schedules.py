"""Schedules against their written definitions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from adaptkit.errors import UsageError
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.schedules import (
    Plan,
    cosine,
    ema_momentum,
    infinite_learning_rate,
    is_due,
    is_reset_step,
    learning_rate,
    to_steps,
)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("never", 0),
        ("0%", 0),
        ("0 steps", 0),
        ("25%", 50),
        ("12.5%", 25),
        ("100%", 200),
        ("0.1%", 1),  # something asked for happens
        ("1 epoch", 40),
        ("2 epochs", 80),
        ("0.5 epochs", 20),
        ("7 steps", 7),
        ("1 step", 1),
        ("500steps", 500),
        ("64 images", 4),
        ("100 images", 6),
        ("110 images", 7),  # 6.9 steps
        ("1 image", 1),
    ],
)
def test_durations(duration: str, steps: int) -> None:
    assert to_steps(duration, total_steps=200, steps_per_epoch=40, batch_size=16) == steps


@pytest.mark.parametrize("text", ["", "5", "5 minutes", "-1 steps", "steps", "5 % of it", "always"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        to_steps(text, 200, 40, 16)


def test_cosine_at_start_quarter_middle_and_end() -> None:
    assert cosine(0, 101, 4.0, 2.0) == pytest.approx(4.0)
    assert cosine(25, 101, 4.0, 2.0) == pytest.approx(3 + math.cos(math.pi / 4))
    assert cosine(50, 101, 4.0, 2.0) == pytest.approx(3.0)
    assert cosine(100, 101, 4.0, 2.0) == pytest.approx(2.0)
    assert cosine(150, 101, 4.0, 2.0) == pytest.approx(2.0)  # and stays there
    assert cosine(0, 1, 4.0, 2.0) == pytest.approx(4.0)  # a run of one step


def test_learning_rate_rises_linearly_then_falls_to_its_share() -> None:
    rates = [learning_rate(step, 111, 10, peak=0.5, final=0.1) for step in range(111)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx((0.5 + 0.05) / 2)
    assert rates[110] == pytest.approx(0.05)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 111, 0, 0.5, 0.1) == pytest.approx(0.5)
    assert learning_rate(4, 5, 5, 0.5, 0.1) == pytest.approx(0.5)  # a run that is all warm-up


def infinite_slowly(total: int, warmup: int, peak: float, constant: float, final: float) -> list[float]:
    """The infinite schedule written out, one phase after the other."""
    rates = [peak * number / warmup for number in range(1, warmup + 1)]
    annealing = max(0, min(round(total * 20 / 100), total - warmup))
    cooldown = max(0, min(round(total * 30 / 100), total - warmup - annealing))
    for number in range(cooldown):
        rates.append(peak * (constant + (1 - constant) * (1 + math.cos(math.pi * number / cooldown)) / 2))
    share = constant if cooldown else 1.0
    while len(rates) < total - annealing:
        rates.append(peak * share)
    for number in range(1, annealing + 1):
        rates.append(peak * math.exp(math.log(share) + (math.log(final) - math.log(share)) * number / annealing))
    return rates[:total]


@pytest.mark.parametrize("total", [*range(1, 11), 20, 37, 100, 999])
@pytest.mark.parametrize(("constant", "final"), [(0.5, 0.1), (0.3, 0.3), (1.0, 0.2), (1.0, 1.0), (0.7, 1e-9)])
def test_infinite_learning_rate_is_its_phases_one_after_the_other(total: int, constant: float, final: float) -> None:
    peak = 3e-4
    for warmup in sorted({0, 1, total // 10, total // 2, total * 3 // 4, total * 9 // 10, total, total + 3}):
        rates = [infinite_learning_rate(step, total, warmup, peak, constant, final) for step in range(total)]
        assert rates == pytest.approx(infinite_slowly(total, warmup, peak, constant, final), rel=1e-9)
        assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
        assert all(a < b for a, b in pairwise(rates[:warmup]))
        assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[max(0, warmup - 1) :]))
        if total >= 3 and warmup < total:
            assert rates[-1] == peak * final


def test_infinite_learning_rate_at_the_borders_of_its_phases() -> None:
    rates = [infinite_learning_rate(step, 100, 10, 1.0, 0.5, 0.125) for step in range(100)]
    assert rates[9] == rates[10] == 1.0  # the warm-up ends, the cooldown begins
    assert rates[25] == pytest.approx(0.75)
    assert rates[39] > rates[40] == 0.5
    assert set(rates[40:80]) == {0.5}
    assert rates[79] > rates[80]
    assert rates[89] == pytest.approx(0.25)  # halfway through an exponential decay: the geometric mean
    assert rates[98] > rates[99] == 0.125
    assert infinite_learning_rate(150, 100, 10, 1.0, 0.5, 0.125) == 0.125  # and stays there


@pytest.mark.parametrize(
    ("total", "rates"),
    [
        (1, [1.0]),
        (2, [1.0, 0.5]),
        (3, [1.0, 0.5, 0.25]),
        (5, [1.0, 0.75, 0.5, 0.5, 0.25]),
        (10, [1.0, 0.875, 0.625, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5 / 2**0.5, 0.25]),
    ],
)
def test_infinite_learning_rate_of_tiny_runs(total: int, rates: list[float]) -> None:
    assert [infinite_learning_rate(step, total, 0, 1.0, 0.5, 0.25) for step in range(total)] == pytest.approx(rates)


def test_momentum_scales_with_the_run() -> None:
    assert ema_momentum(0, 1000, None, 1.0) == pytest.approx(0.99)
    assert ema_momentum(0, 60, None, 1.0) == pytest.approx(1 - 10 / 60)
    assert ema_momentum(0, 20, None, 1.0) == ema_momentum(0, 5, None, 1.0) == pytest.approx(0.5)
    assert ema_momentum(0, 1001, 0.9, 1.0) == pytest.approx(0.9)
    assert ema_momentum(0, 1001, 0.0, 1.0) == 0.0
    assert ema_momentum(500, 1001, 0.9, 1.0) == pytest.approx(0.95)
    assert ema_momentum(1000, 1001, 0.9, 1.0) == pytest.approx(1.0)
    assert ema_momentum(1000, 1001, None, 0.97) == pytest.approx(0.97)
    assert ema_momentum(999, 1000, None, None) == pytest.approx(0.997)
    assert ema_momentum(4, 5, 0.9, None) == pytest.approx(0.5)


def test_what_is_due_when() -> None:
    assert [step for step in range(1, 26) if is_due(step, 10, 25)] == [10, 20, 25]
    assert [step for step in range(1, 21) if is_due(step, 10, 20)] == [10, 20]
    assert [step for step in range(1, 26) if is_due(step, 0, 25)] == [25]
    assert [step for step in range(1, 6) if is_due(step, 100, 5)] == [5]


def test_resets_leave_time_to_recover() -> None:
    def resets(every: int, total: int, warmup: int, least: int = 1) -> list[int]:
        return [step for step in range(total) if is_reset_step(step, every, total, warmup, least)]

    assert resets(25, 100, 5) == [0, 25, 50, 75]
    assert resets(0, 100, 5) == [0]
    assert resets(25, 100, 0) == [0, 25, 50, 75]
    assert resets(30, 100, 5) == [0, 30, 60, 90]  # 10 steps are left: just enough
    assert resets(30, 100, 6) == [0, 30, 60]
    assert resets(30, 100, 80) == [0]  # the first draw is always made
    assert resets(40, 160, 8, least=100) == [0]
    assert resets(50, 200, 8, least=100) == [0, 100]
    assert resets(50, 199, 8, least=100) == [0]
    assert resets(150, 600, 8, least=100) == [0, 150, 300, 450]


def test_the_default_recipe_is_bits_fixed_where_a_quarter_trains_no_head() -> None:
    short, long = (Plan.make(load_recipe(overrides={"steps": steps}), num_images=1000) for steps in (160, 800))
    assert [step for step in range(160) if short.is_reset(step)] == [0]
    assert [step for step in range(800) if long.is_reset(step)] == [0, 200, 400, 600]


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate(settings)


def plan(**settings: Any) -> Plan:
    """250 images in batches of 10, 4 epochs: 100 steps."""
    return Plan.make(recipe(**({"batch_size": 10, "epochs": 4} | settings)), num_images=250)


def test_plan_of_epochs() -> None:
    made = plan(
        optim={"warmup": "10%"},
        head={"warmup": "2 steps", "reset_every": "1 epoch"},
        probe={"every": "200 images"},
        checkpoint_every="never",
    )
    assert (made.batch_size, made.steps_per_epoch, made.total_steps) == (10, 25, 100)
    assert (made.lr_warmup, made.head_warmup, made.reset_every, made.probe_every) == (10, 2, 25, 20)
    assert made.checkpoint_every == 0


def test_plan_drops_the_last_incomplete_batch_and_takes_parts_of_epochs() -> None:
    assert Plan.make(recipe(batch_size=10, epochs=3), 259).total_steps == 75
    assert Plan.make(recipe(batch_size=10, epochs=0.5), 100).total_steps == 5
    assert Plan.make(recipe(batch_size=10, epochs=0.01), 100).total_steps == 1


def test_steps_win_over_epochs() -> None:
    made = plan(steps=7, probe={"every": "1 epoch"})
    assert (made.total_steps, made.probe_every) == (7, 25)


def test_plans_schedules_are_those_of_the_recipe() -> None:
    made = plan(
        optim={"lr": 0.2, "final_lr": 0.5, "warmup": "4 steps", "weight_decay": 0.1, "final_weight_decay": 0.3},
        head={"lr": 0.01, "warmup": "5%", "reset_every": "30%"},
        teacher={"momentum": 0.8, "final_momentum": 0.9},
        probe={"every": "40%"},
        checkpoint_every="50 steps",
    )
    assert [made.lr(step) for step in (0, 3, 4, 99)] == pytest.approx([0.05, 0.2, 0.2, 0.1])
    assert [made.head_lr(step) for step in (0, 99)] == pytest.approx([0.01, 0.005])
    assert made.head_lr(1) < made.head_lr(0)  # no warm-up
    assert (made.head_lr(49) + made.head_lr(50)) / 2 == pytest.approx(0.0075)
    assert [made.weight_decay(step) for step in (0, 99)] == pytest.approx([0.1, 0.3])
    assert (made.weight_decay(49) + made.weight_decay(50)) / 2 == pytest.approx(0.2)
    assert [made.momentum(step) for step in (0, 99)] == pytest.approx([0.8, 0.9])
    assert (made.momentum(49) + made.momentum(50)) / 2 == pytest.approx(0.85)
    assert [step for step in range(100) if made.is_reset(step)] == [0, 30, 60, 90]
    assert [step for step in range(1, 101) if made.is_probe(step)] == [40, 80, 100]
    assert [step for step in range(1, 101) if made.is_checkpoint(step)] == [50, 100]


def test_a_plan_of_the_infinite_schedule_cools_the_backbone_and_the_head() -> None:
    optim = {"schedule": "infinite", "lr": 0.2, "constant_lr": 0.5, "final_lr": 0.25, "warmup": "10 steps"}
    made = plan(optim=optim, head={"lr": 0.01})
    steps = (0, 9, 10, 25, 40, 79, 99)
    assert [made.lr(step) for step in steps] == pytest.approx([0.02, 0.2, 0.2, 0.15, 0.1, 0.1, 0.05])
    assert [made.head_lr(step) for step in (0, 15, 30, 79, 99)] == pytest.approx([0.01, 0.0075, 0.005, 0.005, 0.0025])


def test_a_run_goes_on_at_the_constant_rate_of_the_one_before() -> None:
    first = plan(optim={"schedule": "infinite", "lr": 0.2, "constant_lr": 0.4, "final_lr": 0.1})
    again = {"schedule": "infinite", "lr": 0.2 * 0.4, "constant_lr": 1, "final_lr": 0.1 / 0.4, "warmup": "never"}
    second = plan(optim=again)
    assert {second.lr(step) for step in range(80)} == {first.lr(79)}
    assert [second.lr(step) for step in range(80, 100)] == pytest.approx([first.lr(step) for step in range(80, 100)])


def test_the_cosine_schedule_is_the_default_to_the_last_bit() -> None:
    for made in (plan(), plan(optim={"schedule": "cosine", "constant_lr": 0.5})):
        for step in range(100):
            assert made.lr(step) == learning_rate(step, 100, 10, 3e-4, 0.1)
            assert made.head_lr(step) == learning_rate(step, 100, 0, 1e-3, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constant_lr": 0.4}, "constant_lr is a setting of schedule infinite, not of cosine"),
        (
            {"schedule": "infinite", "constant_lr": 0.05},
            r"constant_lr 0\.05 must lie in \[final_lr, 1\], here \[0\.1, 1\]",
        ),
        ({"schedule": "infinite", "final_lr": 0.6}, r"constant_lr 0\.5 must lie in \[final_lr, 1\]"),
        ({"schedule": "infinite", "constant_lr": 1.1}, r"optim\.constant_lr = .*less than or equal to 1"),
        ({"schedule": "infinite", "final_lr": 0}, "final_lr must be above 0 with schedule infinite"),
        ({"schedule": "linear"}, r"optim\.schedule = 'linear': .*'cosine' or 'infinite'"),
    ],
)
def test_rates_that_do_not_suit_the_schedule_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(overrides={f"optim.{key}": value for key, value in settings.items()})
    assert "\n" not in str(caught.value)


def test_rates_that_suit_the_schedule_are_taken() -> None:
    recipe(optim={"final_lr": 0.9})  # the constant rate plays no part in a cosine
    recipe(optim={"final_lr": 0})
    recipe(optim={"schedule": "infinite", "constant_lr": 0.1, "final_lr": 0.1})
    recipe(optim={"schedule": "infinite", "constant_lr": 1, "final_lr": 1})


def test_default_momentum_of_a_plan_follows_its_length() -> None:
    assert plan().momentum(0) == pytest.approx(0.9)
    assert plan(steps=1000).momentum(0) == pytest.approx(0.99)
