"""Time schedules: the times that a sampler visits. t = 1 is noise, t = 0 is data; both ends are always included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Shift:
    """Resolution-dependent time shift, as in the released `scheduler/scheduler_config.json`.

    mu is linear in the number of target tokens through (base_tokens, base_mu) and (max_tokens, max_mu).
    terminal: last time before 0, to which `base_times` stretches; None = no stretch.
    """

    base_tokens: int = 256
    max_tokens: int = 8192
    base_mu: float = 0.5
    max_mu: float = 0.9
    terminal: float | None = 0.02

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shift:
        """Read a diffusers `FlowMatchEulerDiscreteScheduler` config; absent values default to the released ones.

        `shift_terminal: null` means no stretch; `use_dynamic_shifting: false` means k = `shift` at every size. Raises
        CheckpointError for values out of range and for schedules that this module does not have.
        """
        other = [name for name in _OTHER_SCHEDULES if config.get(name)]
        if config.get("time_shift_type", "exponential") != "exponential":
            other.append(f"time_shift_type {config['time_shift_type']!r}")
        if other:
            raise CheckpointError(
                f"the scheduler asks for {', '.join(other)}, which this version does not have; take scheduler/ from a "
                "Qwen-Image-Edit or UniPic 3 repository"
            )
        values: dict[str, Any] = {
            field: _number(config, key) for field, key in _NAMES.items() if config.get(key) is not None
        }
        if "shift_terminal" in config and config["shift_terminal"] is None:
            values["terminal"] = None
        if not config.get("use_dynamic_shifting", True):
            k = _number(config, "shift") if "shift" in config else 1.0
            if k <= 0:
                raise CheckpointError(f"the scheduler's shift should be above 0, got {k:g}")
            values["base_mu"] = values["max_mu"] = math.log(k)
        shift = cls(**values)
        if shift.terminal is not None and not 0 <= shift.terminal < 1:
            raise CheckpointError(f"the scheduler's shift_terminal should be from 0 to below 1, got {shift.terminal}")
        if shift.base_tokens == shift.max_tokens and shift.base_mu != shift.max_mu:
            raise CheckpointError(
                f"the scheduler's base_image_seq_len and max_image_seq_len are both {shift.base_tokens} but base_shift "
                f"{shift.base_mu} and max_shift {shift.max_mu} differ; correct one of them"
            )
        for tokens in (_USUAL_TOKENS, 1):
            resolution_shift(tokens, shift)
        return shift


ROUNDINGS = ("none", "bf16", "bf16_thousandths")
"""Rounding of times for bfloat16 activations: none; t itself, as in the release's few-step pipeline; or 1000 t and then
the quotient by 1000, as in its base pipeline (QwenImageEditPipeline of diffusers)."""

_NAMES = {
    "base_tokens": "base_image_seq_len",
    "max_tokens": "max_image_seq_len",
    "base_mu": "base_shift",
    "max_mu": "max_shift",
    "terminal": "shift_terminal",
}
_OTHER_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
_LARGEST = 1e6
_MOST_MU = 20.0
"""Largest |mu|: further out all times are 0 or 1 in float64, or none is a number. The released line reaches 0.7 at 1024
x 1024 pixels and 13.7 at 8192 x 8192."""
_USUAL_TOKENS = 4096
"""Target tokens of 1024 x 1024 pixels."""


def _number(config: dict[str, Any], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise CheckpointError(f"the scheduler's {name} should be a number, got {str(value)[:60]}")
    if name.endswith("_shift") and abs(value) > 10:
        raise CheckpointError(f"the scheduler's {name} should be from -10 to 10, got {value}")
    return value


def resolution_shift(num_target_tokens: int, shift: Shift = Shift()) -> float:
    """Compute k = exp(mu), about 2.0 for 1024^2 pixels (4096 tokens). Raises CheckpointError for a useless mu."""
    mu = shift.base_mu
    if shift.max_mu != shift.base_mu:
        slope = (shift.max_mu - shift.base_mu) / (shift.max_tokens - shift.base_tokens)
        mu = shift.base_mu + slope * (num_target_tokens - shift.base_tokens)
    if not abs(mu) <= _MOST_MU:
        raise CheckpointError(
            f"the scheduler's time shift for {num_target_tokens} tokens is exp({mu:.4g}), expected from "
            f"exp(-{_MOST_MU:g}) to exp({_MOST_MU:g}); correct base_image_seq_len, max_image_seq_len and the shifts, "
            "or take scheduler/ from a Qwen-Image-Edit or UniPic 3 repository"
        )
    return math.exp(mu)


def shift_times(t: Tensor, k: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t), with 0 and 1 as fixed points."""
    return k * t / (1 + (k - 1) * t)


def percent_time(percent: float, k: float) -> float:
    """Time at a share of the run's steps, from 1 at 0 to 0 at 1: a linear schedule shifted by k, as ComfyUI's
    `percent_to_sigma`."""
    return float(shift_times(torch.tensor(1 - percent, dtype=torch.float64), k))


def few_step_times(steps: int, num_target_tokens: int, shift: Shift = Shift()) -> Tensor:
    """Schedule of the distilled models, [steps + 1] float64 from 1 to 0: linspace, shifted, no terminal stretch."""
    _check(steps)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_times(times, resolution_shift(num_target_tokens, shift))


def fixed_shift_times(steps: int, k: float) -> Tensor:
    """Schedule of step LoRAs, [steps + 1] float64 from 1 to 0: linspace, shifted by the same k at every size."""
    _check(steps)
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), k)


def base_times(steps: int, num_target_tokens: int, shift: Shift = Shift()) -> Tensor:
    """Schedule of the base models, [steps + 1] float64 from 1 to 0: linspace(1, 1/N, N), shifted, stretched to end at
    `terminal`, then 0."""
    _check(steps)
    if steps == 1:
        return torch.tensor([1.0, 0.0], dtype=torch.float64)
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    times = shift_times(times, resolution_shift(num_target_tokens, shift))
    if shift.terminal:
        times = 1 - (1 - times) * (1 - shift.terminal) / (1 - times[-1])
    return torch.cat([times, times.new_zeros(1)])


@overload
def rounded_time(t: Tensor, rounding: str, dtype: torch.dtype) -> Tensor: ...
@overload
def rounded_time(t: float, rounding: str, dtype: torch.dtype) -> Tensor | float: ...
def rounded_time(t: Tensor | float, rounding: str, dtype: torch.dtype) -> Tensor | float:
    """Round t as the release does for bfloat16 activations; other dtypes and "none" return t.

    rounding: one of ROUNDINGS. dtype: of the network's activations. A rounded time is a float32 tensor of t's shape. At
    1024 x 1024 pixels and 8 steps the rounding changes the sinusoids of the time embedding by up to 0.39 of their norm.
    """
    if rounding == "none" or dtype != torch.bfloat16:
        return t
    if rounding == "bf16":
        return torch.as_tensor(t).to(torch.bfloat16).float()
    return (torch.as_tensor(t, dtype=torch.float32) * 1000).to(torch.bfloat16).div(1000).float()


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
