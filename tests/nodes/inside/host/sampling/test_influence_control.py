"""Strengths and boxes of references with ComfyUI's own network: as with Load UniPic's, for every sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import BasicGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from compose_tools import WISHES, image
from model_tools import random_inputs, relative
from quantised_files import stock_loader
from torch import Tensor
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host.compare.run import composition_of
from unipic_pack.nodes.host.model.influences import INFLUENCES
from unipic_pack.nodes.host.sampling.influence_control import OVERRIDE, InfluenceControl, biased_attention
from unipic_pack.nodes.host.sampling.samplers import ksampler
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.conditioning.influence import Influence, Region
from unipic_pack.unipic_core.conditioning.sequence import LatentShape
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.transformer import open_transformer

import nodes as comfy_nodes

pytestmark = pytest.mark.usefixtures("inference")

LEFT = Region(0, 0, 500, 1000)
INFLUENCED = {
    "none": (),
    "strength": (Influence(0.2), Influence()),
    "box": (Influence(region=LEFT), Influence(2.0)),
    "time range": (Influence(0.0, end=0.5), Influence()),
}
SEED, STEPS = 3, 4
SAME, OTHER = 1e-4, 0.05


@pytest.fixture(scope="module")
def models(nano: Path, nano_model: Any) -> dict[str, Any]:
    """The nano by Load UniPic's loader and by ComfyUI's own, at one shift, which a time range depends on."""
    [file] = (nano / "transformer").glob("*.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        stock = stock_loader(patch, open_transformer(nano).config)(str(file))
    loaded = {"Load UniPic": nano_model, "UNETLoader": stock}
    return {name: ModelSamplingAuraFlow().patch_aura(model, 3.0)[0] for name, model in loaded.items()}


def conditioning(influences: tuple[Influence, ...], sign: float = 1.0) -> list[Any]:
    """As Multi-Image Compose gives it. The references are smaller than the target, and sides have even numbers of
    tokens, since else the two networks have other positions."""
    _, text, references = random_inputs()
    text, references = text * sign, [references[0][..., :4, :8], references[1][..., :8, :4]]
    extra: dict[str, Any] = {"reference_latents": references}
    if influences:
        extra |= {INFLUENCES: influences, "control": InfluenceControl(influences)}
    return [[text, extra]]


def few_step(model: Any, influences: tuple[Influence, ...], cfg: float = 1.0) -> Tensor:
    positive, negative = conditioning(influences), conditioning(influences, -1.0)
    return FewStepSampler.execute(model, positive, negative, latent(), SEED, STEPS, cfg, "euler", 1.0)[0]["samples"]


def few_step_with_guidance(model: Any, influences: tuple[Influence, ...]) -> Tensor:
    return few_step(model, influences, 3.0)


def stock_ksampler(model: Any, influences: tuple[Influence, ...]) -> Tensor:
    positive, negative = conditioning(influences), conditioning(influences, -1.0)
    [out] = comfy_nodes.common_ksampler(
        model, SEED, STEPS, 3.0, "dpmpp_2m", "simple", positive, negative, latent(), denoise=1.0
    )
    return out["samples"]


def sampler_custom_advanced(model: Any, influences: tuple[Influence, ...]) -> Tensor:
    [guider] = BasicGuider.execute(model, conditioning(influences)).args
    [noise] = RandomNoise.execute(SEED).args
    sigmas = torch.linspace(1, 0, STEPS + 1)
    return SamplerCustomAdvanced.execute(noise, guider, ksampler("euler"), sigmas, latent()).args[0]["samples"]


def latent() -> dict[str, Tensor]:
    return {"samples": torch.zeros(1, 16, 1, 8, 8)}


PATHS = (few_step, few_step_with_guidance, stock_ksampler, sampler_custom_advanced)


@pytest.mark.parametrize("sampled", PATHS, ids=lambda path: path.__name__)
def test_every_sampler_on_both_networks(sampled: Callable[..., Tensor], models: dict[str, Any]) -> None:
    runs = {name: {key: sampled(models[name], those) for key, those in INFLUENCED.items()} for name in models}
    for key in INFLUENCED:
        assert relative(runs["UNETLoader"][key], runs["Load UniPic"][key]) < SAME
    for each in runs.values():
        for key in list(INFLUENCED)[1:]:
            assert relative(each[key], each["none"]) > OTHER
        assert relative(each["strength"], each["box"]) > OTHER


def test_a_strength_of_1_and_a_finished_run_leave_nothing_behind(models: dict[str, Any]) -> None:
    before = few_step(models["UNETLoader"], ())
    assert torch.equal(few_step(models["UNETLoader"], (Influence(), Influence())), before)
    few_step(models["UNETLoader"], INFLUENCED["box"])
    assert torch.equal(few_step(models["UNETLoader"], ()), before)


def test_other_networks_refuse_them_in_one_sentence() -> None:
    cond = [[torch.zeros(1, 3, 8), {"control": InfluenceControl((Influence(0.5),))}]]
    with pytest.raises(UniPicError, match="need a Qwen-Image network, got Network; load the model with Load UniPic"):
        FewStepSampler.execute(toy.model(), cond, toy.text(), toy.latent(), 1, 2, 1.0, "euler", 1.0)


def test_a_compiled_network_refuses_them(models: dict[str, Any]) -> None:
    """ComfyUI leaves transformer_options out of the guards, so that the attention of the first run would stay."""
    compiled = models["UNETLoader"].clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    with pytest.raises(UniPicError, match="do not work with TorchCompileModel"):
        few_step(compiled, INFLUENCED["box"])


class Previous(ControlBase):
    """A ControlNet before this one in the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        self.calls.append("pre_run")

    def get_control(self, *args: Any) -> Any:
        self.calls.append("get_control")
        return {"input": []}


