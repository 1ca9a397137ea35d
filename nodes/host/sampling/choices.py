"""Every choice of a sampling run: the node's widgets over the recipe of the weights, with what to tell the user."""

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
from ..recipe_attachment import facts_of
from .model_sampling import with_shift_of

AUTO = "auto"
"""Value of a widget that leaves its choice to the weights; 0 does for numbers."""

FEW_STEP_ADVICE = "for few-step weights choose the sampler consistency and the schedule few_step"


@dataclass(frozen=True)
class Widgets:
    """What a node asks for; 0 and AUTO leave it to the weights. shift: of the schedule "fixed_shift"."""

    steps: int = 0
    cfg: float = 0.0
    sampler: str = AUTO
    schedule: str = AUTO
    shift: float = 0.0


@dataclass(frozen=True)
class Choices:
    """settings and shift give the times; notes: remarks on them; known: False = neither weights nor node say how."""

    settings: Settings
    shift: Shift
    notes: tuple[str, ...]
    known: bool

    @property
    def line(self) -> str:
        """What the run does, and the remarks, for the node's line."""
        remark = [self.settings.remark] if self.settings.remark else []
        return "; ".join([f"{'' if self.known else 'no recipe: '}{self.settings}", *self.notes, *remark])

    @property
    def times_line(self) -> str:
        """As `line`, of the times alone."""
        fixed = self.settings.fixed_shift
        times = f"{self.settings.steps} steps, schedule {self.settings.schedule}" + (f" {fixed:g}" if fixed else "")
        return "; ".join([f"{'' if self.known else 'no recipe: '}{times}", *self.notes])

    @property
    def level(self) -> int:
        """How the line is logged."""
        return logging.INFO if self.known else logging.WARNING


def choices(model: ModelPatcher, latent: Tensor, asked: Widgets) -> Choices:
    """The choices for a MODEL and a latent [B, C, 1, H, W]. Raises UniPicError."""
    facts = facts_of(model)
    settings = resolve(
        facts.recipe,
        asked.steps or None,
        asked.cfg or None,
        None if asked.sampler == AUTO else asked.sampler,
        schedule=None if asked.schedule == AUTO else asked.schedule,
        shift=asked.shift or None,
    )
    settings, shift, note = with_shift_of(model, settings, facts.shift, chosen=bool(asked.shift))
    known = facts.recipe != Recipe()
    notes = [note, budget_caution(facts.recipe, latent)]
    if not known and asked.sampler == AUTO and asked.schedule == AUTO:
        notes.append(FEW_STEP_ADVICE)
    return Choices(settings, shift, tuple(filter(None, notes)), known)


def budget_caution(recipe: Recipe, latent: Tensor) -> str:
    """A remark on a latent [..., H, W] of more pixels than the weights were trained for; empty where it fits or the
    recipe names no budget."""
    height, width = (side * VAE_SCALE for side in latent.shape[-2:])
    budget = recipe.output_budget
    if budget is None or within_budget(width, height, budget):
        return ""
    return f"{width}x{height} is over this model's {budget}x{budget} pixels, so expect repeated or smeared parts"
