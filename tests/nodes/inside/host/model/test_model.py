"""LoadUniPic's MODEL: the core's numbers through ComfyUI's machinery."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.memory_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import pytest
import torch
from model_tools import Case, four_channels, random_inputs, velocity
from safetensors.torch import load_file, save_file
from torch import Tensor
from unipic_pack.nodes.host.model.latent_format import PictureLatents, fit_preview, read_latent_format
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.model.mmdit import ComfyMMDiT, network_options
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_pack.unipic_core.errors import CheckpointError, UniPicError
from unipic_pack.unipic_core.model.config import MMDiTConfig
from unipic_pack.unipic_core.sampling.schedules import resolution_shift
from unipic_pack.unipic_core.weights.transformer import load_transformer

import nodes as comfy_nodes

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")
CASES = (
    "one_reference_4_steps",
    "reference_larger_than_target",
    "six_references_2_steps",
    "three_references_base_6_steps_cfg4",
    "two_references_8_steps_cfg4",
)


@pytest.fixture(scope="module")
def tiny(golden: Path):
    return load_model(golden / "tiny")


@pytest.mark.parametrize("name", CASES)
def test_golden_velocity_of_the_first_step(name: str, golden: Path, tiny: Any) -> None:
    case = Case(golden / "cases" / name)
    first = float(case.tensors["times"][0])
    got = velocity(tiny, case.noise, first, case.text, case.references)
    torch.testing.assert_close(pack_latents(got), case.tensors["velocity_first"], rtol=0, atol=1e-4)
    print(name, float((pack_latents(got) - case.tensors["velocity_first"]).abs().max()))


@pytest.mark.parametrize("count", [0, 2])
def test_nano_as_the_core_computes_it(count: int, nano: Path, nano_model: Any) -> None:
    x, text, references = random_inputs()
    references = references[:count]
    network = load_transformer(nano, dtype=torch.float32)
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references])
    want = unpack_latents(network(packed, 0.7, TextCond(text)), LatentShape(1, 4, 4))
    torch.testing.assert_close(velocity(nano_model, x, 0.7, text, references), want, rtol=0, atol=2e-5)


def test_batch_of_pictures_with_one_set_of_references(nano_model: Any) -> None:
    x, text, references = random_inputs(batch=2)
    together = velocity(nano_model, x, 0.4, text, references)
    for i in range(2):
        alone = velocity(nano_model, x[i : i + 1], 0.4, text[i : i + 1], references)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["whole numbers", "bool", "bias"])
def test_padded_text_gives_what_it_gives_alone(kind: str, nano_model: Any) -> None:
    """cond and uncond in one batch: the shorter text is padded, and its padding is masked."""
    x, text, references = random_inputs()
    text[:, 6:] = 50.0
    mask = torch.tensor([[1] * 6 + [0] * 3])
    given = {"whole numbers": mask, "bool": mask.bool(), "bias": (mask.float() - 1) * 1e9}[kind]
    conds = nano_model.model.extra_conds(cross_attn=text, attention_mask=given, device="cpu")
    got = velocity(nano_model, x, 0.4, text, references, attention_mask=conds["attention_mask"].cond)
    torch.testing.assert_close(got, velocity(nano_model, x, 0.4, text[:, :6], references), rtol=0, atol=2e-5)


def test_odd_latent_sizes_are_padded_and_cut(nano_model: Any) -> None:
    x, text, references = random_inputs()
    odd = x[..., :7, :5]
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1, 0, 0), mode="circular")
    got = velocity(nano_model, odd, 0.4, text, references)
    assert got.shape == odd.shape
    torch.testing.assert_close(got, velocity(nano_model, padded, 0.4, text, references)[..., :7, :5])


def test_latents_without_a_frame(nano_model: Any) -> None:
    x, text, references = random_inputs()
    flat = velocity(nano_model, x[:, :, 0], 0.4, text, [z[:, :, 0] for z in references])
    torch.testing.assert_close(flat, velocity(nano_model, x, 0.4, text, references)[:, :, 0])


def conditioning(text: Tensor, references: list[Tensor], **values: Any) -> list:
    return [[text, {"reference_latents": references, **values}]]


@pytest.mark.parametrize("words", [9, 5])
def test_stock_ksampler(words: int, nano_model: Any) -> None:
    """Guidance with texts of the same and of other lengths, through ComfyUI's own node; the seed decides."""
    x, text, references = random_inputs()
    latent = {"samples": torch.zeros_like(x)}
    positive, negative = conditioning(text, references), conditioning(text[:, :words] * 0.5, references)

    def run(seed: int) -> Tensor:
        return comfy_nodes.common_ksampler(nano_model, seed, 2, 3.0, "euler", "simple", positive, negative, latent)[0][
            "samples"
        ]

    first = run(1)
    assert first.shape == x.shape
    assert bool(first.isfinite().all())
    torch.testing.assert_close(run(1), first)
    assert (run(2) - first).abs().max() > 0.1


def test_ksampler_is_what_the_core_computes(nano: Path, nano_model: Any) -> None:
    """Euler without guidance on ComfyUI's own sigmas, references in the VAE's units as a workflow gives them."""
    x, text, references = random_inputs()
    model = nano_model.model
    raw = [model.latent_format.process_out(z) for z in references]
    sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, "simple", 3)
    noise = comfy.sample.prepare_noise(torch.zeros_like(x), 7)
    got = comfy_nodes.common_ksampler(
        nano_model, 7, 3, 1.0, "euler", "simple", conditioning(text, raw), conditioning(text, raw), {"samples": x * 0}
    )[0]["samples"]
    network = load_transformer(nano, dtype=torch.float32)
    packed = pack_with_references(pack_latents(noise), LatentShape(1, 4, 4), [references])
    for t, after in pairwise(sigmas):
        packed = packed.with_target(packed.target + (after - t) * network(packed, t, TextCond(text)))
    want = model.latent_format.process_out(unpack_latents(packed.target, LatentShape(1, 4, 4)))
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)


