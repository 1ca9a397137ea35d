"""The VAE of the pipeline: pictures of any size, within bounded memory."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning.sequence import VAE_SCALE
from ..model.vae import ImageVAE
from ..run.tiling import tiled
from ..weights.vae import OpenedVAE, load_image_vae

TILE_ABOVE = 1536 * 1536
"""So many pixels are encoded or decoded at once; larger pictures in overlapping tiles."""

TILE, OVERLAP = 1152, 192
"""Longest side of a tile, and what neighbours share at least, in pixels."""


class VAE:
    """Pictures <-> normalised latents (z - latents_mean) / latents_std.

    Tiles are cross-faded. What they change: the attention in the middle of the VAE sees its own tile instead of the
    whole picture, and the convolutions see zeros beyond a tile's edge, where its weight is small. The norms are per
    position, so tiles do not change them.
    """

    def __init__(self, model: ImageVAE) -> None:
        self.model = model
        self.tile_above, self.tile, self.overlap = TILE_ABOVE, TILE, OVERLAP

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | OpenedVAE, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> VAE:
        """From a vae/ folder of diffusers' layout, or an opened one. Raises CheckpointError."""
        return cls(load_image_vae(folder, dtype, device))

    @property
    def channels(self) -> int:
        return self.model.config.z_dim

    def to(self, device: torch.device | str) -> VAE:
        self.model.to(device)
        return self

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, C, 1, H/8, W/8] float32: the posterior's mode, normalised."""
        rows = pictures.split(self._at_once(pictures.shape[-2] * pictures.shape[-1]))
        return torch.cat([self._encode(row) for row in rows])

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, 1, h, w] normalised -> [B, 3, 8h, 8w] float32 in [-1, 1]."""
        rows = latents.split(self._at_once(VAE_SCALE**2 * latents.shape[-2] * latents.shape[-1]))
        return torch.cat([self._decode(row) for row in rows])

    def _at_once(self, pixels: int) -> int:
        """How many pictures of so many pixels."""
        return max(self.tile_above // pixels, 1)

    def _encode(self, pictures: Tensor) -> Tensor:
        if pictures.shape[-2] * pictures.shape[-1] <= self.tile_above:
            return self.model.encode(pictures)
        return tiled(self.model.encode, pictures, self.tile, self.overlap, Fraction(1, VAE_SCALE))

    def _decode(self, latents: Tensor) -> Tensor:
        if VAE_SCALE**2 * latents.shape[-2] * latents.shape[-1] <= self.tile_above:
            return self.model.decode(latents)
        tile, overlap = self.tile // VAE_SCALE, self.overlap // VAE_SCALE
        return tiled(self.model.decode, latents, tile, overlap, Fraction(VAE_SCALE))
