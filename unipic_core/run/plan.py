"""Plan of a run: explicit arguments override the recipe, which overrides the defaults; every value is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import finite, whole
from ..conditioning.images import aspect_size, output_size
from ..conditioning.influence import Influence, checked_influences
from ..conditioning.prompt import check_unicode
from ..conditioning.reference_sizes import DEFAULT_BUDGET, MAX_REFERENCES, RELEASE, Size, reference_sizes
from ..errors import UniPicError
from ..model.reference_bias import Interval
from ..sampling.schedules import Shift, base_times, few_step_times, fixed_shift_times, percent_time, resolution_shift
from ..weights.recipe import (
    LIMITS,
    MAX_GUIDANCE,
    MAX_SHIFT,
    RELEASED_BASE,
    RELEASED_FEW_STEP,
    SAMPLERS,
    SCHEDULES,
    Recipe,
)

RELEASED_ROUNDING = {"consistency": "bf16", "euler": "bf16_thousandths"}
"""Sampler -> rounding of times in bfloat16 in the release's pipeline with that sampler, one of ROUNDINGS."""

DEFAULT_SHIFT = 3.0
"""Time shift of the schedule "fixed_shift" if neither the request nor the recipe sets one."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run, all resolved. Budgets are sides in pixels; guidance 1 = no unconditional pass.

    fixed_shift: time shift of the schedule "fixed_shift"; None for the others. time_rounding: one of ROUNDINGS.
    """

    steps: int
    guidance: float
    sampler: str
    schedule: str
    reference_budget: int
    output_budget: int
    fixed_shift: float | None = None
    time_rounding: str = "none"

    def __str__(self) -> str:
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}"
        run = f"{self.steps} steps, {self.sampler}, {guidance}"
        if self.schedule == "fixed_shift":
            return f"{run}, schedule fixed_shift {self.fixed_shift:g}"
        usual = _defaults_of(self.sampler).schedule
        return run if self.schedule == usual else f"{run}, schedule {self.schedule}"

    @property
    def remark(self) -> str:
        """Note about Euler on few-step weights; empty for other settings.

        The release trains few-step weights with re-noising; its Euler demo uses the times of the base weights.
        """
        if (self.sampler, self.schedule) != ("euler", "few_step"):
            return ""
        return "the release's demo of few-step weights with euler has the times of schedule base"

    def times(self, num_target_tokens: int, shift: Shift) -> Tensor:
        """Times of the sampler, [steps + 1] float64 from 1 to 0."""
        if self.schedule == "fixed_shift":
            return fixed_shift_times(self.steps, self.fixed_shift or DEFAULT_SHIFT)
        make = base_times if self.schedule == "base" else few_step_times
        return make(self.steps, num_target_tokens, shift)

    def intervals(self, influences: Sequence[Influence], num_target_tokens: int, shift: Shift) -> list[Interval]:
        """Latest and earliest t of each influence's part of the run, with the time shift of this schedule."""
        k = self.fixed_shift or resolution_shift(num_target_tokens, shift)
        return [(percent_time(p.start, k), percent_time(p.end, k)) for p in influences]


def resolve(
    recipe: Recipe,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    reference_budget: int | None = None,
    schedule: str | None = None,
    shift: float | None = None,
) -> Settings:
    """Resolve the settings of a run: arguments that are None come from the recipe, else from the sampler's defaults
    (docs/recipes.md).

    schedule: a name in SCHEDULES. shift: k of the schedule "fixed_shift". Raises UniPicError for values out of range.
    """
    _check_name("sampler", sampler, SAMPLERS)
    _check_name("schedule", schedule, SCHEDULES)
    sampler = sampler or recipe.sampler or str(RELEASED_BASE.sampler)
    default = _defaults_of(sampler)
    references = _first(reference_budget, recipe.reference_budget, DEFAULT_BUDGET)
    schedule = str(_first(schedule, recipe.schedule, default.schedule))
    settings = Settings(
        steps=_whole("the number of steps", _first(steps, recipe.steps, default.steps), *LIMITS["steps"]),
        guidance=_guidance(_first(guidance, recipe.guidance, default.guidance)),
        sampler=sampler,
        schedule=schedule,
        reference_budget=_whole("the reference budget", references, *LIMITS["reference_budget"]),
        output_budget=int(_first(recipe.output_budget, DEFAULT_BUDGET)),
        fixed_shift=_fixed_shift(schedule, shift, recipe),
        time_rounding="none" if recipe.time_rounding == "none" else RELEASED_ROUNDING[sampler],
    )
    _ = recipe.causal_attention_form  # refuses a form that this version does not have
    return settings


def _defaults_of(sampler: str) -> Recipe:
    """Recipe of the released weights that use this sampler."""
    return RELEASED_BASE if sampler == "euler" else RELEASED_FEW_STEP