def test_default_shift_is_that_of_the_recipes_output(nano: Path, nano_model: Any) -> None:
    attached = attachment_of(nano_model)
    assert attached.recipe.output_budget == json.loads((nano / "recipe.json").read_text())["output_budget"]
    tokens = (attached.recipe.output_budget // 16) ** 2
    k = resolution_shift(tokens, attached.shift)
    middle = float(nano_model.model.model_sampling.sigma(torch.tensor(0.5)))
    assert middle == pytest.approx(k / (1 + k), abs=1e-6)
    assert attachment_of(nano_model.clone()) == attached


def test_references_count_in_the_memory_estimate(golden: Path, tiny: Any, nano_model: Any) -> None:
    for patcher, channels in ((tiny, 4), (nano_model, 16)):
        references = [torch.zeros(1, channels, 1, 6, 10), torch.zeros(1, channels, 1, 12, 4)]
        shapes = patcher.model.extra_conds_shapes(reference_latents=references)
        alone = patcher.model.memory_required([1, channels, 1, 8, 8])
        with_references = patcher.model.memory_required([1, channels, 1, 8, 8], {k: [v] for k, v in shapes.items()})
        assert with_references / alone == pytest.approx((64 + 60 + 48) / 64)


def test_conditioning_of_another_model(nano_model: Any) -> None:
    x, text, references = random_inputs()
    with pytest.raises(UniPicError, match=r"text of width 128, got 3584; use the CLIP of the same Load UniPic"):
        velocity(nano_model, x, 0.5, torch.zeros(1, 4, 3584), references)
    with pytest.raises(UniPicError, match="latents of 16 channels, got 4"):
        velocity(nano_model, x, 0.5, text, [torch.zeros(1, 4, 1, 4, 4)])
    with pytest.raises(UniPicError, match="one frame, got 5"):
        velocity(nano_model, torch.zeros(1, 16, 5, 4, 4), 0.5, text, references)


def test_files_that_are_no_model(nano: Path, tmp_path: Path) -> None:
    weights = load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors")
    config = {"unipic_config": (nano / "transformer" / "config.json").read_text()}

    def written(name: str, tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, tmp_path / name, config)
        return tmp_path / name

    broken = {**weights, "txt_norm.weight": weights["txt_norm.weight"] * float("nan")}
    with pytest.raises(CheckpointError, match="NaN or infinity, first in txt_norm.weight"):
        load_model(written("nan.safetensors", broken))
    less = {n: w for n, w in weights.items() if n != "proj_out.bias"}
    with pytest.raises(CheckpointError, match="1 missing: proj_out.bias"):
        load_model(written("less.safetensors", less))
    with pytest.raises(CheckpointError, match="looks like a FLUX transformer"):
        load_model(written("flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((nano / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(cut)
    with pytest.raises(CheckpointError, match="latents of 16 channels, its VAE makes 4"):
        load_model(written("whole.safetensors", weights), latents=PictureLatents(four_channels()))


class Hostile:
    """Runs code where a careless loader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_hostile_pickle_never_runs(tmp_path: Path) -> None:
    torch.save({"txt_norm.weight": torch.zeros(2), "x": Hostile(tmp_path / "ran")}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="was refused; use a .safetensors version"):
        load_model(tmp_path / "model.bin")
    assert not (tmp_path / "ran").exists()


def test_latent_format_of_a_folder(golden: Path) -> None:
    latents = read_latent_format(golden / "tiny")
    z = torch.randn(2, 4, 1, 3, 5)
    stats = torch.tensor([four_channels().latents_mean, four_channels().latents_std])[:, None, :, None, None, None]
    torch.testing.assert_close(latents.process_in(z), (z - stats[0]) / stats[1])
    torch.testing.assert_close(latents.process_out(latents.process_in(z)), z)
    torch.testing.assert_close(latents.process_in(z[:, :, 0]), latents.process_in(z))
    assert latents.latent_rgb_factors is None
    assert PictureLatents().latent_rgb_factors is not None


def test_fitted_preview_of_a_linear_vae() -> None:
    """A VAE that is a matrix: the fit finds it, in the normalised latents' units."""
    matrix = torch.tensor([[0.05, -0.02, 0.01], [0.0, 0.04, 0.03], [0.02, 0.02, -0.05], [0.01, 0.0, 0.06]])
    latents = PictureLatents(four_channels())
    fit_preview(latents, lambda z: 0.5 + z[:, :, 0].movedim(1, -1) @ matrix)
    std = latents.latents_std.reshape(-1, 1)
    torch.testing.assert_close(torch.tensor(latents.latent_rgb_factors), 2 * std * matrix)
    mean = latents.latents_mean.reshape(-1)
    torch.testing.assert_close(torch.tensor(latents.latent_rgb_factors_bias), 2 * (mean @ matrix))


def test_parameters_sit_at_the_top_under_their_own_names(nano_model: Any) -> None:
    names = list(nano_model.model.state_dict())
    assert "diffusion_model.transformer_blocks.0.img_mlp.net.0.proj.weight" in names
    network = ComfyMMDiT(
        operations=torch.nn,
        **network_options(
            MMDiTConfig(
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=8,
                axes_dims_rope=(4, 6, 6),
            )
        ),
    )
    assert network.default_ref_method == "index"
    assert math.prod(network.img_in.weight.shape) == 64 * 16
