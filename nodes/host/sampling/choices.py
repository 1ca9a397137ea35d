"""Settings of a sampling run: the node's widgets override the recipe of the weights; and the line for the user."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....unipic_core.conditioning.images import within_budget
from ....unipic_core.conditioning.sequence import VAE_SCALE
from ....unipic_core.run.plan import Settings, resolve
from ....unipic_core.sampling.schedules import Shift
from ....unipic_core.weights.recipe import Recipe
from ..recipe_attachment import attachment_of
from .model_sampling import with_shift_of

AUTO = "auto"
"""Value of a widget that takes the recipe's; for numbers it is 0."""

FEW_STEP_ADVICE = "for few-step weights choose the sampler consistency and the schedule few_step"


@dataclass(frozen=True)
class Widgets:
    """Widget values of a node; 0 and AUTO take the recipe's. shift: of the schedule "fixed_shift"."""

    steps: int = 0
    cfg: float = 0.0
    sampler: str = AUTO
    schedule: str = AUTO
    shift: float = 0.0


@dataclass(frozen=True)
class Choices:
    """settings and shift set the times; notes: warnings; known: False = the weights have no recipe."""

    settings: Settings
    shift: Shift
    notes: tuple[str, ...]
    known: bool

    @property
    def line(self) -> str:
        """Line on the node: the settings and the warnings."""
        remark = [self.settings.remark] if self.settings.remark else []
        return "; ".join([f"{'' if self.known else 'no recipe: '}{self.settings}", *self.notes, *remark])

    @property
    def times_line(self) -> str:
        """Line on UniPic Sigmas: the times alone, and the warnings."""
        fixed = self.settings.fixed_shift
        times = f"{self.settings.steps} steps, schedule {self.settings.schedule}" + (f" {fixed:g}" if fixed else "")
        return "; ".join([f"{'' if self.known else 'no recipe: '}{times}", *self.notes])

    @property
    def level(self) -> int:
        """Log level of the line."""
        return logging.INFO if self.known else logging.WARNING


def choices(model: ModelPatcher, latent: Tensor, widgets: Widgets) -> Choices:
    """Settings for a MODEL and a latent [B, C, 1, H, W]. Raises UniPicError."""
    attached = attachment_of(model)
    settings = resolve(
        attached.recipe,
        widgets.steps or None,
        widgets.cfg or None,
        None if widgets.sampler == AUTO else widgets.sampler,
        schedule=None if widgets.schedule == AUTO else widgets.schedule,
        shift=widgets.shift or None,
    )
    settings, shift, note = with_shift_of(model, settings, attached.shift, chosen=bool(widgets.shift))
    known = attached.recipe != Recipe()
    notes = [note, budget_caution(attached.recipe, latent)]
    if not known and widgets.sampler == AUTO and widgets.schedule == AUTO:
        notes.append(FEW_STEP_ADVICE)
    return Choices(settings, shift, tuple(filter(None, notes)), known)


def budget_caution(recipe: Recipe, latent: Tensor) -> str:
    """Warning for a latent [..., H, W] of more pixels than the weights were trained for; empty if it fits or the recipe
    has no output budget."""
    height, width = (side * VAE_SCALE for side in latent.shape[-2:])
    budget = recipe.output_budget
    if budget is None or within_budget(width, height, budget):
        return ""
    return f"{width}x{height} is over this model's {budget}x{budget} pixels, so expect repeated or smeared parts"
