"""Time schedules: which t a sampler visits. t = 1 is noise, t = 0 is data; both ends are always included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """The resolution-dependent shift, as in the released `scheduler/scheduler_config.json`.

    mu is linear in the number of target tokens through (base_tokens, base_mu) and (max_tokens, max_mu).
    """

    base_tokens: int = 256
    max_tokens: int = 8192
    base_mu: float = 0.5
    max_mu: float = 0.9
    terminal: float = 0.02

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shift:
        """From a diffusers `FlowMatchEulerDiscreteScheduler` config; absent values keep the released ones."""
        names = {
            "base_tokens": "base_image_seq_len",
            "max_tokens": "max_image_seq_len",
            "base_mu": "base_shift",
            "max_mu": "max_shift",
            "terminal": "shift_terminal",
        }
        return cls(**{ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None})


def resolution_shift(num_target_tokens: int, shift: Shift = Shift()) -> float:
    """k = exp(mu), about 2.0 for 1024^2 pixels (4096 tokens)."""
    slope = (shift.max_mu - shift.base_mu) / (shift.max_tokens - shift.base_tokens)
    return math.exp(shift.base_mu + slope * (num_target_tokens - shift.base_tokens))


def shift_times(t: Tensor, k: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t); keeps 0 and 1 where they are."""
    return k * t / (1 + (k - 1) * t)


def few_step_times(steps: int, num_target_tokens: int, shift: Shift = Shift()) -> Tensor:
    """[steps + 1] float64 from 1 to 0: linspace, shifted, no terminal stretch (the distilled models' schedule)."""
    _check(steps)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_times(times, resolution_shift(num_target_tokens, shift))


def base_times(steps: int, num_target_tokens: int, shift: Shift = Shift()) -> Tensor:
    """[steps + 1] float64 from 1 to 0: linspace(1, 1/N, N), shifted, stretched to end at `terminal`, then 0."""
    _check(steps)
    if steps == 1:
        return torch.tensor([1.0, 0.0], dtype=torch.float64)
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    times = shift_times(times, resolution_shift(num_target_tokens, shift))
    if shift.terminal:
        times = 1 - (1 - times) * (1 - shift.terminal) / (1 - times[-1])
    return torch.cat([times, times.new_zeros(1)])


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
