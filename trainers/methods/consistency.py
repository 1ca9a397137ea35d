"""Method `consistency`: the student predicts x0 in one step (UniPic 3, section 4.3, eq. 9-11; losses.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unipic_core.sampling.flow import add_noise, velocity
from unipic_core.weights.recipe import RELEASED_FEW_STEP

from ..config.methods import ConsistencyMethod
from ..config.run import RunConfig, required
from ..loop.method import Share
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
    tangent_share,
)
from .precision import tensor_float32

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, eps - x0) -> velocity of the trajectory that the student is made consistent on, all [B, ...]."""


def consistency_terms(
    student: TimedVelocity,
    guide: Guide,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    options: ConsistencyMethod,
    weights: Tensor | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Consistency loss [B] at x_t = (1 - t) x0 + t eps, with metrics. Only the prediction has a gradient.

    weights: [B, N] of the tokens (masked loss). share: of the tangent, for its warm-up. The tangent is computed in
    float32 even under autocast: it divides a difference of close numbers by 2e.
    """
    x_t, data_v = add_noise(x0, eps, t), velocity(x0, eps)
    # the only attention kernel with forward-mode differentiation
    kernel = sdpa_kernel(SDPBackend.MATH) if options.tangent == "jvp" else nullcontext()
    with torch.no_grad(), kernel:
        v = guide(x_t, t, data_v)
        along = data_v if options.tangent_along == "data" else v
        with torch.autocast(x_t.device.type, enabled=False), products(options, x_t.device.type):
            if options.tangent == "jvp":
                tangent = jvp_tangent(student, x_t, along, t)[1]
            else:
                tangent = difference_tangent(student, x_t, along, t, options.e)
    prediction = student(x_t, t)
    used_tangent = scaled_tangent(tangent) if options.normalisation == "tangent" else tangent
    # UniPic 3, eq. 9; then eq. 10-11 in `consistency_loss`
    residual = consistency_residual(prediction.detach(), v, used_tangent, t, share)
    used_residual = scaled_residual(residual, "rms" if options.normalisation == "rms" else "none", weights)
    metrics = {
        "residual": float(residual.square().mean().sqrt()),
        "tangent": float(tangent.square().mean().sqrt()),
    }
    return consistency_loss(prediction, used_residual, options.cosine, weights), metrics


def products(options: ConsistencyMethod, device_type: str) -> AbstractContextManager[None]:
    """Precision of the tangent's matrix products."""
    return tensor_float32(device_type) if options.tangent_precision == "tf32" else nullcontext()


class ConsistencyTraining(NetworkTraining):
    """The student learns to predict the same x0 from every point of the trajectory of the frozen, guided base."""

    recipe = replace(RELEASED_FEW_STEP, time_rounding="none")  # trained on exact times, in any precision

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.options = required(config.consistency)
        self.prompt_dropout, self.masked_loss = self.options.prompt_dropout, self.options.mask
        super().__init__(config, roles)

    def place(self, device: torch.device, share: Share) -> None:
        super().place(device, share)
        if self.live_text is not None and self.options.tangent == "jvp":
            self.prefetch = 0  # the choice of the kernel holds for the thread that would encode text, too

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        return self.consistency(batch, Draws(self.config.seed, batch))

    def consistency(self, batch: Inputs, draws: Draws) -> tuple[Tensor, Metrics]:
        t, eps = self.times(draws, self.options.times), draws.noise()
        student, guide, weights = self.role(STUDENT, batch), self.guide(batch), self.weights_of(batch)
        share = tangent_share(self.student_update(batch.index), self.options.tangent_warmup)
        return consistency_terms(student, guide, batch.x0, eps, t, self.options, weights, share)

    def guide(self, batch: Inputs) -> Guide:
        """Velocity of the trajectory that the options choose."""
        options, scale = self.options, self.options.guidance
        if options.velocity == "teacher":
            return lambda x_t, t, data_v: self.guided(TEACHER, batch, x_t, t, scale)
        if scale == 1:
            return lambda x_t, t, data_v: data_v
        source = EMA if options.guidance_from == "ema" else TEACHER
        cond, uncond = self.role(source, batch), self.role(source, batch, batch.uncond)
        return lambda x_t, t, data_v: data_v + (scale - 1) * (cond(x_t, t) - uncond(x_t, t)).float()
