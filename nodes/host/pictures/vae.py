"""The Qwen-Image VAE as ComfyUI's VAE: of any width, computed in two dimensions, for pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ....unipic_core.model.vae import ImageVAE, VAEConfig
from ....unipic_core.weights.vae import load_image_vae, weights_in_file

ENCODE_VALUES, DECODE_VALUES = 1000, 1100
"""Values to reserve per pixel when a VAE of base_dim 96 encodes or decodes. Counted at 512x512 in bf16: 581 and 675
alive at once; the rest is for the convolutions' workspace and for attention over larger pictures."""

_BASE_DIM = 96


class FramesVAE(ImageVAE):
    """The image VAE with ComfyUI's interface: pictures in [-1, 1] <-> latents that are not normalised.

    Every frame is a separate picture. Pictures [B, 3, T, H, W], latents [B, z, T, H/8, W/8]; or without T.
    """

    def encode(self, pictures: Tensor) -> Tensor:
        """Mode of the posterior."""
        return _per_frame(pictures, lambda frames: self.posterior(frames)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, not clamped: ComfyUI does that."""
        return _per_frame(latents, self.decode_raw)


def _per_frame(x: Tensor, function: Any) -> Tensor:
    if x.ndim == 4:
        return function(x)
    frames = x.movedim(2, 1).flatten(0, 1)
    return function(frames).unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)


class UniPicVAE(comfy.sd.VAE):
    """ComfyUI's VAE around a FramesVAE. A batch of images is a batch of pictures, not a video.

    source: the vae/ of a pipeline, or a file. config: the sizes, and the statistics by which a MODEL normalises the
    latents.
    """

    def __init__(self, source: Path) -> None:
        with _without("No VAE weights detected"):
            super().__init__(sd={})  # no weights: only the attributes of ComfyUI's present version
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        operations = comfy.ops.disable_weight_init
        network = load_image_vae(source, self.vae_dtype, kind=FramesVAE, operations=operations)
        self.first_stage_model = network
        self.config = network.config
        self._describe(network.config)
        comfy.model_management.archive_model_dtypes(network)
        # moved as a whole: its norms are plain parameters, which streaming would leave behind; it is small
        self.disable_offload = True
        offload = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(network, load_device=self.device, offload_device=offload)
        self.model_size()

    def get_sd(self) -> dict[str, Tensor]:
        """The weights as Save VAE and Save Checkpoint write them: of the video model, as in qwen_image_vae.safetensors.

        CheckpointError for a VAE that such a file cannot describe.
        """
        return weights_in_file(self.first_stage_model)

    def _describe(self, config: VAEConfig) -> None:
        """Set the attributes that ComfyUI's encode and decode read, plain and tiled."""
        self.latent_channels, self.output_channels = config.z_dim, 3
        self.latent_dim, self.not_video = 3, True
        self.downscale_ratio = self.upscale_ratio = (_same, 8, 8)
        self.downscale_index_formula = self.upscale_index_formula = (1, 8, 8)
        width = config.base_dim / _BASE_DIM

        def memory(values: int, shape: Any, dtype: torch.dtype) -> float:
            return values * width * prod(shape[2:]) * comfy.model_management.dtype_size(dtype)

        self.memory_used_encode = lambda shape, dtype: memory(ENCODE_VALUES, shape, dtype)
        self.memory_used_decode = lambda shape, dtype: memory(64 * DECODE_VALUES, shape, dtype)


def _same(frames: int) -> int:
    return frames


@contextmanager
def _without(message: str) -> Iterator[None]:
    """Leave one message out of the log."""

    def differs(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    log = logging.getLogger()
    log.addFilter(differs)
    try:
        yield
    finally:
        log.removeFilter(differs)


def load_vae(source: Path) -> UniPicVAE:
    """The VAE of a pipeline folder's vae/ (diffusers' layout, any z_dim and base_dim), or of ComfyUI's file.

    Raises CheckpointError.
    """
    source = Path(source)
    vae = UniPicVAE(source if source.is_file() else source / "vae")
    vae.patcher.cached_patcher_init = (_load_patcher, (source,))
    return vae


def _load_patcher(source: Path, disable_dynamic: bool = False) -> Any:
    return load_vae(source).patcher  # never dynamic