def _check_name(setting: str, name: str | None, names: tuple[str, ...]) -> None:
    if name is not None and name not in names:
        raise UniPicError(f"the {setting} must be one of {', '.join(names)}, got {name!r}")


def _fixed_shift(schedule: str, shift: object, recipe: Recipe) -> float | None:
    """Return k for the schedule "fixed_shift", None for the others; raise UniPicError for a shift without it."""
    if schedule != "fixed_shift":
        if shift is not None:
            raise UniPicError(
                f"a shift needs the schedule fixed_shift, got the schedule {schedule}; choose fixed_shift, or leave "
                "the shift out"
            )
        return None
    number = finite(_first(shift, recipe.shift, DEFAULT_SHIFT))
    if number is None or not 0 < number <= MAX_SHIFT:
        raise UniPicError(f"the shift must be a number above 0, up to {MAX_SHIFT:g}, got {shift!r}; 3 is usual")
    return float(number)


@dataclass(frozen=True)
class Request:
    """Arguments of one run; None = from the recipe of the weights.

    width, height: of the output in pixels, multiples of 16. aspect: of the output, such as "16:9", in place of the
    first reference's; then at most one of width and height. seed: of the first of `num_images`; image i has seed + i.
    share, reference_weights: division of the pixel budget among the references (conditioning/reference_sizes.py).
    influences: strength, region and time range of each reference (conditioning/influence.py).
    """

    prompt: str = ""
    negative_prompt: str = " "
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int = 0
    num_images: int = 1
    reference_budget: int | None = None
    schedule: str | None = None
    shift: float | None = None
    share: str = RELEASE
    reference_weights: Sequence[float] | None = None
    aspect: str | None = None
    influences: Sequence[Influence] | None = None


@dataclass(frozen=True)
class Plan:
    """A checked request with resolved settings, planned before any weights are loaded.

    size: (width, height) of the output in pixels. seen: sizes of the references after resizing. influences: one per
    reference, or empty if none changes anything.
    """

    request: Request
    settings: Settings
    size: Size
    seed: int
    num_images: int
    seen: tuple[Size, ...] = ()
    influences: tuple[Influence, ...] = ()


def plan(recipe: Recipe, references: Sequence[Size], request: Request) -> Plan:
    """Check a request against the recipe of the weights. references: their sizes (w, h). Raises UniPicError."""
    for name in ("prompt", "negative_prompt"):
        if not isinstance(text := getattr(request, name), str):
            raise UniPicError(f"{name} must be a text, got {type(text).__name__}; call once per prompt")
        check_unicode(text)
    settings = resolve(
        recipe,
        request.steps,
        request.guidance,
        request.sampler,
        request.reference_budget,
        request.schedule,
        request.shift,
    )
    seed, num_images = checked_seed(request.seed, request.num_images)
    if len(references) > MAX_REFERENCES:
        raise UniPicError(f"at most {MAX_REFERENCES} pictures can be composed, got {len(references)}; leave some out")
    size = _output_size(references[0] if references else None, settings.output_budget, request)
    seen = reference_sizes(references, settings.reference_budget, request.share, request.reference_weights)
    influences = checked_influences(request.influences, len(references))
    return Plan(request, settings, size, seed, num_images, tuple(seen), influences)


def _output_size(first_reference: Size | None, budget: int, request: Request) -> Size:
    if request.aspect is None:
        return output_size(first_reference, budget, request.width, request.height)
    if request.width is not None and request.height is not None:
        raise UniPicError(
            f"a size {request.width}x{request.height} and an aspect {request.aspect} exclude each other; leave out the "
            "aspect, or one of width and height"
        )
    return output_size(aspect_size(request.aspect), budget, request.width, request.height)


def _first(*values: object) -> Any:
    return next(v for v in values if v is not None)


def _whole(setting: str, value: object, least: int, most: int) -> int:
    number = whole(value)
    if number is None:
        raise UniPicError(f"{setting} must be a whole number, got {value!r}")
    if not least <= number <= most:
        raise UniPicError(f"{setting} must be from {least} to {most}, got {value}")
    return number


def _guidance(value: object) -> float:
    number = finite(value)
    if number is None or not 0 <= number <= MAX_GUIDANCE:
        raise UniPicError(
            f"the guidance scale must be a number from 0 to {MAX_GUIDANCE:g} (0 and 1 switch guidance off), got "
            f"{value!r}"
        )
    return float(number) or 1.0  # 0 switches guidance off, as in the release


def checked_seed(seed: object, num_images: object) -> tuple[int, int]:
    """Return (seed, num_images) as ints; raise UniPicError if either is no whole number or out of range."""
    number = whole(seed)
    if number is None:
        raise UniPicError(f"the seed must be a whole number, got {seed!r}")
    return number, _whole("the number of images", num_images, 1, 1024)
