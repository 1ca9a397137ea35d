"""ComfyUI's latent format: channels and statistics of the model's VAE, and preview colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from comfy.latent_formats import Wan21
from torch import Tensor

from ....unipic_core.model.vae import VAEConfig
from ....unipic_core.weights.vae import read_vae_config


class PictureLatents(Wan21):
    """Latents [B, C, 1, h, w] of a VAE config, the release's by default; a latent without the frame gets one."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        config = config or VAEConfig()
        self.latent_channels = config.z_dim
        self.latents_mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        if config != VAEConfig():  # ComfyUI's preview colours are those of the release's VAE
            self.latent_rgb_factors: list[list[float]] | None = None
            self.latent_rgb_factors_bias: list[float] | None = None
            self.taesd_decoder_name = None

    def process_in(self, latent: Tensor) -> Tensor:
        return super().process_in(latent if latent.ndim == 5 else latent[:, :, None])


def read_latent_format(folder: Path) -> PictureLatents:
    """Latent format of `folder`/vae/config.json; the release's if there is no such file. Raises CheckpointError."""
    vae = folder / "vae"
    return PictureLatents(read_vae_config(vae) if (vae / "config.json").is_file() else None)


def fit_preview(latents: PictureLatents, decode: Callable[[Tensor], Tensor], side: int = 4) -> None:
    """Set preview colours for a VAE that has none, from the colour that each channel alone gives a flat picture.

    decode: the VAE's latents [B, C, 1, h, w] -> pictures [B, H, W, 3] in [0, 1].
    """
    c = latents.latent_channels
    units = torch.cat([torch.zeros(1, c), torch.eye(c), -torch.eye(c)])
    flat = units[:, :, None, None, None].expand(-1, -1, 1, side, side)
    colours = decode(latents.process_out(flat)).float().reshape(len(units), -1, 3).mean(1) * 2 - 1
    latents.latent_rgb_factors_bias = colours[0].tolist()
    latents.latent_rgb_factors = ((colours[1 : c + 1] - colours[c + 1 :]) / 2).tolist()