def test_other_controls_run_too(models: dict[str, Any]) -> None:
    previous, control = Previous(), InfluenceControl(INFLUENCED["box"])
    control.set_previous_controlnet(previous)
    options: dict[str, Any] = {}
    control.pre_run(models["UNETLoader"].model, models["UNETLoader"].model.model_sampling.percent_to_sigma)
    x = torch.zeros(1, 16, 1, 8, 8)
    assert control.get_control(x, torch.tensor([0.5]), {"ref_latents": [x, x]}, 1, options) == {"input": []}
    assert OVERRIDE in options
    assert previous.calls == ["pre_run", "get_control"]
    clone = control.deepclone_multigpu(torch.device("cpu"), autoregister=True)
    assert clone.influences == control.influences
    assert control.get_instance_for_device(torch.device("cpu")) is clone


def test_another_override_gets_the_bias() -> None:
    shapes = (LatentShape(1, 2, 2), LatentShape(1, 1, 2))
    bias = torch.full((4, 1), -2.0)
    seen: list[Tensor] = []

    def inner(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor, **options: Any) -> Tensor:
        seen.append(mask)
        return function(q, k, v, heads, mask, **options)

    q = torch.randn(1, 2, 9, 8)
    padding = torch.zeros(1, 1, 9)
    padding[..., 2] = -5
    got, want = (
        biased_attention(bias, shapes, override)(attention_pytorch, q, q, q, 2, padding, skip_reshape=True)
        for override in (None, inner)
    )
    assert torch.equal(got, want)
    expected = padding.expand(1, 9, 9).clone()
    expected[:, 3:7, 7:] -= 2
    assert torch.equal(seen[0], expected)


@pytest.mark.usefixtures("fresh")
def test_multi_image_compose_gives_them(tiny: Any) -> None:
    boxes = '[{"id": "image_1", "bbox": [0, 0, 1000, 500]}]'
    done = MultiImageCompose.execute(*tiny, "Go.", images={"image_1": image(0)}, boxes=boxes, **WISHES).args
    for cond in done[:2]:
        assert cond[0][1]["control"].influences == (Influence(region=LEFT),)
    assert composition_of(*done[:2]) is done[0][0][1]["unipic_composition"]
    done[0][0][1]["control"] = Previous()
    with pytest.raises(UniPicError, match="must come straight from one Multi-Image Compose"):
        composition_of(*done[:2])
