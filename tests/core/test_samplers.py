"""Samplers on Gaussian data, whose velocity and flow are known in closed form. Schedules' ends and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unipic_core.flow import x0_to_velocity
from unipic_core.samplers import NonFiniteLatent, sample_consistency, sample_euler, seeded_noise
from unipic_core.schedules import Shift, base_times, few_step_times, resolution_shift

MEAN, STD = 0.7, 0.4


def std_at(t: float) -> float:
    """Of x_t = (1 - t) x0 + t eps with x0 ~ N(MEAN, STD^2)."""
    return math.sqrt((1 - t) ** 2 * STD**2 + t**2)


def velocity(x: Tensor, t: float) -> Tensor:
    """E[eps - x0 | x_t = x]."""
    centred = (x - (1 - t) * MEAN) / std_at(t) ** 2
    return t * centred - (MEAN + (1 - t) * STD**2 * centred)


def flow_map(x: Tensor, t: float) -> Tensor:
    """Where the ODE takes x_t at t = 0: the quantile is kept."""
    return MEAN + STD * (x - (1 - t) * MEAN) / std_at(t)


def consistency(x: Tensor, t: float) -> Tensor:
    """F with x - t F = flow_map(x, t)."""
    return x0_to_velocity(x, flow_map(x, t), t)


def start(n: int = 1000) -> Tensor:
    return torch.randn(1, n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_euler_converges_at_first_order() -> None:
    x1 = start()
    errors = []
    for steps in (32, 64, 128):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        errors.append(float((sample_euler(velocity, x1, times) - (MEAN + STD * x1)).abs().max()))
    assert errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_consistency_sampler_with_the_exact_flow_map_lands_on_data(steps: int) -> None:
    x1 = start(20000)
    noise = seeded_noise(x1.shape, 5)
    x0 = sample_consistency(consistency, x1, few_step_times(steps, 64).tolist(), noise)
    assert x0.dtype == torch.float64
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x0.std()) == pytest.approx(STD, abs=0.01)
    if steps == 1:
        torch.testing.assert_close(x0, MEAN + STD * x1)


def test_consistency_sampler_step_by_step() -> None:
    x1, times = start(3), [1.0, 0.5, 0.0]
    eps = torch.ones_like(x1)
    calls: list[tuple[int, float]] = []
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return eps

    x0 = sample_consistency(consistency, x1, times, noise, lambda step, t, x_t, x0: calls.append((step, t)))
    half = 0.5 * flow_map(x1, 1.0) + 0.5 * eps
    torch.testing.assert_close(x0, flow_map(half, 0.5))
    assert asked == [0]  # not after the last step
    assert calls == [(0, 0.5), (1, 0.0)]


def test_callback_sees_the_prediction() -> None:
    seen = {}
    x1 = start(2)
    sample_euler(velocity, x1, [1.0, 0.4, 0.0], lambda step, t, x_t, x0: seen.update({step: (t, x_t, x0)}))
    assert [t for t, _, _ in seen.values()] == [0.4, 0.0]
    torch.testing.assert_close(seen[0][2], torch.full_like(x1, MEAN))  # E[x0 | x_1] is the mean
    torch.testing.assert_close(seen[0][1], x1 - 0.6 * velocity(x1, 1.0))


def test_seeded_noise() -> None:
    a, b = seeded_noise((2, 3), 7), seeded_noise((2, 3), 7)
    torch.manual_seed(1)
    first = a(0)
    torch.manual_seed(2)
    assert torch.equal(first, b(0))
    assert not torch.equal(a(0), a(1))
    assert not torch.equal(a(0), seeded_noise((2, 3), 8)(0))
    assert seeded_noise((2, 3), -5)(0).isfinite().all()


def test_non_finite_latent_names_the_step() -> None:
    def broken(x: Tensor, t: float) -> Tensor:
        return x * float("nan") if t < 0.6 else x

    for run in (
        lambda: sample_euler(broken, start(2), [1.0, 0.75, 0.5, 0.0]),
        lambda: sample_consistency(broken, start(2), [1.0, 0.75, 0.5, 0.0], seeded_noise((1, 2, 4), 0)),
    ):
        with pytest.raises(NonFiniteLatent, match=r"step 3.*bfloat16 or float32"):
            run()


@pytest.mark.parametrize("make", [base_times, few_step_times])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_schedules_run_from_one_to_zero(make, steps: int) -> None:
    times = make(steps, 1024)
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert (times[1:] < times[:-1]).all()


def test_schedule_details() -> None:
    assert float(base_times(50, 4096)[-2]) == pytest.approx(0.02, abs=1e-12)
    assert resolution_shift(4096) == pytest.approx(2.0, abs=0.01)
    config = {"base_shift": 0.1, "max_image_seq_len": 512, "shift_terminal": None, "other": 1}
    assert Shift.from_config(config) == Shift(base_mu=0.1, max_tokens=512)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        few_step_times(0, 64)
