"""Samplers on Gaussian data, whose velocity and flow are known in closed form. Schedules' ends and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unipic_core.errors import CheckpointError, UniPicError
from unipic_core.sampling.flow import x0_to_velocity
from unipic_core.sampling.samplers import NonFiniteLatent, sample_consistency, sample_euler, seeded_noise
from unipic_core.sampling.schedules import Shift, base_times, few_step_times, resolution_shift

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
        assert issubclass(NonFiniteLatent, UniPicError)
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
    assert Shift.from_config(config) == Shift(base_mu=0.1, max_tokens=512, terminal=None)
    assert Shift.from_config({}) == Shift()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        few_step_times(0, 64)


@pytest.mark.parametrize(
    "change", [{}, {"shift_terminal": None}, {"use_dynamic_shifting": False, "shift": 3.0}, {"max_shift": 0.5}]
)
def test_scheduler_configs_give_what_diffusers_gives(change: dict[str, object]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    config |= {"shift": 1.0, "shift_terminal": 0.02, "use_dynamic_shifting": True, **change}
    shift = Shift.from_config(config)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist(), mu=math.log(resolution_shift(4096, shift)))
    torch.testing.assert_close(base_times(8, 4096, shift).float(), theirs.sigmas, rtol=1e-5, atol=1e-6)


def test_a_size_at_which_no_time_is_a_number_is_refused() -> None:
    steep = Shift.from_config({"max_image_seq_len": 512})
    assert few_step_times(8, 4096, steep).isfinite().all()
    with pytest.raises(CheckpointError, match="time shift for 1048576 tokens is exp"):
        few_step_times(8, 1024**2, steep)


def test_one_sequence_length_in_the_scheduler_config() -> None:
    same = {"base_image_seq_len": 256, "max_image_seq_len": 256}
    with pytest.raises(CheckpointError, match="both 256 but base_shift 0.5 and max_shift 0.9 differ"):
        Shift.from_config(same)
    flat = Shift.from_config(same | {"max_shift": 0.5})
    assert resolution_shift(64, flat) == resolution_shift(4096, flat) == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_karras_sigmas": True}, "asks for use_karras_sigmas, which this version does not have"),
        ({"time_shift_type": "linear"}, "time_shift_type 'linear'"),
        ({"base_shift": "a"}, "base_shift should be a number, got a"),
        ({"max_shift": 1e5}, "max_shift should be from -10 to 10"),
        ({"shift_terminal": 1.0}, "shift_terminal should be from 0 to below 1"),
        ({"use_dynamic_shifting": False, "shift": 0}, "shift should be above 0"),
        ({"max_image_seq_len": float("nan")}, "max_image_seq_len should be a number"),
        (
            {"max_image_seq_len": 257},
            r"time shift for 4096 tokens is exp\(1536\), expected from exp\(-20\) to exp\(20\)",
        ),
        ({"base_shift": 0.9, "max_shift": 0.5, "max_image_seq_len": 257}, r"for 4096 tokens is exp\(-1535\)"),
        ({"base_image_seq_len": 8191, "base_shift": 0.5}, r"for 4096 tokens is exp\(-1638\)"),
        ({"base_image_seq_len": 4095, "max_image_seq_len": 4100}, r"for 1 tokens is exp\(-327\)"),
        ({"use_dynamic_shifting": False, "shift": 1e-300}, r"is exp\(-690.8\)"),
    ],
)
def test_wrong_scheduler_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Shift.from_config(config)
