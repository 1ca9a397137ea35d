"""Times in bfloat16: rounded as the release rounds them, unless the recipe of weights or LoRA says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from causal_tools import conditioning
from model_tools import Case, random_inputs, relative
from safetensors.torch import load_file
from unipic_pack.nodes.host.model import mmdit
from unipic_pack.nodes.host.model.kv_cache import TIME_ROUNDING
from unipic_pack.nodes.host.model.loading import load_model, round_times
from unipic_pack.nodes.host.model.mmdit import ComfyMMDiT, network_options
from unipic_pack.nodes.host.recipe_attachment import attach, attachment_of
from unipic_pack.nodes.lora import add_lora
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.conditioning.sequence import pack_latents
from unipic_pack.unipic_core.weights.lora import read_lora, save_lora
from unipic_pack.unipic_core.weights.recipe import RELEASED_FEW_STEP, Recipe

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")
CLOSE = 6e-3


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Any:
    return load_model(golden / "tiny")


@pytest.fixture(scope="module")
def bf16(tiny: Any) -> ComfyMMDiT:
    """The same network with its activations in bfloat16, which ComfyUI chooses on a GPU."""
    loaded = tiny.model.diffusion_model
    network = ComfyMMDiT(
        **network_options(loaded.config), operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16
    )
    network.load_state_dict(loaded.state_dict())
    return network.eval()


def step(network: ComfyMMDiT, case: Case, number: int, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """The packed velocity of a golden case's step, from its float32 latents."""
    x_t = case.noise if number == 1 else case.latents(number - 1)
    t = case.tensors["times"][number - 1 : number].float()
    references = [r.to(dtype) for r in case.references]
    return pack_latents(network(x_t.to(dtype), t, case.text.to(dtype), ref_latents=references, **options).float())


@pytest.mark.parametrize("name", ["two_references_8_steps_cfg4", "three_references_base_6_steps_cfg4"])
def test_velocities_are_the_releases(name: str, golden: Path, bf16: ComfyMMDiT) -> None:
    case = Case(golden / "cases" / name)
    wanted = load_file(golden / "cases" / name / "bf16.safetensors")
    rounding = "bf16_thousandths" if "base" in name else "bf16"
    for number in range(1, len(wanted) + 1):
        want = wanted[f"velocity_{number}"]
        assert relative(step(bf16, case, number, torch.bfloat16, **{TIME_ROUNDING: rounding}), want) < CLOSE
        if "base" not in name and number > 1:
            assert relative(step(bf16, case, number, torch.bfloat16), want) > CLOSE, "exact times give other numbers"


def test_float32_is_the_same_to_the_bit(golden: Path, tiny: Any) -> None:
    case, network = Case(golden / "cases" / "two_references_8_steps_cfg4"), tiny.model.diffusion_model
    plain = step(network, case, 3, torch.float32)
    assert torch.equal(plain, step(network, case, 3, torch.float32, **{TIME_ROUNDING: "bf16"}))


def test_the_recipe_decides(golden: Path, tiny: Any, tmp_path: Path) -> None:
    def rounding(model: Any) -> str:
        chosen: str = model.model_options["transformer_options"][TIME_ROUNDING]
        return chosen

    assert rounding(tiny) == "bf16_thousandths", "of weights without a recipe, which run as the base"
    few = tiny.clone()
    attach(few, replace(attachment_of(tiny), recipe=RELEASED_FEW_STEP))
    round_times(few)
    assert (rounding(few), rounding(tiny)) == ("bf16", "bf16_thousandths")
    file, width = tmp_path / "lora.safetensors", tiny.model.diffusion_model.config.width
    pairs = {"transformer_blocks.0.attn.to_q": (torch.ones(1, width), torch.ones(width, 1))}
    save_lora(file, pairs, recipe=Recipe(sampler="consistency", time_rounding="none"))
    assert rounding(add_lora(tiny, read_lora(file), 1.0)[0]) == "none"


@pytest.mark.parametrize(("sampler", "rounding"), [("consistency", "bf16"), ("euler", "bf16_thousandths")])
def test_the_chosen_sampler_decides(sampler: str, rounding: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the pipeline, whatever sampler the recipe names."""
    seen, original = [], mmdit.rounded_time

    def watched(timestep: Any, rounding: str, dtype: Any) -> Any:
        seen.append(rounding)
        return original(timestep, rounding, dtype)

    monkeypatch.setattr(mmdit, "rounded_time", watched)
    few = tiny.clone()
    attach(few, replace(attachment_of(tiny), recipe=RELEASED_FEW_STEP))
    round_times(few)
    x, text, references = random_inputs(width=32, channels=4)
    for model in (tiny, few):
        conds, latent = [conditioning(text, references)] * 2, {"samples": torch.zeros_like(x)}
        FewStepSampler.execute(model, *conds, latent, seed=1, steps=1, cfg=1.0, sampler=sampler, denoise=1.0)
    assert seen == [rounding] * 2
