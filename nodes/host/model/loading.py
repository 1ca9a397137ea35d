"""From weights on disk to ComfyUI's MODEL: a ModelPatcher around `ComfyMMDiT`, with the weights' recipe attached."""

from __future__ import annotations

import json
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
from ....unipic_core.weights.files import FP8, Weights
from ....unipic_core.weights.formats.safetensors_file import read_table
from ....unipic_core.weights.formats.tensor_spec import Table
from ....unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from ....unipic_core.weights.transformer import open_transformer, read_shift, stored_dtype
from ..recipe_attachment import Facts, attach, facts_of
from .kv_cache import ROUNDING, keep_during_runs
from .latent_format import PictureLatents, read_latent_format
from .mmdit import network_options
from .model import UniPicConfig
from .saving import save_with_facts

WEIGHT_DTYPES = {"as stored": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

_CHECKED = 1 << 20
"""Tensors up to this many values are checked for NaN on loading: all norms and biases, so all that a failed training or
conversion leaves; checking every weight of the released network would read 41 GB."""

_SMALL = 1 << 28
"""Bytes up to which weights "as stored" are kept in the type that a CPU computes in: the nano would spend a tenth of
each step on casting."""


def load_model(
    source: Path,
    weight_dtype: str = "as stored",
    latents: PictureLatents | None = None,
    custom_operations: Operations | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of a pipeline folder, a transformer folder or a single file.

    weight_dtype: one of `WEIGHT_DTYPES`. latents: None = as the folder's VAE says, the release's where it has none.
    custom_operations: layers in the place of ComfyUI's. Raises CheckpointError.
    """
    opened = open_transformer(source)
    config = opened.config
    latents = latents or read_latent_format(_pipeline_folder(source))
    if config.in_channels != PATCH**2 * latents.latent_channels:
        raise CheckpointError(
            f"{source} is a network for latents of {config.in_channels // PATCH**2} channels, its VAE has "
            f"{latents.latent_channels}; they belong to different models"
        )
    facts = Facts(opened.recipe, read_shift(_pipeline_folder(source)))
    model_config = UniPicConfig(network_options(config), latents, default_mu(facts))
    patcher = _build(source, opened.weights, model_config, weight_dtype, custom_operations, disable_dynamic)
    patcher.cached_patcher_init = (load_model, (source, weight_dtype, latents, custom_operations))
    attach(patcher, facts)
    round_times(patcher)
    keep_during_runs(patcher)
    save_with_facts(patcher)
    return patcher


def round_times(model: comfy.model_patcher.ModelPatcher) -> None:
    """Let the network of a MODEL of ours round times in bfloat16 as the recipe that it carries says."""
    options = model.model_options.setdefault("transformer_options", {})
    options[ROUNDING] = resolve(facts_of(model).recipe).time_rounding


def _build(
    source: Path,
    weights: Weights,
    config: UniPicConfig,
    weight_dtype: str,
    operations: Operations | None,
    disable_dynamic: bool,
) -> comfy.model_patcher.ModelPatcher:
    if weight_dtype not in WEIGHT_DTYPES:
        raise UniPicError(f"weight_dtype is one of {', '.join(WEIGHT_DTYPES)}, got {weight_dtype!r}")
    tensors = state_dict(weights, keep_scaled=weight_dtype != "bf16" and operations is None)
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


def default_mu(facts: Facts) -> float:
    """The time shift for a picture that fills the recipe's output budget; what stock samplers and schedulers use."""
    side = facts.recipe.output_budget or DEFAULT_BUDGET
    return math.log(resolution_shift((side // PIXELS_PER_TOKEN) ** 2, facts.shift))


def state_dict(weights: Weights, keep_scaled: bool) -> dict[str, Tensor]:
    """Every tensor as a view of its mapped file. weights: bare names.

    keep_scaled: scaled fp8 layers stay as they are, described as ComfyUI's quantised layers want it; otherwise, and
    where each row has a scale of its own, they are multiplied out to bfloat16.
    """
    tensors: dict[str, Tensor] = {}
    stored: Weights | None = None
    for name in weights:
        if weights.dtype(name) not in FP8:
            tensors[name] = weights.get(name, mapped=True)
            continue
        stored = stored or _as_stored(weights)
        scale = _scale(stored, name)
        if scale is None:
            tensors[name] = weights.get(name, mapped=True)
        elif keep_scaled and scale.numel() == 1:
            tensors |= _quantised(stored, name, scale)
        else:
            tensors[name] = weights.get(name).to(torch.bfloat16)
    return tensors


def _as_stored(weights: Weights) -> Weights:
    """The same files with scales and quantisation notes as tensors of their own."""
    table: Table = {}
    for file in sorted(weights.files):
        table |= read_table(file)[0]
    return Weights(weights.path, table, weights.metadata, {}).bare()


def _scale(stored: Weights, name: str) -> Tensor | None:
    layer = name.removesuffix(".weight")
    found = next((layer + end for end in (".weight_scale", ".scale_weight") if layer + end in stored), None)
    return None if found is None else stored.get(found).float()


def _quantised(stored: Weights, name: str, scale: Tensor) -> dict[str, Tensor]:
    """A layer's tensors in ComfyUI's present form; older files do not say that inputs may be quantised too."""
    layer = name.removesuffix(".weight")
    weight = stored.get(name, mapped=True)
    tensors = {name: weight, f"{layer}.weight_scale": scale.reshape(())}
    if f"{layer}.comfy_quant" in stored:
        tensors[f"{layer}.comfy_quant"] = stored.get(f"{layer}.comfy_quant")
        if f"{layer}.input_scale" in stored:
            tensors[f"{layer}.input_scale"] = stored.get(f"{layer}.input_scale")
    else:
        note = {"format": str(weight.dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    return tensors


def _dtypes(
    weights: Weights, tensors: dict[str, Tensor], weight_dtype: str, config: UniPicConfig
) -> tuple[torch.dtype, torch.dtype | None]:
    """What the network stores, and what it computes in if that is another type."""

    device = management.get_torch_device()

    def cast(dtype: torch.dtype | None) -> torch.dtype | None:
        return management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)

    if config.quant_config:  # such layers know their own types
        return stored_dtype(weights), cast(None)
    wanted, stored = WEIGHT_DTYPES[weight_dtype], storage_dtype(tensors)
    dtype = stored if wanted is None or (wanted in FP8 and stored in FP8) else wanted
    compute = cast(dtype)
    if wanted is None and compute is not None and management.is_device_cpu(device):
        small = sum(t.numel() for t in tensors.values()) * compute.itemsize <= _SMALL
        return (compute, None) if small else (dtype, compute)
    return dtype, compute


def storage_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """What most values are held as; float16, which overflows in this network, becomes bfloat16."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    most = max(sizes, key=lambda d: sizes[d])
    return {torch.float16: torch.bfloat16, torch.float64: torch.float32}.get(most, most)


def check_finite(source: Path, tensors: dict[str, Tensor]) -> None:
    """CheckpointError if a tensor of at most `_CHECKED` values holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() <= _CHECKED and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(
                f"{source} holds values that are no numbers (NaN or infinity), first in {name}; the file is damaged or "
                "its training failed: use another copy"
            )


def _pipeline_folder(source: Path) -> Path:
    """Where vae/ and scheduler/ of the weights would lie; a single file has no such folder of its own."""
    return source.parent if source.is_dir() and source.name in TRANSFORMER_FOLDERS else source
