"""In bfloat16 the network is fed times rounded as the release rounds them, against diffusers' class (make_bf16.py)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import GOLDEN, TINY
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.plan import Plan, Request, resolve
from unipic_core.sampling.schedules import base_times, few_step_times, rounded_time
from unipic_core.weights.recipe import RELEASED_BASE, Recipe

CASES = sorted(p.name for p in (GOLDEN / "cases").iterdir())
CLOSE = 6e-3
"""Relative distance of two orders of operations in bfloat16: at most 5.0e-3 is measured; the time that is not rounded
makes up to 25e-3 of these small networks."""


@pytest.fixture(scope="module")
def bf16() -> UniPicPipeline:
    return UniPicPipeline.from_pretrained(TINY, torch_dtype=torch.bfloat16, device="cpu")


def distances(name: str, pipe: UniPicPipeline, recipe: Recipe) -> list[float]:
    """Relative distance of our velocity of each step to the release's."""
    folder = GOLDEN / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    settings = replace(resolve(recipe, sampler=case["sampler"]), guidance=1.0)
    size = (case["width"], case["height"])
    planned = Plan(Request(prompt=""), settings, size, seed=0, num_images=1)
    references = [tensors[f"reference_latent_{i + 1}"] for i in range(len(case["reference_sizes"]))]
    packed = pack_with_references(tensors["noise"], LatentShape.of_pixels(*size), [references])
    velocity = pipe._velocity(packed, TextCond(tensors["prompt_embeds"], None), None, planned)
    got = []
    for step, want in sorted(load_file(folder / "bf16.safetensors").items()):
        number = int(step.removeprefix("velocity_"))
        x_t = tensors["noise"] if number == 1 else tensors[f"latents_after_step_{number - 1}"]
        with torch.no_grad():
            v = velocity(x_t, float(tensors["times"][number - 1]))
        got.append(float((v - want).norm() / want.norm()))
    return got


@pytest.mark.parametrize("name", CASES)
def test_velocities_are_the_releases(name: str, bf16: UniPicPipeline) -> None:
    assert max(distances(name, bf16, Recipe())) < CLOSE


def test_a_recipe_turns_the_rounding_off(bf16: UniPicPipeline) -> None:
    exact = distances("two_references_8_steps_cfg4", bf16, Recipe(time_rounding="none"))
    assert exact[0] < CLOSE, "t = 1 needs no rounding"
    assert min(exact[1:]) > CLOSE


@pytest.mark.parametrize("sampler", ["consistency", "euler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_network_is_fed(sampler: str, dtype: torch.dtype, tiny: UniPicPipeline, bf16: UniPicPipeline) -> None:
    pipe = bf16 if dtype is torch.bfloat16 else tiny
    fed: list[object] = []
    watching = pipe.transformer.register_forward_pre_hook(lambda module, given: fed.append(given[1]))
    try:
        pipe([], "a cat", num_inference_steps=4, true_cfg_scale=1, sampler=sampler, width=64, height=64)
    finally:
        watching.remove()
    make = few_step_times if sampler == "consistency" else base_times
    times = make(4, 16, pipe.shift)[:-1]
    if dtype is torch.float32:
        assert fed == times.tolist(), "float32 runs are the same to the bit"
    elif sampler == "consistency":
        assert [float(t) for t in fed] == times.bfloat16().tolist()
    else:
        assert [float(t) for t in fed] == ((times.float() * 1000).bfloat16() / 1000).tolist()


def test_rounding_keeps_what_needs_none() -> None:
    assert rounded_time(0.3, "bf16", torch.float32) == 0.3
    assert rounded_time(0.3, "none", torch.bfloat16) == 0.3
    assert [float(rounded_time(t, "bf16", torch.bfloat16)) for t in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    batch = rounded_time(torch.tensor([0.3, 0.7]), "bf16_thousandths", torch.bfloat16)
    assert batch.dtype == torch.float32
    assert batch.tolist() == [float(rounded_time(t, "bf16_thousandths", torch.bfloat16)) for t in (0.3, 0.7)]


def test_a_loras_recipe_turns_it_off_over_its_base() -> None:
    assert resolve(RELEASED_BASE).time_rounding == "bf16_thousandths"
    assert resolve(RELEASED_BASE.merge(Recipe(time_rounding="none"))).time_rounding == "none"
    assert resolve(Recipe(time_rounding="none").merge(Recipe(steps=4))).time_rounding == "none"
    assert Recipe.from_json(Recipe(time_rounding="none").to_json()).time_rounding == "none"
    with pytest.raises(ValueError, match="time_rounding should be 'release' or 'none'"):
        Recipe.from_json('{"time_rounding": "sometimes"}')
