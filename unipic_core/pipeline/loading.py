"""Open a pipeline folder and load its parts; messages name missing parts and their source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..conditioning.sequence import PATCH
from ..errors import CheckpointError, UniPicError
from ..model.mmdit import MMDiT
from ..run.kv_cache import max_kv_cache_bytes
from ..run.kv_storage import CacheStorage
from ..run.plan import resolve
from ..sampling.schedules import Shift
from ..weights.files import Weights
from ..weights.hub_cache import model_folder
from ..weights.recipe import Recipe
from ..weights.stored import STORAGES, Storage, holds_fp8, load_stored
from ..weights.text_encoder import encoder_parameters, open_encoder
from ..weights.transformer import (
    PARTS,
    OpenedModel,
    check_dtype,
    find_transformer,
    load_transformer,
    open_transformer,
    read_shift,
)
from ..weights.vae import OpenedVAE, open_vae
from .memory_plan import MemoryPlan, PartSizes, plan_memory
from .offload import checked_device, readable_out_of_memory
from .text_encoder import TextEncoder
from .vae import VAE

NEEDED = tuple(part for part in PARTS if part not in ("transformer", "processor", "scheduler"))
"""Folders that a pipeline needs beside the network; image processor and schedule default to the released ones."""

SOURCE = "Qwen/Qwen-Image-Edit (text_encoder, tokenizer, processor, vae and scheduler; about 17 GB)"

_MEMORY_ADVICE = "the weights do not fit; close other programs, use torch.bfloat16, or a machine with more memory"


@dataclass
class Parts:
    """The loaded parts of a `UniPicPipeline`."""

    transformer: MMDiT
    text_encoder: TextEncoder
    vae: VAE
    recipe: Recipe
    shift: Shift
    device: torch.device
    offload: bool


@dataclass(frozen=True)
class OpenedPipeline:
    """A pipeline folder, opened and checked once, with its network or another one; no tensor is loaded."""

    folder: Path
    model: OpenedModel
    encoder: Weights
    vae: OpenedVAE

    @cached_property
    def encoder_parameters(self) -> int:
        """Number of parameters that the condition encoder loads."""
        return encoder_parameters(self.encoder)

    def sizes(self, dtype: torch.dtype, fp8: bool = False, cache: CacheStorage = CacheStorage()) -> PartSizes:
        """Bytes of all parts once loaded, from the files' headers. fp8: the network's matrices are stored in fp8.

        The kv_cache is counted at the recipe's reference budget; it is 0 for the attention form "full", and
        for a cache that is not on the device.
        """
        config, matrices = self.model.config, self.model.block_matrices.values()
        itemsize = cache.itemsize(dtype, config.attention_head_dim) if cache.on_device else 0
        blocks, size = config.num_layers, torch.float8_e4m3fn.itemsize if fp8 else dtype.itemsize
        return PartSizes(
            network=(self.model.parameters - sum(matrices)) * dtype.itemsize,
            block=sum(matrices) // max(blocks, 1) * size,
            blocks=blocks,
            restored=max(matrices, default=0) * dtype.itemsize if fp8 else 0,
            text_encoder=self.encoder_parameters * dtype.itemsize,
            vae=self.vae.parameters * dtype.itemsize,
            kv_cache=max_kv_cache_bytes(config, resolve(self.model.recipe).reference_budget, itemsize),
        )


def open_pipeline(folder: str | Path, transformer: str | Path | None = None) -> OpenedPipeline:
    """Open a pipeline folder; `transformer` replaces its network. Raises CheckpointError."""
    folder = model_folder(folder)
    require_folder(folder, transformer)
    model = open_transformer(folder if transformer is None else transformer)
    return OpenedPipeline(folder, model, open_encoder(folder), open_vae(folder / "vae"))


def check_storage(storage: str) -> None:
    """Raise UniPicError for a storage that is none of STORAGES."""
    if storage not in STORAGES:
        raise UniPicError(f"the storage must be one of {', '.join(STORAGES)}, got {storage!r}")


def memory_plan(
    opened: OpenedPipeline,
    dtype: torch.dtype,
    device: torch.device,
    storage: str,
    cache: CacheStorage = CacheStorage(),
) -> MemoryPlan:
    """Plan the memory of all parts before loading. storage: one of STORAGES. cache: of keys and values. Raises
    UniPicError if they do not fit."""
    check_dtype(dtype)
    check_storage(storage)
    return plan_memory(device, opened.sizes(dtype, holds_fp8(opened.model, storage), cache))


def load_parts(
    opened: OpenedPipeline,
    dtype: torch.dtype,
    device: torch.device | str,
    storage: str = "auto",
    cache: CacheStorage = CacheStorage(),
) -> Parts:
    """Load all parts. storage: of the network's matrices, one of STORAGES. cache: of keys and values. Raises
    UniPicError."""
    device = checked_device(device)
    planned = memory_plan(opened, dtype, device, storage, cache)
    folder, recipe = opened.folder, opened.model.recipe
    shift = read_shift(folder)
    with readable_out_of_memory(_MEMORY_ADVICE):
        place = torch.device("cpu") if planned.turns else device
        encoder = TextEncoder.from_checked(folder, dtype, place)
        vae = VAE.from_pretrained(opened.vae, dtype, place)
        network_storage = Storage(holds_fp8(opened.model, storage), planned.left_behind)
        if network_storage == Storage():
            network = load_transformer(opened.model, dtype=dtype, device=place)
        else:
            network = load_stored(opened.model, network_storage, dtype, place)
    network.requires_grad_(False)
    check_fit(network, encoder, vae)
    return Parts(network, encoder, vae, recipe, shift, device, planned.turns)


def require_folder(folder: Path, transformer: str | Path | None) -> None:
    """Raise CheckpointError, with the missing parts and their source, unless `folder` is a pipeline folder."""
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is one file, expected a pipeline folder; give the file as transformer= and, as the model, a "
            f"folder with {', '.join(NEEDED)}, from {SOURCE}"
        )
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; download one, or check the path")
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    if missing:
        network_only = "the network's weights only and " if transformer is None and _has_transformer(folder) else ""
        hint = ", and give this folder as transformer=" if network_only else ", and put them into the folder"
        raise CheckpointError(f"{folder} has {network_only}no {'/, '.join(missing)}/; download {SOURCE}{hint}")


def _has_transformer(folder: Path) -> bool:
    try:
        find_transformer(folder)
    except CheckpointError:
        return False
    return True


def check_fit(network: MMDiT, encoder: TextEncoder, vae: VAE) -> None:
    """Raise CheckpointError if the sizes of network, encoder and VAE do not match."""
    hidden = encoder.network.get_input_embeddings().weight.shape[1]
    if network.config.joint_attention_dim != hidden:
        raise CheckpointError(
            f"the network takes text of width {network.config.joint_attention_dim}, the encoder gives {hidden}; the "
            "transformer and the folder belong to different models"
        )
    config, channels = network.config, PATCH**2 * vae.channels
    outputs = config.patch_size**2 * config.out_channels
    if (config.in_channels, outputs) != (channels, channels):
        raise CheckpointError(
            f"the network takes {config.in_channels} channels a token and gives {outputs}, the VAE has {channels}; "
            "the transformer and the folder belong to different models"
        )
