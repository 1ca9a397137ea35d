"""What a run does by recipes that a name tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unipic_core.conditioning.images import ASPECTS, within_budget
from unipic_core.errors import UniPicError
from unipic_core.run.plan import Request, plan, resolve
from unipic_core.sampling.schedules import Shift, base_times, few_step_times
from unipic_core.weights.lora import read_lora, save_lora
from unipic_core.weights.recipe import RELEASED_BASE, RELEASED_FEW_STEP, Recipe, step_lora_recipe


@pytest.mark.parametrize("tokens", [256, 4096])
def test_a_step_lora_has_its_schedule_at_every_size(tokens: int) -> None:
    """sigma of diffusers' scheduler with base_shift = max_shift = ln 3, shift_terminal none, at 1, 3/4, 1/2, 1/4."""
    settings = resolve(RELEASED_BASE.merge(step_lora_recipe("Qwen-Image-Edit-Lightning-4steps-V1.0.safetensors")))
    assert (settings.steps, settings.guidance, settings.sampler) == (4, 1.0, "euler")
    times = settings.times(tokens, Shift())
    torch.testing.assert_close(times, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64))


def test_a_step_lora_without_a_recipe_brings_that_of_its_name(tmp_path: Path) -> None:
    layers = {"img_in": (torch.ones(2, 16), torch.ones(64, 2))}
    save_lora(tmp_path / "lightning_4steps.safetensors", layers)
    recipe = read_lora(tmp_path / "lightning_4steps.safetensors").recipe
    assert recipe is not None
    assert (recipe.steps, recipe.shift) == (4, 3.0)
    save_lora(tmp_path / "style_4steps.safetensors", layers, recipe=Recipe(steps=7))
    assert read_lora(tmp_path / "style_4steps.safetensors").recipe == Recipe(steps=7)


def test_a_schedule_may_be_chosen_for_any_weights() -> None:
    """The release's demo runs few-step weights by diffusers' Euler scheduler: the times of the base weights."""
    demo = resolve(RELEASED_FEW_STEP, sampler="euler", schedule="base")
    torch.testing.assert_close(demo.times(4096, Shift()), base_times(8, 4096), rtol=0, atol=0)
    other = resolve(RELEASED_BASE, steps=8, schedule="few_step")
    torch.testing.assert_close(other.times(4096, Shift()), few_step_times(8, 4096), rtol=0, atol=0)
    linear = resolve(RELEASED_FEW_STEP, steps=2, schedule="fixed_shift", shift=1)
    assert linear.times(4096, Shift()).tolist() == [1.0, 0.5, 0.0]
    assert resolve(RELEASED_BASE, schedule="fixed_shift").fixed_shift == 3.0


def test_what_is_unusual_of_a_schedule_is_told() -> None:
    assert str(resolve(RELEASED_FEW_STEP)) == "8 steps, consistency, no guidance"
    assert str(resolve(RELEASED_BASE)) == "50 steps, euler, guidance 4"
    followed = resolve(RELEASED_FEW_STEP, sampler="euler")
    assert str(followed) == "8 steps, euler, no guidance, schedule few_step"
    assert followed.remark == "the release's demo of few-step weights with euler has the times of schedule base"
    assert not resolve(RELEASED_FEW_STEP, sampler="euler", schedule="base").remark
    assert str(resolve(RELEASED_BASE, schedule="fixed_shift")) == "50 steps, euler, guidance 4, schedule fixed_shift 3"


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(UniPicError, match="the schedule must be one of few_step, base, fixed_shift, got 'karras'"):
        resolve(Recipe(), schedule="karras")
    with pytest.raises(UniPicError, match="a shift needs the schedule fixed_shift, got .* base"):
        resolve(Recipe(), shift=3.0)
    for shift in (0, -1, float("nan"), 1000):
        with pytest.raises(UniPicError, match="the shift must be a number above 0, up to 100, got"):
            resolve(Recipe(), schedule="fixed_shift", shift=shift)


def test_a_plan_has_the_sizes_at_which_references_are_seen() -> None:
    sizes = [(6000, 4000), (300, 300)]
    assert plan(RELEASED_BASE, sizes, Request("a")).seen == ((1248, 832), (64, 64))
    assert plan(RELEASED_BASE, sizes, Request("a", share="equal")).seen == ((896, 576), (736, 736))
    assert plan(RELEASED_BASE, [], Request("a")).seen == ()


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        (Request(aspect="16:9"), (1376, 768)),
        (Request(aspect="9:16"), (768, 1376)),
        (Request(aspect="1:1"), (1024, 1024)),
        (Request(aspect="21:9"), (1568, 672)),
        (Request(aspect="16:9", width=512), (512, 288)),
        (Request(aspect="3:2", height=512), (768, 512)),
    ],
)
def test_an_aspect_replaces_the_first_reference_s(request_: Request, size: tuple[int, int]) -> None:
    assert plan(Recipe(), [(100, 300)], request_).size == size


def test_every_offered_aspect_fits_every_budget() -> None:
    for budget in (128, 512, 1024, 2048):
        for aspect in ASPECTS:
            width, height = plan(Recipe(output_budget=budget), [], Request(aspect=aspect)).size
            assert width % 32 == height % 32 == 0
            assert within_budget(width, height, budget)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(aspect="wide"), "two whole numbers such as 16:9"),
        (Request(aspect="9:1"), "at most 8:1, got '9:1'"),
        (Request(aspect="0:1"), "got '0:1'"),
        (Request(aspect=1.5), "got 1.5"),
        (Request(aspect="16:9", width=512, height=512), "a size 512x512 and an aspect 16:9 exclude each other"),
        (Request(aspect="16:9", width=2048), "over this model's"),
    ],
)
def test_wrong_aspects(request_: Request, message: str) -> None:
    with pytest.raises(UniPicError, match=message):
        plan(Recipe(), [], request_)
