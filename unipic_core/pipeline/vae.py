"""The Qwen-Image VAE (diffusers' AutoencoderKLQwenImage) for single pictures, with normalised latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights import open_weights

TILE_ABOVE = 1536 * 1536
"""Pictures of more pixels are encoded and decoded in overlapping tiles."""

TILE, STRIDE = 768, 640
"""Side of a tile and distance of tiles, in pixels."""


class VAE:
    """Pictures <-> normalised latents (z - latents_mean) / latents_std, one picture at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tile_above, self.tile, self.stride = TILE_ABOVE, TILE, STRIDE
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(model.config.latents_mean, dtype=torch.float32).reshape(shape)
        self._std = torch.tensor(model.config.latents_std, dtype=torch.float32).reshape(shape)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> VAE:
        """From a vae/ folder of diffusers' layout. CheckpointError if it is damaged or of another architecture."""
        from diffusers import AutoencoderKLQwenImage

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("_class_name") != "AutoencoderKLQwenImage":
                raise CheckpointError(
                    f"{folder} holds a {config.get('_class_name')}, expected an AutoencoderKLQwenImage; "
                    "take vae/ from a Qwen-Image or UniPic 3 repository"
                )
            weights = open_weights(folder)
            model = AutoencoderKLQwenImage.from_config(config)
            model.load_state_dict({name: weights.get(name) for name in weights}, strict=True)
        except CheckpointError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the VAE in {folder} cannot be loaded: {detail}") from error
        model = nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own warns about modules it does not have
        return cls(model.eval().requires_grad_(False))

    @property
    def channels(self) -> int:
        return self._mean.shape[1]

    def to(self, device: torch.device | str) -> VAE:
        self.model.to(device)
        return self

    def encode(self, picture: Tensor) -> Tensor:
        """[3, H, W] in [-1, 1] -> [1, C, 1, H/8, W/8] float32: the posterior's mode, normalised."""
        self._tile(picture.shape[-2], picture.shape[-1])
        weight = next(self.model.parameters())
        z = self.model.encode(picture[None, :, None].to(weight)).latent_dist.mode().float()
        return (z - self._mean.to(z)) / self._std.to(z)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, 1, h, w] normalised -> [B, 3, 8h, 8w] float32 in [-1, 1]."""
        self._tile(8 * latents.shape[-2], 8 * latents.shape[-1])
        weight = next(self.model.parameters())
        z = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        rows = [self.model.decode(row.to(weight), return_dict=False)[0][:, :, 0] for row in z.split(1)]
        return torch.cat(rows).float().clamp(-1, 1)

    def _tile(self, height: int, width: int) -> None:
        """Switch tiling on for large pictures; the seams are blended, so small ones are left exact."""
        if height * width > self.tile_above:
            self.model.enable_tiling(self.tile, self.tile, self.stride, self.stride)
        else:
            self.model.use_tiling = False
