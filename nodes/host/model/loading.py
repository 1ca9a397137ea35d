"""Loading of a MODEL: weights on disk to a ModelPatcher around `UniPicModel`, with their recipe attached."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ....unipic_core.conditioning.reference_sizes import DEFAULT_BUDGET
from ....unipic_core.conditioning.sequence import PATCH, PIXELS_PER_TOKEN
from ....unipic_core.errors import CheckpointError, UniPicError
from ....unipic_core.model.layers import Operations
from ....unipic_core.run.plan import resolve
from ....unipic_core.sampling.schedules import resolution_shift
from ....unipic_core.weights.files import Weights
from ....unipic_core.weights.formats.quantised import FP8
from ....unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from ....unipic_core.weights.transformer import compute_dtype_of, open_transformer, read_shift
from ..recipe_attachment import RecipeAttachment, attach, attachment_of
from ..sampling.conditionings import adapt_conditionings
from .kv_cache import TIME_ROUNDING
from .kv_memory import cache_during_runs
from .latent_format import PictureLatents, read_latent_format
from .mmdit import network_options
from .model import UniPicConfig
from .saving import save_with_recipe
from .state_dict import check_finite, state_dict, storage_dtype

WEIGHT_DTYPES = {"as stored": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

_SMALL = 1 << 28
"""Bytes up to which weights "as stored" are converted to the type that a CPU computes in: casting them in every step
would take a tenth of the nano's time."""


def load_model(
    source: Path,
    weight_dtype: str = "as stored",
    latents: PictureLatents | None = None,
    custom_operations: Operations | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of a pipeline folder, a transformer folder or a single file.

    weight_dtype: one of `WEIGHT_DTYPES`. latents: None = those of the folder's VAE, the release's where it has none.
    custom_operations: layers in place of ComfyUI's. Raises CheckpointError.
    """
    opened = open_transformer(source, any_quantisation=True)
    config = opened.config
    latents = latents or read_latent_format(_pipeline_folder(source))
    if config.in_channels != PATCH**2 * latents.latent_channels:
        raise CheckpointError(
            f"{source} expects latents of {config.in_channels // PATCH**2} channels, its VAE makes "
            f"{latents.latent_channels}; they belong to different models: download the folder again"
        )
    attached = RecipeAttachment(opened.recipe, read_shift(_pipeline_folder(source)))
    model_config = UniPicConfig(network_options(config), latents, default_mu(attached))
    patcher = _build(source, opened.weights, model_config, weight_dtype, custom_operations, disable_dynamic)
    patcher.cached_patcher_init = (load_model, (source, weight_dtype, latents, custom_operations))
    attach(patcher, attached)
    round_times(patcher)
    adapt_conditionings(patcher)
    cache_during_runs(patcher)
    save_with_recipe(patcher)
    return patcher


def round_times(model: comfy.model_patcher.ModelPatcher) -> None:
    """Set the rounding of times in bfloat16 of a UniPic MODEL from its recipe."""
    options = model.model_options.setdefault("transformer_options", {})
    options[TIME_ROUNDING] = resolve(attachment_of(model).recipe).time_rounding


def _build(
    source: Path,
    weights: Weights,
    config: UniPicConfig,
    weight_dtype: str,
    operations: Operations | None,
    disable_dynamic: bool,
) -> comfy.model_patcher.ModelPatcher:
    if weight_dtype not in list(WEIGHT_DTYPES):
        raise UniPicError(f"weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {weight_dtype!r}")
    tensors = state_dict(weights, keep_quantised=weight_dtype != "bf16" and operations is None)
    check_finite(source, tensors)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    config.quant_config = comfy.utils.detect_layer_quantization(tensors, "")
    config.custom_operations = operations
    dtype, cast = _dtypes(weights, tensors, weight_dtype, config)
    config.set_inference_dtype(dtype, cast, device=load_device)
    model = config.get_model(tensors)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    return patcher


def default_mu(attached: RecipeAttachment) -> float:
    """Time shift mu for a picture that fills the recipe's output budget; stock samplers and schedulers use it."""
    side = attached.recipe.output_budget or DEFAULT_BUDGET
    return math.log(resolution_shift((side // PIXELS_PER_TOKEN) ** 2, attached.shift))


def _dtypes(
    weights: Weights, tensors: dict[str, Tensor], weight_dtype: str, config: UniPicConfig
) -> tuple[torch.dtype, torch.dtype | None]:
    """(storage type of the network, type it computes in if that is another one)."""
    device = management.get_torch_device()

    def cast(dtype: torch.dtype | None) -> torch.dtype | None:
        return management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)

    if config.quant_config:  # quantised layers have a type each
        return compute_dtype_of(weights), cast(None)
    wanted, stored = WEIGHT_DTYPES[weight_dtype], storage_dtype(tensors)
    dtype = stored if wanted is None or (wanted in FP8 and stored in FP8) else wanted
    compute = cast(dtype)
    if wanted is None and compute is not None and management.is_device_cpu(device):
        small = sum(t.numel() for t in tensors.values()) * compute.itemsize <= _SMALL
        return (compute, None) if small else (dtype, compute)
    return dtype, compute


def _pipeline_folder(source: Path) -> Path:
    """Folder that would hold the weights' vae/ and scheduler/; for a single file there is none, so the file itself."""
    return source.parent if source.is_dir() and source.name in TRANSFORMER_FOLDERS else source
