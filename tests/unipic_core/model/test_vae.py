"""The 2-D VAE against diffusers' video VAE on single pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from unipic_core.model.vae import ImageVAE
from unipic_core.weights.vae import load_image_vae

SIZES: list[dict[str, Any]] = [
    {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1] * 4, "latents_std": [1.3] * 4},
    {"base_dim": 8, "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]},
    {"base_dim": 8, "num_res_blocks": 1, "dim_mult": [1, 1, 2, 3], "temperal_downsample": [True, False, False]},
]


@pytest.fixture(scope="module", params=SIZES, ids=["z4", "released", "odd"])
def pair(request, tmp_path_factory) -> tuple[Any, ImageVAE]:
    """The video VAE, and ours from its folder."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    video = AutoencoderKLQwenImage(**request.param).eval()
    video.save_pretrained(folder)
    return video, load_image_vae(folder)


def statistics(video: Any) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([video.config.latents_mean, video.config.latents_std])[..., None, None, None]
    return mean, std


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 64), (96, 32), (8, 8)])
def test_equals_the_video_vae(pair, size):
    video, image = pair
    mean, std = statistics(video)
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = image.encode(pictures)
    for picture, z in zip(pictures, latents, strict=True):
        mode = video.encode(picture[None, :, None]).latent_dist.mode()[0]
        torch.testing.assert_close((mode - mean) / std, z, rtol=0, atol=1e-5)
        decoded = video.decode((z * std + mean)[None]).sample[0, :, 0]
        torch.testing.assert_close(decoded, image.decode(z[None])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_statistics_are_applied_in_float32(pair):
    """bfloat16 weights give float32 latents and pictures: only the network itself rounds."""
    _, image = pair
    half = ImageVAE(image.config).bfloat16()
    half.load_state_dict(image.state_dict())
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z = half.posterior(pictures.bfloat16())[0].float()
    mean, std = torch.tensor([image.config.latents_mean, image.config.latents_std])[..., None, None]
    latents = half.encode(pictures)
    assert torch.equal(latents[:, :, 0], (z - mean) / std)
    assert half.decode(latents).dtype == torch.float32
