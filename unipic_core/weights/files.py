"""Weights on disk as a mapping from names to tensors: one safetensors file, shards with an index, or a pickle.

Nothing is loaded until it is asked for. Layers stored as scaled fp8 (ComfyUI's `X.weight` + `X.weight_scale` +
`X.comfy_quant`, or the older `X.scale_weight`) show as one weight, which is multiplied out when read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats.safetensors_file import read_table
from .formats.tensor_spec import Table, TensorSpec

PathLike = str | os.PathLike[str]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "_orig_mod.")
"""What other programs put before the network's own parameter names."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
_ENDINGS = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
_SCALES = (".weight_scale", ".scale_weight")
_QUANT_PARTS = (*_SCALES, ".input_scale", ".scale_input", ".comfy_quant")


class Weights:
    """A read-only table of stored tensors. `open_weights` makes one."""

    def __init__(self, path: Path, table: Table, metadata: Mapping[str, str], scales: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._table = table
        self._scales = dict(scales)
        self._maps: dict[Path, mmap.mmap | None] = {}

    def keys(self) -> KeysView[str]:
        return self._table.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def __len__(self) -> int:
        return len(self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spec(name).shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self._table.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The type on disk; a scaled fp8 weight says float8_e4m3fn, though `get` gives float32."""
        return self._spec(name).dtype

    def count(self, name: str) -> int:
        """Number of elements."""
        return prod(self.shape(name))

    @property
    def files(self) -> set[Path]:
        """Every file that a tensor lies in."""
        return {spec.file for spec in (*self._table.values(), *self._scales.values())}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(spec.nbytes for spec in (*self._table.values(), *self._scales.values()))

    def get(self, name: str, *, mapped: bool = False) -> Tensor:
        """The tensor, on the CPU, in memory of its own; scaled fp8 comes out as float32.

        mapped: a view of the memory-mapped file instead where that is possible; its pages are read when touched, and
        what is written to it never reaches the file.
        """
        spec = self._spec(name)
        area = self._map(spec.file) if mapped and name not in self._scales else None
        tensor = spec.read() if area is None else spec.mapped(area)
        if name in self._scales:
            scale = self._scales[name].read().float()
            tensor = tensor.float().mul_(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1))
        return tensor

    def bare(self) -> Weights:
        """The same under the network's own names; other parts of an all-in-one file are dropped."""
        names = bare_names(self.keys())
        table = {bare: self._table[stored] for bare, stored in names.items()}
        scales = {bare: self._scales[stored] for bare, stored in names.items() if stored in self._scales}
        return Weights(self.path, table, self.metadata, scales)

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._table:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self._table[name]

    def _map(self, file: Path) -> mmap.mmap | None:
        """One private map per file; None where the system has no address space for it, then tensors are read."""
        if file not in self._maps:
            try:
                with open(file, "rb") as f:
                    self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                self._maps[file] = None
        return self._maps[file]


def strip_prefix(name: str) -> str:
    """`model.diffusion_model.txt_norm.weight` -> `txt_norm.weight`; prefixes may be nested."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Network's own name -> stored name. If the network's names have one prefix, names without it are dropped.

    Raises CheckpointError if two names become the same.
    """
    names = list(names)
    prefixes = {n[: len(n) - len(strip_prefix(n))] for n in names if strip_prefix(n).startswith("transformer_blocks.")}
    if len(prefixes) == 1:
        (prefix,) = prefixes
        return {n[len(prefix) :]: n for n in names if n.startswith(prefix)}
    table = {strip_prefix(n): n for n in names}
    if len(table) != len(names):
        raise CheckpointError(f"{len(names) - len(table)} tensors are there under two prefixes; keep one of the copies")
    return table


def open_weights(path: PathLike) -> Weights:
    """Weights of a file, of an index json, or of a folder that holds one of them.

    Raises CheckpointError for all that is not readable weights: wrong or empty folder, truncated or hostile file, an
    index whose paths leave its folder, a quantisation that is not fp8.
    """
    path = Path(path)
    file = weight_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        table, metadata = _read_shards(file)
    else:
        table, metadata = read_table(file)
    if not table:
        raise CheckpointError(f"{file} holds no tensors")
    scales = _take_scales(file, table, metadata)
    return Weights(path, table, metadata, scales)


def find_weight_file(folder: Path) -> Path | None:
    """The weight file or index of a folder, safetensors before pickles; None if there is none.

    CheckpointError if there are two or more and none has a usual name.
    """
    if not folder.is_dir():
        return None
    for ending in _ENDINGS:
        for stem in _STEMS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    for ending in _ENDINGS:
        found = sorted(p for p in folder.iterdir() if p.name.endswith(ending) and p.is_file())
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:3])
            raise CheckpointError(
                f"{folder} holds {len(found)} weight files ({names}, ...) and no index; name the one you mean"
            )
        if found:
            return found[0]
    return None


