"""What a run does: the caller's wishes over the recipe's over the defaults, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UniPicError
from ..images import DEFAULT_BUDGET
from ..recipe import RELEASED_BASE, RELEASED_FEW_STEP, Recipe
from ..schedules import Shift, base_times, few_step_times

SAMPLERS = ("consistency", "euler")
MOST_STEPS = 1000


@dataclass(frozen=True)
class Settings:
    """Every choice of a run. Budgets are sides in pixels; guidance 1 means no unconditional pass."""

    steps: int
    guidance: float
    sampler: str
    schedule: str
    reference_budget: int
    output_budget: int

    def times(self, num_target_tokens: int, shift: Shift) -> Tensor:
        """[steps + 1] float64 from 1 to 0."""
        make = base_times if self.schedule == "base" else few_step_times
        return make(self.steps, num_target_tokens, shift)


def resolve(
    recipe: Recipe,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    reference_budget: int | None = None,
) -> Settings:
    """None = from the recipe, else from MODEL's defaults for the sampler.

    A sampler other than the recipe's brings its own schedule and number of steps: the recipe's were meant for its own.
    Raises UniPicError for values that cannot be.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UniPicError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    own = recipe.sampler or RELEASED_BASE.sampler
    sampler = sampler or own
    default = RELEASED_BASE if sampler == "euler" else RELEASED_FEW_STEP
    said = recipe if sampler == own else Recipe(guidance=recipe.guidance)
    settings = Settings(
        steps=_whole("the number of steps", _first(steps, said.steps, default.steps), 1, MOST_STEPS),
        guidance=_guidance(_first(guidance, said.guidance, default.guidance)),
        sampler=str(sampler),
        schedule=str(_first(said.schedule, default.schedule)),
        reference_budget=_whole(
            "the reference budget", _first(reference_budget, recipe.reference_budget, DEFAULT_BUDGET), 32, 8192
        ),
        output_budget=int(_first(recipe.output_budget, DEFAULT_BUDGET)),
    )
    if recipe.attention_form != "full":
        raise UniPicError(
            f"these weights want attention of the form {recipe.attention_form!r}, which this version does not have; "
            "install a newer version"
        )
    return settings


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _whole(what: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != int(value):
        raise UniPicError(f"{what} must be a whole number, got {value!r}")
    if not least <= value <= most:
        raise UniPicError(f"{what} must be from {least} to {most}, got {value}")
    return int(value)


def _guidance(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UniPicError(f"the guidance scale must be a number of at least 0 (1 switches guidance off), got {value!r}")
    return float(value)


def checked_seed(seed: Any, num_images: Any) -> tuple[int, int]:
    """(seed, num_images) as whole numbers, or UniPicError."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UniPicError(f"the seed must be a whole number, got {seed!r}")
    return seed, _whole("the number of images", num_images, 1, 1024)
