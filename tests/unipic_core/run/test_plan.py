"""What a run does by recipes that a name tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unipic_core.run.plan import resolve
from unipic_core.sampling.schedules import Shift
from unipic_core.weights.lora import read_lora, save_lora
from unipic_core.weights.recipe import RELEASED_BASE, Recipe, step_lora_recipe


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
