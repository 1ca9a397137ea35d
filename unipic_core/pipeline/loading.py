"""Open a pipeline folder and load its parts; missing ones are named with where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..conditioning.sequence import PATCH
from ..errors import CheckpointError
from ..model.mmdit import MMDiT
from ..run.kv_cache import most_bytes
from ..run.plan import resolve
from ..sampling.schedules import Shift
from ..weights.files import Weights
from ..weights.recipe import Recipe
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
from .offload import checked_device, needs_offload, readable_out_of_memory
from .text_encoder import TextEncoder
from .vae import VAE

NEEDED = tuple(part for part in PARTS if part not in ("transformer", "processor", "scheduler"))
"""Folders that a pipeline needs beside the network; the released image processor and schedule are known without."""

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
    """A pipeline folder, opened once and checked, with the network from there or elsewhere; nothing is loaded yet."""

    folder: Path
    model: OpenedModel
    encoder: Weights
    vae: OpenedVAE

    def part_bytes(self, dtype: torch.dtype) -> list[int]:
        """Bytes of the network, the condition encoder and the VAE once loaded, from headers alone. CheckpointError."""
        counts = (self.model.parameters, encoder_parameters(self.encoder), self.vae.parameters)
        return [count * dtype.itemsize for count in counts]

    def kv_cache_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values that a run keeps at the recipe's budget: none but in a causal form."""
        return most_bytes(self.model.config, resolve(self.model.recipe).reference_budget, dtype.itemsize)


def open_pipeline(folder: str | Path, transformer: str | Path | None = None) -> OpenedPipeline:
    """Open the network from `transformer` if given, else from `folder`, which holds the rest. CheckpointError."""
    require_folder(Path(folder), transformer)
    folder = Path(folder)
    model = open_transformer(folder if transformer is None else transformer)
    return OpenedPipeline(folder, model, open_encoder(folder), open_vae(folder / "vae"))


def load_parts(opened: OpenedPipeline, dtype: torch.dtype, device: torch.device | str) -> Parts:
    """Load every part. Raises CheckpointError."""
    device = checked_device(device)
    check_dtype(dtype)
    folder, recipe = opened.folder, opened.model.recipe
    shift = read_shift(folder)
    with readable_out_of_memory(_MEMORY_ADVICE):
        offload = needs_offload(device, [*opened.part_bytes(dtype), opened.kv_cache_bytes(dtype)])
        place = torch.device("cpu") if offload else device
        encoder = TextEncoder.from_checked(folder, dtype, place)
        vae = VAE.from_pretrained(opened.vae, dtype, place)
        network = load_transformer(opened.model, dtype=dtype, device=place)
    network.requires_grad_(False)
    check_fit(network, encoder, vae)
    return Parts(network, encoder, vae, recipe, shift, device, offload)


def require_folder(folder: Path, transformer: str | Path | None) -> None:
    """CheckpointError naming the parts that a folder lacks and where to get them."""
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is one file, expected a pipeline folder; give the file as transformer= and, as the model, a "
            f"folder with {', '.join(NEEDED)}, from {SOURCE}"
        )
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; download one, or check the path")
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    if missing:
        held = "the network's weights only and " if transformer is None and _has_transformer(folder) else ""
        hint = ", and give this folder as transformer=" if held else ", and put them into the folder"
        raise CheckpointError(f"{folder} has {held}no {'/, '.join(missing)}/; download {SOURCE}{hint}")


def _has_transformer(folder: Path) -> bool:
    try:
        find_transformer(folder)
    except CheckpointError:
        return False
    return True


def check_fit(network: MMDiT, encoder: TextEncoder, vae: VAE) -> None:
    """CheckpointError if the parts belong to models of different sizes."""
    hidden = encoder.network.get_input_embeddings().weight.shape[1]
    if network.config.joint_attention_dim != hidden:
        raise CheckpointError(
            f"the network takes text of width {network.config.joint_attention_dim}, the encoder gives {hidden}; the "
            "transformer and the folder belong to different models"
        )
    config, channels = network.config, PATCH**2 * vae.channels
    made = config.patch_size**2 * config.out_channels
    if (config.in_channels, made) != (channels, channels):
        raise CheckpointError(
            f"the network takes {config.in_channels} channels a token and gives {made}, the VAE has {channels}; "
            "the transformer and the folder belong to different models"
        )
