"""VAE of the pipeline: encodes and decodes pictures of any size in bounded memory."""

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
"""Most pixels that are encoded or decoded in one pass; larger pictures are tiled."""

TILE, OVERLAP = 1152, 192
"""Longest side of a tile and least overlap of neighbours, in pixels."""


class VAE:
    """Pictures <-> normalised latents (z - latents_mean) / latents_std.

    Pictures above TILE_ABOVE are tiled and cross-faded. Tiling changes the mid-block attention, which covers one tile
    instead of the whole picture, and the convolutions, which see zeros beyond a tile's edge, where the cross-fade
    weight is small. The norms are per position and do not change.
    """

    def __init__(self, model: ImageVAE) -> None:
        self.model = model
        self.tile_above, self.tile, self.overlap = TILE_ABOVE, TILE, OVERLAP

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | OpenedVAE, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> VAE:
        """Load a vae/ folder in diffusers' layout, or an OpenedVAE. Raises CheckpointError."""
        return cls(load_image_vae(folder, dtype, device))

    @property
    def channels(self) -> int:
        return self.model.config.z_dim

    def to(self, device: torch.device | str) -> VAE:
        self.model.to(device)
        return self

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] to the normalised posterior mode [B, C, 1, H/8, W/8] float32."""
        rows = pictures.split(self._at_once(pictures.shape[-2] * pictures.shape[-1]))
        return torch.cat([self._encode(row) for row in rows])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [B, C, 1, h, w] to pictures [B, 3, 8h, 8w] float32 in [-1, 1]."""
        rows = latents.split(self._at_once(VAE_SCALE**2 * latents.shape[-2] * latents.shape[-1]))
        return torch.cat([self._decode(row) for row in rows])

    def _at_once(self, pixels: int) -> int:
        """Number of pictures of this many pixels that are processed in one pass."""
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
