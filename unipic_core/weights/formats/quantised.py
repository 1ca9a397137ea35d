"""Quantised layers in ComfyUI's layout: `X.weight` in few bits, its scales, and a description `X.comfy_quant`.

The formats are those of ComfyUI's `QUANT_ALGOS` (see its QUANTIZATION.md). fp8 with one scale, or one per row, and int8
are dequantised here; rotated and block-wise formats, and those of newer versions, are computed by ComfyUI only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .tensor_spec import Table, TensorSpec

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

DESCRIPTION = "comfy_quant"
"""Last part of the name of the tensor that describes a quantised layer, JSON as bytes."""

SCALES = ("weight_scale", "scale_weight")
"""Last part of the name of a layer's scale, in current and older files."""

_OLDER_PARTS = (*SCALES, "input_scale", "scale_input")
_LONGEST = 1 << 16
_PACKED = {"nvfp4": 2, "convrot_w4a4": 2, "asym_w4a8_int8": 2}
"""Format -> values in each stored byte, if more than one."""

_STORED = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "nvfp4": torch.uint8,
    "mxfp8": torch.float8_e4m3fn,
    "int8_tensorwise": torch.int8,
    "convrot_w4a4": torch.int8,
    "asym_w4a8_int8": torch.int8,
}
_NEEDED = {
    "nvfp4": ("weight_scale", "weight_scale_2"),
    "mxfp8": ("weight_scale",),
    "int8_tensorwise": ("weight_scale",),
    "convrot_w4a4": ("weight_scale",),
    "asym_w4a8_int8": ("weight_s_rel", "weight_s_channel"),
}
_PADDING = (1, 16, 32, 128)
"""Rows and columns are padded to a multiple of one of these."""


@dataclass(frozen=True)
class Quantisation:
    """Quantisation of one weight. format: ComfyUI's name. settings: content of the description. parts: the layer's
    tensors besides weight and bias, by the last part of their names."""

    format: str
    settings: Mapping[str, Any]
    parts: Mapping[str, TensorSpec]

    @property
    def scale(self) -> TensorSpec | None:
        return next((self.parts[name] for name in SCALES if name in self.parts), None)

    @property
    def readable(self) -> bool:
        """True if `dequantise` supports the format."""
        rotated = self.settings.get("convrot") or _table(self.settings.get("params")).get("convrot")
        return self.format.startswith("float8") or (self.format == "int8_tensorwise" and not rotated)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the dequantised weight, padding included. stored: shape of the stored weight."""
        return (*stored[:-1], stored[-1] * _PACKED.get(self.format, 1)) if stored else stored

    def holds(self, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """True if a stored weight of shape `stored` can represent one of `shape`; for unknown formats, any 2-D one."""
        if self.readable or len(shape) != 2 or len(stored) != 2:
            return stored == shape
        pairs = zip(self.shape(stored), shape, strict=True)
        return self.format not in _STORED or all(any(n == -(-m // pad) * pad for pad in _PADDING) for n, m in pairs)

    def dequantise(self, stored: Tensor) -> Tensor:
        """Dequantise a stored weight of a `readable` format to float32."""
        value = stored.float()
        if self.scale is None:
            return value
        scale = self.scale.read().float()
        return value.mul_(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1))


def take_quantised(file: Path, table: Table, metadata: Mapping[str, str]) -> dict[str, Quantisation]:
    """Remove the tensors that quantisation added to a table; return weight name -> its quantisation.

    Raises CheckpointError for descriptions that cannot be read or do not fit their weights.
    """
    declared = _declared_layers(file, metadata)
    ends: dict[str, set[str]] = {}
    for name in table:
        layer, _, end = name.rpartition(".")
        ends.setdefault(layer, set()).add(end)
    quantised = {}
    for layer, names in ends.items():
        described = DESCRIPTION in names or layer in declared
        others = names - {"weight", "bias"} if described else names & set(_OLDER_PARTS)
        if "weight" not in names or not (described or others):
            continue
        weight = table[f"{layer}.weight"]
        parts = {end: table.pop(f"{layer}.{end}") for end in sorted(others)}
        settings = _settings(file, layer, parts.pop(DESCRIPTION, None), declared.get(layer), weight)
        quantisation = Quantisation(settings["format"], settings, parts)
        _check(file, layer, quantisation, weight)
        if quantisation.scale is not None or not quantisation.format.startswith("float8"):
            quantised[f"{layer}.weight"] = quantisation
    for name in [n for n in table if n.rpartition(".")[2] == "scaled_fp8"]:
        del table[name]
    return quantised


def _settings(
    file: Path, layer: str, description: TensorSpec | None, declared: object, weight: TensorSpec
) -> dict[str, Any]:
    """Read a layer's description from its tensor or the metadata; for older files return the equivalent one."""
    if description is not None:
        if description.nbytes > _LONGEST or description.dtype != torch.uint8:
            raise CheckpointError(f"{file}: the description of {layer} is not a short text; fetch the file again")
        declared = _json(bytes(description.read().flatten().tolist()))
    elif declared is None:
        declared = {"format": _dtype_name(weight), "full_precision_matrix_mult": True}
    settings = dict(_table(declared))
    if not isinstance(settings.get("format"), str):
        raise CheckpointError(
            f"{file}: the quantisation of {layer} cannot be read, expected a JSON object with a format; fetch the file "
            "again"
        )
    return settings


def _check(file: Path, layer: str, quantisation: Quantisation, weight: TensorSpec) -> None:
    name, dtype = quantisation.format, weight.dtype
    if (name in _STORED and dtype != _STORED[name]) or (name.startswith("float8") and dtype not in FP8):
        raise CheckpointError(
            f"{file} describes {layer} as {name} and stores it as {_dtype_name(weight)}; fetch the file again"
        )
    if missing := [part for part in _NEEDED.get(name, ()) if part not in quantisation.parts]:
        raise CheckpointError(f"{file} quantises {layer} as {name} without its {missing[0]}; fetch the file again")
    scale = quantisation.scale
    shapes = ((), (1,), weight.shape[:1], (*weight.shape[:1], 1))
    if quantisation.readable and scale is not None and scale.shape not in shapes:
        raise CheckpointError(
            f"{file}: expected one number or one per row as the scale of {layer}, got shape {scale.shape}; convert the "
            "weights again"
        )


def _declared_layers(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    if "_quantization_metadata" not in metadata:
        return {}
    content = _json(metadata["_quantization_metadata"].encode())
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise CheckpointError(f"the quantisation metadata of {file} is not readable; fetch the file again")
    return content["layers"]


def _dtype_name(weight: TensorSpec) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
