"""Weights on disk as a mapping from names to tensors: one safetensors file, shards with an index, or a pickle.

Nothing is loaded until it is asked for. A quantised layer (ComfyUI's `X.weight` + `X.weight_scale` + `X.comfy_quant`,
or the older `X.scale_weight`) shows as one weight, which is multiplied out when read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats.quantised import Quantisation, take_quantised
from .formats.safetensors_file import read_table
from .formats.tensor_spec import Table, TensorSpec

PathLike = str | os.PathLike[str]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "_orig_mod.")
"""What other programs put before the network's own parameter names."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
_ENDINGS = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")


class Weights:
    """A read-only table of stored tensors. `open_weights` makes one."""

    def __init__(
        self, path: Path, table: Table, metadata: Mapping[str, str], quantised: Mapping[str, Quantisation]
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.quantised = dict(quantised)
        self._table = table
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
        """Of a quantised weight the shape that it stands for, with its padding."""
        stored = self._spec(name).shape
        return self.quantised[name].shape(stored) if name in self.quantised else stored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self._table}

    def shapes_for(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """`shapes`, those of quantised weights without padding where they can stand for the expected ones."""
        shapes = self.shapes()
        for name, quantisation in self.quantised.items():
            if name in expected and quantisation.holds(self._spec(name).shape, tuple(expected[name])):
                shapes[name] = tuple(expected[name])
        return shapes

    def dtype(self, name: str) -> torch.dtype:
        """The type on disk; a scaled fp8 weight says float8_e4m3fn, though `get` gives float32."""
        return self._spec(name).dtype

    def count(self, name: str) -> int:
        """Number of elements."""
        return prod(self.shape(name))

    @property
    def files(self) -> set[Path]:
        """Every file that a tensor lies in."""
        return {spec.file for spec in self._specs()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(spec.nbytes for spec in self._specs())

    def get(self, name: str, *, mapped: bool = False) -> Tensor:
        """The tensor, on the CPU, in memory of its own; a quantised one comes out as float32.

        mapped: a view of the memory-mapped file instead where that is possible; its pages are read when touched, and
        what is written to it never reaches the file. CheckpointError for a quantisation that only ComfyUI computes.
        """
        quantisation = self.quantised.get(name)
        if quantisation is None:
            return self._read(self._spec(name), mapped)
        self._require_readable(name, quantisation)
        return quantisation.dequantise(self._spec(name).read())

    def stored(self, name: str, part: str = "") -> Tensor:
        """A view of the memory-mapped file: a weight as it is stored, or another part of its quantised layer."""
        return self._read(self.quantised[name].parts[part] if part else self._spec(name), True)

    def require_readable(self) -> None:
        """CheckpointError that names a quantised weight which `get` cannot multiply out."""
        for name, quantisation in self.quantised.items():
            self._require_readable(name, quantisation)

    def bare(self) -> Weights:
        """The same under the network's own names; other parts of an all-in-one file are dropped."""
        names = bare_names(self.keys())
        table = {bare: self._table[stored] for bare, stored in names.items()}
        quantised = {bare: self.quantised[stored] for bare, stored in names.items() if stored in self.quantised}
        return Weights(self.path, table, self.metadata, quantised)

    def _specs(self) -> Iterator[TensorSpec]:
        yield from self._table.values()
        for quantisation in self.quantised.values():
            yield from quantisation.parts.values()

    def _require_readable(self, name: str, quantisation: Quantisation) -> None:
        if not quantisation.readable:
            raise CheckpointError(
                f"{self.path} quantises {name.removesuffix('.weight')} as {quantisation.format}, which only Load "
                "UniPic in ComfyUI reads; use a version in bf16, fp32, fp16, scaled fp8 or plain int8"
            )

    def _read(self, spec: TensorSpec, mapped: bool) -> Tensor:
        area = self._map(spec.file) if mapped else None
        return spec.read() if area is None else spec.mapped(area)

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
    index whose paths leave its folder, a quantisation that does not fit its weights.
    """
    path = Path(path)
    file = weight_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        table, metadata = _read_shards(file)
    else:
        table, metadata = read_table(file)
    if not table:
        raise CheckpointError(f"{file} holds no tensors")
    return Weights(path, table, metadata, take_quantised(file, table, metadata))


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
