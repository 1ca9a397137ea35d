"""Method `consistency`: the student jumps to x0 in one step (UniPic 3, section 4.3; equations in losses.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unipic_core.sampling.flow import add_noise, velocity
from unipic_core.weights.recipe import RELEASED_FEW_STEP

from ..config.methods import ConsistencyMethod
from ..config.run import RunConfig, given
from ..loop.metrics import Metrics
from ..roles.types import EMA, STUDENT, TEACHER, Roles
from .base import NetworkTraining
from .inputs import Draws, Inputs
from .losses import (
    TimedVelocity,
    consistency_loss,
    consistency_residual,
    difference_tangent,
    jvp_tangent,
    scaled_residual,
    scaled_tangent,
)

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, eps - x0) -> the velocity that the student is to be consistent with, all [B, ...]."""


def consistency_terms(
    student: TimedVelocity, guide: Guide, x0: Tensor, eps: Tensor, t: Tensor, options: ConsistencyMethod
) -> tuple[Tensor, Metrics]:
    """The loss [B] at x_t = (1 - t) x0 + t eps. `guide` and all evaluations but one are without gradient.

    The tangent is taken in float32 whatever the surrounding autocast: a difference of near numbers is divided by 2e.
    """
    x_t, data_v = add_noise(x0, eps, t), velocity(x0, eps)
    # forward-mode differentiation goes through this kernel alone
    kernel = sdpa_kernel(SDPBackend.MATH) if options.tangent == "jvp" else nullcontext()
    with torch.no_grad(), kernel:
        v = guide(x_t, t, data_v)
        along = data_v if options.tangent_along == "data" else v
        with torch.autocast(x_t.device.type, enabled=False):
            if options.tangent == "jvp":
                tangent = jvp_tangent(student, x_t, along, t)[1]
            else:
                tangent = difference_tangent(student, x_t, along, t, options.e)
    prediction = student(x_t, t)
    tangent_used = scaled_tangent(tangent) if options.normalisation == "tangent" else tangent
    # UniPic 3, eq. 9; then eq. 10-11 in `consistency_loss`
    residual = consistency_residual(prediction.detach(), v, tangent_used, t)
    used = scaled_residual(residual, "rms" if options.normalisation == "rms" else "none")
    metrics = {
        "residual": float(residual.square().mean().sqrt()),
        "tangent": float(tangent.square().mean().sqrt()),
    }
    return consistency_loss(prediction, used, options.cosine), metrics


class ConsistencyTraining(NetworkTraining):
    """The frozen base is the teacher: it gives the guided velocity along which the student must not change its mind."""

    recipe = replace(RELEASED_FEW_STEP, time_rounding="none")  # trained on exact times, in any precision

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.options = given(config.consistency)
        self.prompt_dropout = self.options.prompt_dropout
        super().__init__(config, roles)

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        return self.consistency(batch, Draws(self.config.seed, batch))

    def consistency(self, batch: Inputs, draws: Draws) -> tuple[Tensor, Metrics]:
        t, eps = self.times(draws, self.options.times), draws.noise()
        return consistency_terms(self.role(STUDENT, batch), self.guide(batch), batch.x0, eps, t, self.options)

    def guide(self, batch: Inputs) -> Guide:
        """The velocity to be consistent with, as the options choose it."""
        options, scale = self.options, self.options.guidance
        if options.velocity == "teacher":
            return lambda x_t, t, data_v: self.guided(TEACHER, batch, x_t, t, scale)
        if scale == 1:
            return lambda x_t, t, data_v: data_v
        source = EMA if options.guidance_from == "ema" else TEACHER
        cond, uncond = self.role(source, batch), self.role(source, batch, batch.uncond)
        return lambda x_t, t, data_v: data_v + (scale - 1) * (cond(x_t, t) - uncond(x_t, t)).float()
