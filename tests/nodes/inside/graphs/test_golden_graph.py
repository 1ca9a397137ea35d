"""The five golden cases through the nodes from end to end: LoadUniPic, MultiImageCompose, the samplers, the VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui import CASES
from safetensors.torch import load_file
from sampled import sample_from
from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.load import LoadUniPic
from unipic_pack.unipic_core.conditioning.images import load_image
from unipic_pack.unipic_core.conditioning.sequence import LatentShape, pack_latents, unpack_latents
from unipic_pack.unipic_core.run.plan import resolve

torch.set_num_threads(1)
CLOSE = 1e-4


@pytest.fixture(scope="module")
def loaded(golden: Path) -> tuple[Any, ...]:
    """MODEL, CLIP and VAE of the golden folder, put where a released one goes."""
    shutil.copytree(golden / "tiny", Path(folder_paths.models_dir) / "unipic" / "tiny", dirs_exist_ok=True)
    return LoadUniPic.execute("unipic/tiny", "auto", "auto", "as stored").result


@pytest.mark.parametrize("name", CASES)
def test_case(loaded: tuple[Any, ...], golden: Path, name: str) -> None:
    model, clip, vae = loaded
    folder = golden / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    count = len(case["reference_sizes"])
    images = {IMAGES[i]: to_image(load_image(folder / f"image_{i + 1}.png")) for i in range(count)}
    shape = LatentShape.of_pixels(case["width"], case["height"])
    added = [f"step_noise_{i + 1}" for i in range(case["steps"])]
    step_noise = [unpack_latents(tensors[n], shape) for n in added if n in tensors]
    with torch.inference_mode():
        positive, negative, latent, _ = MultiImageCompose.execute(
            clip,
            vae,
            case["prompt"],
            case["negative_prompt"],
            case["width"],
            case["height"],
            reference_budget=case["reference_budget"],
            images=images,
        ).result
        settings = resolve(attachment_of(model).recipe, case["steps"], case["true_cfg_scale"], case["sampler"])
        start = unpack_latents(tensors["noise"], shape)
        out = sample_from(model, settings, start, step_noise, positive, negative, latent)
        x0, decoded = pack_latents(model.model.process_latent_in(out)), vae.decode(out)
    want = tensors[f"latents_after_step_{case['steps']}"]
    assert float((positive[0][0] - tensors["prompt_embeds"]).abs().max()) < CLOSE
    assert float((x0 - want).abs().max()) < CLOSE
    picture = decoded.reshape(-1, *decoded.shape[-3:]).movedim(-1, 1) * 2 - 1
    assert float((picture - tensors["decoded"]).abs().max()) < CLOSE
