"""State dict of a network for ComfyUI's layers: views of mapped files, quantised layers as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS
from torch import Tensor

from ....unipic_core.errors import CheckpointError
from ....unipic_core.weights.files import Weights
from ....unipic_core.weights.formats.quantised import DESCRIPTION

_CHECKED = 1 << 20
"""Tensors up to this many values are checked for NaN on loading: all norms and biases, where a failed training or
conversion shows; checking every weight of the released network would read 41 GB."""

_NEW_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}


def state_dict(weights: Weights, keep_quantised: bool) -> dict[str, Tensor]:
    """All tensors, as views of the mapped files. weights: with bare names.

    keep_quantised: leave quantised layers as they are, in the format of ComfyUI's quantised layers; otherwise convert
    them to bfloat16. CheckpointError for a quantisation that this ComfyUI does not have.
    """
    check_known(weights)
    tensors: dict[str, Tensor] = {}
    for name in weights:
        if name not in weights.quantised:
            tensors[name] = weights.get(name, mapped=True)
        elif keep_quantised:
            tensors |= quantised_layer(weights, name)
        else:
            tensors[name] = dequantised(weights, name)
    return tensors


def check_known(weights: Weights) -> None:
    """CheckpointError for a quantisation that this ComfyUI does not have."""
    for name, quantisation in weights.quantised.items():
        if quantisation.format not in QUANT_ALGOS:
            raise CheckpointError(
                f"{weights.path} quantises {name.removesuffix('.weight')} as {quantisation.format}, which this ComfyUI "
                "does not know; update ComfyUI, or use a version in bf16 or fp8"
            )


def quantised_layer(weights: Weights, name: str) -> dict[str, Tensor]:
    """A layer's tensors in ComfyUI's present format.

    Inputs are quantised too only where the file allows it, which older ones do not; never with one scale for each row,
    since ComfyUI's fp8 product takes one scale for the whole matrix.
    """
    layer, quantisation = name.removesuffix(".weight"), weights.quantised[name]
    settings, tensors = dict(quantisation.settings), {name: weights.stored(name)}
    for part in quantisation.parts:
        tensors[f"{layer}.{_NEW_NAMES.get(part, part)}"] = weights.stored(name, part)
    if quantisation.format.startswith("float8"):
        scale = tensors[f"{layer}.weight_scale"].float()
        one = scale.numel() == 1
        tensors[f"{layer}.weight_scale"] = scale.reshape(()) if one else scale.reshape(-1, 1)
        settings["full_precision_matrix_mult"] = bool(settings.get("full_precision_matrix_mult")) or not one
    tensors[f"{layer}.{DESCRIPTION}"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return tensors


def dequantised(weights: Weights, name: str) -> Tensor:
    """A quantised weight in bfloat16."""
    if weights.quantised[name].readable:
        return weights.get(name).to(torch.bfloat16)
    weight: Any = loaded_layer(weights, name).weight  # ComfyUI's QuantizedTensor
    return weight.dequantize().to(torch.bfloat16)


def loaded_layer(weights: Weights, name: str) -> torch.nn.Module:
    """One quantised layer, without its bias, as ComfyUI's layer."""
    rows, columns = weights.shape(name)
    module = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32).Linear(columns, rows, bias=False)
    layer = name.removesuffix("weight")
    module.load_state_dict({n.removeprefix(layer): t for n, t in quantised_layer(weights, name).items()})
    return module


def storage_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Type of most values; float16, which overflows in this network, becomes bfloat16."""
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
                f"{source} holds NaN or infinity, first in {name}; it is damaged or its training failed: download it "
                "again, or use an earlier checkpoint"
            )
