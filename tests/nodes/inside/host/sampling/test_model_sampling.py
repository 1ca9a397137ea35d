"""ComfyUI's sampling nodes before our sampling: a shift is honoured or remarked on, times of another kind refused."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import toy
from comfy_extras import nodes_model_advanced as stock
from model_tools import random_inputs, velocity
from unipic_pack.nodes import sample
from unipic_pack.nodes.host import recipe_attachment
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.sampling.schedules import Shift, base_times, few_step_times, fixed_shift_times
from unipic_pack.unipic_core.weights.recipe import RELEASED_BASE, RELEASED_FEW_STEP, STEP_LORA, Recipe

pytestmark = pytest.mark.usefixtures("inference")


def aura(model: Any, shift: float) -> Any:
    return stock.ModelSamplingAuraFlow().patch_aura(model, shift)[0]


def flux(model: Any, shift: float) -> Any:
    """With the same shift of the logarithm at every size."""
    return stock.ModelSamplingFlux().patch(model, shift, shift, 1024, 1024)[0]


def with_recipe(recipe: Recipe) -> Any:
    model = toy.model()
    recipe_attachment.attach(model, recipe_attachment.RecipeAttachment(recipe))
    return model


def sigmas(model: Any, steps: int = 6) -> torch.Tensor:
    return sample.UniPicSigmas.execute(model, toy.latent(), steps=steps, denoise=1.0)[0]


@pytest.mark.parametrize("node", [aura, flux])
def test_base_weights_take_the_shift(node: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = with_recipe(RELEASED_BASE)
    with caplog.at_level(logging.INFO):
        got = sigmas(node(model, 3.0))
    k = 3.0 if node is aura else math.exp(3.0)
    toy.close(got, base_times(6, 24, Shift(base_mu=math.log(k), max_mu=math.log(k))).float(), 1e-6)
    assert f"shift {k:g} of the ModelSampling node" in caplog.text
    toy.close(sigmas(model), base_times(6, 24).float(), 1e-6)


@pytest.mark.parametrize("node", [aura, flux])
def test_step_loras_take_the_shift(node: Any) -> None:
    k = 2.0 if node is aura else math.exp(2.0)
    toy.close(sigmas(node(with_recipe(STEP_LORA), 2.0)), fixed_shift_times(6, k).float(), 1e-6)


def test_few_step_weights_keep_their_times(caplog: pytest.LogCaptureFixture) -> None:
    model = aura(with_recipe(RELEASED_FEW_STEP), 5.0)
    with caplog.at_level(logging.INFO):
        toy.close(sigmas(model), few_step_times(6, 24).float(), 1e-6)
    assert "the ModelSampling node's shift 5 is ignored: few-step weights" in caplog.text


def test_few_step_sampler_takes_the_shift_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, steps = aura(with_recipe(RELEASED_BASE), 3.0), {"steps": 5, "cfg": 1.0, "sampler": "auto", "denoise": 1.0}
    with caplog.at_level(logging.INFO):
        sample.FewStepSampler.execute(model, toy.text(0.3), toy.text(-0.2), toy.latent(), 7, **steps)
    assert "5 steps, euler, no guidance; shift 3 of the ModelSampling node" in caplog.text
    want = base_times(5, 24, Shift(base_mu=math.log(3), max_mu=math.log(3)))[:-1].float()
    toy.close(torch.cat([t[:1] for _, t in toy.network(model).calls]), want, 1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_none(shift: float) -> None:
    with pytest.raises(UniPicError, match="shift must be above 0, got"):
        sigmas(aura(with_recipe(RELEASED_BASE), shift))


def test_times_of_a_thousand_are_refused() -> None:
    [model] = stock.ModelSamplingSD3().patch(toy.model(), 3.0)
    with pytest.raises(UniPicError, match="times from 0 to 1, got times multiplied by 1000, as by ModelS"):
        sigmas(model)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (lambda model: stock.ModelSamplingSD3().patch(model, 3.0)[0], "times multiplied by 1000"),
        (lambda model: stock.ModelSamplingDiscrete().patch(model, "eps", False)[0], "with another kind of sampling"),
    ],
)
def test_stock_samplers_on_our_model_refuse_them_too(nano_model: Any, patch: Any, message: str) -> None:
    x, text, references = random_inputs()
    model = patch(nano_model)
    model.patch_model()
    try:
        with pytest.raises(UniPicError, match=message):
            velocity(model, x, 0.5, text, references)
    finally:
        model.unpatch_model()
    assert torch.isfinite(velocity(nano_model, x, 0.5, text, references)).all()