def weight_file(folder: Path) -> Path:
    """`find_weight_file`, or CheckpointError saying what the folder holds instead."""
    if file := find_weight_file(folder):
        return file
    names = sorted(p.name for p in folder.iterdir())
    held = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
    raise CheckpointError(f"expected a .safetensors or .bin file in {folder}, found {held}")


def _read_shards(index: Path) -> tuple[Table, dict[str, str]]:
    """All shards that an index json names; only files inside its folder are opened."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        good = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(
            f"{index} is not an index of shards (a table weight_map of names and files); fetch it again"
        )
    table: Table = {}
    metadata: dict[str, str] = {}
    shards = {file: _inside(index, file) for file in sorted(set(weight_map.values()))}
    for file, path in shards.items():
        if not path.is_file():
            raise CheckpointError(f"{index.name} names {file}, which is not in {index.parent}; download is incomplete")
        stored, more = read_table(path)
        table.update(stored)
        metadata.update(more)
    if missing := [name for name in weight_map if name not in table]:
        raise CheckpointError(f"{index.name} promises {len(missing)} tensors that no shard holds, first {missing[0]!r}")
    return table, metadata


def trusted_folders(folder: Path) -> list[Path]:
    """Where links of a model folder may lead: into itself, and to the blobs of the Hugging Face cache it lies in."""
    folder = folder.resolve()
    return [folder, *(p.parent / "blobs" for p in folder.parents if p.name == "snapshots")]


def _inside(index: Path, name: str) -> Path:
    """The shard's path, or CheckpointError if it is not in the index's folder.

    A link may lead to the blobs of the Hugging Face cache that the folder itself is in: downloads look like that.
    """
    path = index.parent / name
    parts = (PurePosixPath(name), PureWindowsPath(name))
    leaves = not name or any(p.is_absolute() or p.drive or ".." in p.parts for p in parts)
    if not leaves:
        leaves = not any(path.resolve().is_relative_to(root) for root in trusted_folders(index.parent))
    if leaves:
        raise CheckpointError(
            f"{index} names {name!r}, which is outside its folder; refused, the files are not trustworthy"
        )
    return path


def _take_scales(file: Path, table: Table, metadata: Mapping[str, str]) -> dict[str, TensorSpec]:
    """Removes what quantisation added from the table and returns weight name -> its scale."""
    declared = _declared_layers(file, metadata)
    layers = {n[: -len(part)] for n in table for part in _QUANT_PARTS if n.endswith(part)}
    scales = {}
    for layer in layers:
        weight = table.get(layer + ".weight")
        if weight is None:
            continue
        parts = {part: table.pop(layer + part) for part in _QUANT_PARTS if layer + part in table}
        quant = parts[".comfy_quant"].read() if ".comfy_quant" in parts else None
        _check_format(file, layer, declared.get(layer) if quant is None else _json(bytes(quant.tolist())), weight)
        scale = next((parts[s] for s in _SCALES if s in parts), None)
        if scale is not None and scale.shape not in ((), (1,), weight.shape[:1], (*weight.shape[:1], 1)):
            raise CheckpointError(
                f"{file}: the scale of {layer} has shape {scale.shape}; expected one number or one per row"
            )
        if scale is not None:
            scales[layer + ".weight"] = scale
    for name in [n for n in table if n.split(".")[-1] == "scaled_fp8"]:
        del table[name]
    return scales


def _declared_layers(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "_quantization_metadata" not in metadata:
        return {}
    content = _json(metadata["_quantization_metadata"].encode())
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise CheckpointError(f"the quantisation metadata of {file} is not readable; the file is damaged")
    return content["layers"]


def _check_format(file: Path, layer: str, quant: object, weight: TensorSpec) -> None:
    dtype = str(weight.dtype).removeprefix("torch.")
    stored = str(quant.get("format", dtype)) if isinstance(quant, dict) else dtype
    if stored not in ("float8_e4m3fn", "float8_e5m2") or weight.dtype not in FP8:
        raise CheckpointError(f"{file} quantises {layer} as {stored}; only bf16, fp32, fp16 and scaled fp8 can be read")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
