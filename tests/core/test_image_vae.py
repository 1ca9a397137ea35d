"""The 2-D VAE against diffusers' video VAE on single pictures."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from unipic_core.image_vae import ImageVAE, VAEConfig, image_weights, video_weights

SIZES = [
    {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1] * 4, "latents_std": [1.3] * 4},
    {"base_dim": 8, "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]},
]


def pair(sizes):
    torch.manual_seed(0)
    video = AutoencoderKLQwenImage(**sizes).eval()
    image = ImageVAE(VAEConfig.from_dict(dict(video.config))).eval()
    image.load_state_dict(image_weights(video.state_dict()))
    return video, image


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_video_vae(sizes):
    video, image = pair(sizes)
    pictures = torch.rand(2, 3, 48, 64) * 2 - 1
    stats = torch.tensor([video.config.latents_mean, video.config.latents_std])[..., None, None, None]
    with torch.no_grad():
        latents = image.encode(pictures)
        for picture, z in zip(pictures, latents, strict=True):
            mode = video.encode(picture[None, :, None]).latent_dist.mode()[0]
            assert torch.allclose((mode - stats[0]) / stats[1], z, atol=1e-5)
            decoded = video.decode((z * stats[1] + stats[0])[None]).sample[0, :, 0]
            assert torch.allclose(decoded, image.decode(z[None])[0], atol=1e-5)


def test_weights_there_and_back():
    video, image = pair(SIZES[0])
    shapes = {name: w.shape for name, w in video.state_dict().items()}
    rebuilt = image_weights(video_weights(image.state_dict(), shapes))
    assert rebuilt.keys() == image.state_dict().keys()
    assert all(torch.equal(rebuilt[k], w) for k, w in image.state_dict().items())


def test_a_missing_weight_is_named():
    video, image = pair(SIZES[0])
    weights = dict(image.state_dict())
    del weights["encoder.conv_in.weight"]
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight"):
        video_weights(weights, {name: w.shape for name, w in video.state_dict().items()})
