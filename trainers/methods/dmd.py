"""Method `dmd`: distribution matching distillation (UniPic 3, section 4.3, eq. 12-14; losses.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unipic_core.sampling.flow import add_noise
from unipic_core.sampling.samplers import NoiseSource, sample_consistency
from unipic_core.sampling.schedules import few_step_times
from unipic_core.weights.recipe import RELEASED_FEW_STEP, Recipe

from ..config.methods import OptimizerConfig
from ..config.run import RunConfig, required
from ..loop.metrics import Metrics
from ..roles.types import FAKE_SCORE, STUDENT, TEACHER, Roles
from .base import NetworkTraining
from .inputs import Draws, Inputs
from .losses import TimedVelocity, dmd_direction, dmd_loss, fake_score_loss


def rollout(student: TimedVelocity, eps: Tensor, times: Sequence[float], noise: NoiseSource) -> Tensor:
    """Sample x0 from eps at times[0] like `sample_consistency`; only the last step has a gradient."""
    last = float(times[-2])

    def velocity(x_t: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and t == last):
            return student(x_t, t)

    return sample_consistency(velocity, eps, times, noise)


def dmd_terms(
    x: Tensor, teacher: TimedVelocity, fake: TimedVelocity, eps: Tensor, t: Tensor, weighting: str
) -> tuple[Tensor, Metrics]:
    """Loss of the student, [B], and metrics. x: its samples, with gradient; eps, t: noise added for both scores."""
    with torch.no_grad():
        # UniPic 3, eq. 12-13, at x_t = (1 - t) x + t eps with fresh eps
        x_t = add_noise(x.detach(), eps, t)
        v_teacher, v_fake = teacher(x_t, t), fake(x_t, t)
        direction = dmd_direction(x.detach(), eps, t, v_teacher, v_fake, weighting)
    gap = float((v_teacher.float() - v_fake.float()).square().mean().sqrt())
    # UniPic 3, eq. 14
    return dmd_loss(x, direction), {"teacher_fake_gap": gap}


class DMDTraining(NetworkTraining):
    """Several updates of the fake score, then one of the student."""

    recipe = replace(RELEASED_FEW_STEP, time_rounding="none")  # trained on exact times, in any precision

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.dmd_options = required(config.dmd)
        self.slots = self.dmd_options.fake_updates + 1
        super().__init__(config, roles)

    def updates(self, step: int) -> tuple[str, ...]:
        options = self.dmd_options
        student = (STUDENT,) if step >= options.fake_warmup_steps else ()
        return (FAKE_SCORE,) * options.fake_updates + student

    def position(self, index: int) -> int:
        """Skip the student's micro steps during the warm-up of the fake score."""
        accumulation = self.config.accumulation
        step = index // (self.slots * accumulation)
        return index - min(step, self.dmd_options.fake_warmup_steps) * accumulation

    def student_update(self, index: int) -> int:
        return max(super().student_update(index) - self.dmd_options.fake_warmup_steps, 0)

    @property
    def trained_recipe(self) -> Recipe:
        """Recipe with as many steps as the student is rolled out in at most."""
        return replace(super().trained_recipe, steps=self.dmd_options.max_steps)

    def optimizer(self, part: str) -> OptimizerConfig:
        return self.dmd_options.optimizer if part == FAKE_SCORE else self.config.optimizer

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        draws = Draws(self.config.seed, batch)
        return self.fake_score(batch, draws) if part == FAKE_SCORE else self.matching(batch, draws)

    def fake_score(self, batch: Inputs, draws: Draws) -> tuple[Tensor, Metrics]:
        """Flow matching loss of the fake score on current samples of the student."""
        with torch.no_grad():
            x = self.student_samples(batch, draws)
        t, eps = self.times(draws, self.dmd_options.times), draws.noise()
        return fake_score_loss(self.role(FAKE_SCORE, batch)(add_noise(x, eps, t), t), x, eps), {}

    def matching(self, batch: Inputs, draws: Draws) -> tuple[Tensor, Metrics]:
        x = self.student_samples(batch, draws)
        t, eps = self.times(draws, self.dmd_options.times), draws.noise()
        scale = self.dmd_options.teacher_guidance

        def teacher(x_t: Tensor, t: Tensor) -> Tensor:
            return self.guided(TEACHER, batch, x_t, t, scale)

        return dmd_terms(x, teacher, self.role(FAKE_SCORE, batch), eps, t, self.dmd_options.weighting)

    def student_samples(self, batch: Inputs, draws: Draws) -> Tensor:
        """Sample x0 [B, N, 4C] with the student's sampler."""
        times = few_step_times(self.rollout_steps(batch.index), batch.x0.shape[1], self.shift).tolist()
        return rollout(self.role(STUDENT, batch), draws.noise(), times, lambda step: draws.noise())

    def rollout_steps(self, index: int) -> int:
        """Number of sampling steps in 1 .. max_steps, the same for all updates of a training step.

        So the fake score has just been updated on samples of as many steps as the student is now trained on. Trained on
        a mix of step counts, it matches only their average to the teacher, and single step counts drift apart.
        "released": the numbers cycle, the student's one ahead of the fake score's before it (train_dmd.py).
        """
        step, slot = divmod(index // self.config.accumulation, self.slots)
        if self.dmd_options.rollout == "released":
            return (step + (slot == self.slots - 1)) % self.dmd_options.max_steps + 1
        rng = np.random.default_rng([self.config.seed, step, 2])
        return int(rng.integers(1, self.dmd_options.max_steps + 1))
