"""The nodes, wired as in a graph, give the numbers of `UniPicPipeline`: same model, same inputs, same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sampled import sample_from
from torch import Tensor
from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
from unipic_pack.nodes.host.model_paths import DEFAULT_MODEL
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.load import LoadUniPic
from unipic_pack.nodes.sample_images import FOLDER
from unipic_pack.unipic_core.conditioning.images import load_image
from unipic_pack.unipic_core.conditioning.sequence import LatentShape, pack_latents, unpack_latents
from unipic_pack.unipic_core.run.plan import resolve

torch.set_num_threads(1)

PICTURES = ("astronaut", "guitar", "beach", "pizza", "panda", "top-hat")
PROMPT = "Put the guitar from image 2 in the hands of the astronaut from image 1, on the beach of image 3."
STEPS, TOLERANCE = 4, 1e-3


@pytest.fixture(scope="module")
def by_pipeline(pipeline: Any, nano: Path) -> Any:
    return pipeline.UniPicPipeline.from_pretrained(nano, torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, ...]:
    """MODEL, CLIP and VAE of the node's defaults."""
    return LoadUniPic.execute(DEFAULT_MODEL, "auto", "auto", "as stored").result


def noises(shape: LatentShape, channels: int) -> list[Tensor]:
    """Packed start noise, and what the consistency sampler adds: [1, N, 4C] each."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(1, shape.num_tokens, channels, generator=generator) for _ in range(STEPS)]


def by_nodes(loaded: tuple[Any, ...], count: int, sampler: str, cfg: float, shape: LatentShape) -> Tensor:
    """Packed, normalised latents."""
    model, clip, vae = loaded
    pictures = {IMAGES[i]: to_image(load_image(FOLDER / f"{name}.png")) for i, name in enumerate(PICTURES[:count])}
    positive, negative, latent, _ = MultiImageCompose.execute(clip, vae, PROMPT, images=pictures).result
    start, *added = (unpack_latents(n, shape) for n in noises(shape, model.model.diffusion_model.config.in_channels))
    settings = resolve(attachment_of(model).recipe, STEPS, cfg, sampler)
    used = added if sampler == "consistency" else []
    out = sample_from(model, settings, start, used, positive, negative, latent)
    return pack_latents(model.model.process_latent_in(out))


@pytest.mark.parametrize(("sampler", "cfg"), [("euler", 1.0), ("euler", 3.0), ("consistency", 1.0)])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
@pytest.mark.filterwarnings("ignore:no pictures given")
def test_the_pipelines_latents(loaded: Any, by_pipeline: Any, count: int, sampler: str, cfg: float) -> None:
    shape = LatentShape(1, 16, 16)
    start, *added = noises(shape, by_pipeline.transformer.config.in_channels)
    with torch.inference_mode():  # as ComfyUI's executor does
        got = by_nodes(loaded, count, sampler, cfg, shape)
    want = by_pipeline(
        [load_image(FOLDER / f"{name}.png") for name in PICTURES[:count]],
        PROMPT,
        num_inference_steps=STEPS,
        true_cfg_scale=cfg,
        sampler=sampler,
        latents=start,
        step_noise=added if sampler == "consistency" else None,
        output_type="latent",
    ).images
    assert got.shape == want.shape
    assert float((got - want).abs().max()) < TOLERANCE


def test_the_same_picture_by_the_sampler_node(loaded: Any) -> None:
    """FewStepSampler with the recipe's settings: one seed, one picture; another seed, another."""
    from unipic_pack.nodes.sample import FewStepSampler

    model, clip, vae = loaded
    pictures = {IMAGES[0]: to_image(load_image(FOLDER / "panda.png"))}
    with torch.inference_mode():
        positive, negative, latent, _ = MultiImageCompose.execute(clip, vae, PROMPT, images=pictures).result
        first, again, other = (
            FewStepSampler.execute(model, positive, negative, latent, seed, 2, 0.0, "auto", 1.0).result[0]["samples"]
            for seed in (3, 3, 4)
        )
        decoded = vae.decode(first)
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0.1
    assert decoded.shape[-3:] == (256, 256, 3)
