"""Samplers: functions from noise to latents. The network enters as a function velocity(x_t, t) -> v.

Shapes are given as the pipeline packs them, [B, N, 4C]; the samplers take any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UniPicError
from .flow import add_noise, velocity_to_x0

Velocity = Callable[[Tensor, float], Tensor]
"""(x_t [B, N, 4C], t) -> v [B, N, 4C]."""

Prediction = Callable[[Tensor, float], Tensor]
"""(x_t [B, N, 4C], t) -> x0 [B, N, 4C]."""

Callback = Callable[[int, float, Tensor, Tensor], None]
"""Called with (step, t of the new x_t, x_t, x0 predicted in this step)."""

NoiseSource = Callable[[int], Tensor]
"""Step -> new eps [B, N, 4C]."""

ADVICE = (
    "use bfloat16 or float32 (never float16), switch off quantised attention, and check that the weights loaded "
    "completely (`unipic info`)"
)


class NonFiniteLatent(UniPicError):
    """A latent became NaN or infinite. step: counted from 0. advice: remedies, for the message."""

    def __init__(self, step: int, advice: str = ADVICE) -> None:
        super().__init__(f"the latent became NaN or infinite in step {step + 1}; {advice}")
        self.step = step


def sample_euler(velocity: Velocity, x_t: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Integrate dx/dt = v by Euler's method from times[0] to times[-1], in x_t's dtype.

    x_t: [B, N, 4C] at times[0]. Returns the latent at times[-1]. Raises NonFiniteLatent.
    """
    for step, (t, t_next) in enumerate(pairwise(_floats(times))):
        v = velocity(x_t, t).to(x_t)
        x0 = velocity_to_x0(x_t, v, t)
        x_t = check_finite(x_t + (t_next - t) * v, step)
        if callback:
            callback(step, t_next, x_t, x0)
    return x_t


def sample_consistency(
    velocity: Velocity, x_t: Tensor, times: Sequence[float], noise: NoiseSource, callback: Callback | None = None
) -> Tensor:
    """Multistep consistency sampling: predict x0, re-noise to the next time (UniPic 3, section 4.3).

    noise: step -> eps added after that step; not called after the last step. Raises NonFiniteLatent.
    """

    def predict(x_t: Tensor, t: float) -> Tensor:
        return velocity_to_x0(x_t, velocity(x_t, t).to(x_t), t)

    return renoise(predict, x_t, times, noise, callback)


def renoise(
    predict: Prediction, x_t: Tensor, times: Sequence[float], noise: NoiseSource, callback: Callback | None = None
) -> Tensor:
    """Run `sample_consistency` with a function that predicts x0 directly, without rounding it."""
    for step, (t, t_next) in enumerate(pairwise(_floats(times))):
        x0 = check_finite(predict(x_t, t), step)
        x_t = add_noise(x0, noise(step).to(x_t), t_next) if t_next > 0 else x0
        if callback:
            callback(step, t_next, x_t, x0)
    return x_t


def seeded_noise(shape: Sequence[int], seed: int) -> NoiseSource:
    """Noise determined by (seed, step): drawn on the CPU in float32, so that all devices give the same picture."""

    def noise(step: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + step + 1) % 2**63)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)

    return noise


def check_finite(x: Tensor, step: int) -> Tensor:
    """Return x unchanged; raise NonFiniteLatent if it holds NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteLatent(step)
    return x


def _floats(times: Sequence[float]) -> list[float]:
    return [float(t) for t in times]
