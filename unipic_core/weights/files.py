"""Stored weights as a lazy mapping from names to tensors: one safetensors file, shards with an index, or a pickle.

Opening reads headers only; a tensor is read when `Weights.get` asks for it. A quantised layer (ComfyUI's `X.weight` +
`X.weight_scale` + `X.comfy_quant`, or the older `X.scale_weight`) appears as one weight and is dequantised when read.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
from collections.abc import Iterable, Iterator, KeysView, Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats.json_file import MAX_INDEX, read_json
from .formats.quantised import Quantisation, take_quantised
from .formats.safetensors_file import MAX_TENSORS, read_table
from .formats.tensor_spec import Table, TensorSpec

PathLike = str | os.PathLike[str]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "_orig_mod.")
"""Prefixes that other programs put before the network's parameter names."""

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Modules that FSDP, activation checkpointing and torch.compile put around others, anywhere in a name."""

MAX_SHARDS = 1000
"""Most files of one set of shards."""

_NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
"""Linux's MAP_NORESERVE, which Python 3.11 does not name."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
_ENDINGS = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")


class Weights:
    """Read-only table of stored tensors, opened by `open_weights`. Nothing is loaded before `get`."""

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
        """Shape of a tensor; for a quantised weight that of the dequantised one, with its padding."""
        stored = self._spec(name).shape
        return self.quantised[name].shape(stored) if name in self.quantised else stored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self._table}

    def shapes_for(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, quantised weights without padding where that gives the expected shape."""
        shapes = self.shapes()
        for name, quantisation in self.quantised.items():
            if name in expected and quantisation.holds(self._spec(name).shape, tuple(expected[name])):
                shapes[name] = tuple(expected[name])
        return shapes

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype on disk: float8_e4m3fn for a scaled fp8 weight, which `get` returns as float32."""
        return self._spec(name).dtype

    def count(self, name: str) -> int:
        """Number of elements."""
        return prod(self.shape(name))

    @property
    def files(self) -> set[Path]:
        """All files that hold a tensor of the table."""
        return {spec.file for spec in self._specs()}

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all tensors, scales of quantisation included."""
        return sum(spec.nbytes for spec in self._specs())

    def get(self, name: str, *, mapped: bool = False) -> Tensor:
        """Read one tensor to newly allocated CPU memory; a quantised one is dequantised to float32.

        mapped: return a view of the memory-mapped file where possible; its pages are read when touched, and writes to
        the view never reach the file. Raises CheckpointError for an unknown name, an unreadable file, and a
        quantisation that only ComfyUI computes.
        """
        quantisation = self.quantised.get(name)
        if quantisation is None:
            return self._read(self._spec(name), mapped)
        self._require_readable(name, quantisation)
        return quantisation.dequantise(self._spec(name).read())

    def stored(self, name: str, part: str = "") -> Tensor:
        """View a weight as it is stored, or another part of its quantised layer, in the memory-mapped file."""
        return self._read(self.quantised[name].parts[part] if part else self._spec(name), True)

    def require_readable(self) -> None:
        """Raise CheckpointError for a quantised weight that `get` cannot dequantise."""
        for name, quantisation in self.quantised.items():
            self._require_readable(name, quantisation)

    def bare(self) -> Weights:
        """Return the table under the network's parameter names, without the other parts of an all-in-one file."""
        stored_names = bare_names(self.keys())
        table = {bare: self._table[stored] for bare, stored in stored_names.items()}
        quantised = {bare: self.quantised[stored] for bare, stored in stored_names.items() if stored in self.quantised}
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
            raise CheckpointError(f"{self.path} holds no tensor {name!r}; the file is of another model or incomplete")
        return self._table[name]

    def _map(self, file: Path) -> mmap.mmap | None:
        """Map a file once, copy-on-write; None if the system has no address space for it, then tensors are read."""
        if file not in self._maps:
            try:
                self._maps[file] = _copy_on_write(file)
            except (OSError, ValueError):
                self._maps[file] = None
        return self._maps[file]


def _copy_on_write(file: Path) -> mmap.mmap:
    """Map a file so that writes stay in memory. Raises OSError where the system refuses.

    Without the flag Linux reserves memory for a copy-on-write map as if all of it were written, and refuses a map
    larger than the machine's memory.
    """
    with open(file, "rb") as f:
        if _NO_RESERVE:
            flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(f.fileno(), 0, flags=flags, prot=access)
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def strip_prefix(name: str) -> str:
    """Remove all prefixes: `model.diffusion_model.txt_norm.weight` -> `txt_norm.weight`."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def without_wrappers(name: str) -> str:
    """Remove wrappers: `transformer_blocks.0._checkpoint_wrapped_module.attn.x` -> `transformer_blocks.0.attn.x`."""
    if "_wrapped_module" not in name and "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map parameter names without prefix to stored names. If the transformer blocks share one prefix, names without
    that prefix (a VAE, a text encoder) are left out.

    Raises CheckpointError if two stored names differ in their prefix only.
    """
    names = list(names)
    plain = {without_wrappers(n): n for n in names}
    prefixes = {n[: len(n) - len(strip_prefix(n))] for n in plain if strip_prefix(n).startswith("transformer_blocks.")}
    if len(prefixes) == 1 and len(plain) == len(names):
        (prefix,) = prefixes
        return {n[len(prefix) :]: stored for n, stored in plain.items() if n.startswith(prefix)}
    table = {strip_prefix(n): stored for n, stored in plain.items()}
    if len(table) != len(names):
        raise CheckpointError(
            f"{len(names) - len(table)} tensors are stored twice, under two prefixes; remove one of the copies"
        )
    return table


def open_weights(path: PathLike) -> Weights:
    """Open a weight file, an index json, or a folder that holds one of them; reads headers only.

    Raises CheckpointError for a folder without weights, a truncated or hostile file, an index whose paths leave its
    folder, and a quantisation that does not fit its weights.
    """
    path = Path(path)
    file = weight_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        table, metadata = _read_shards(file)
    else:
        table, metadata = read_table(file)
    if not table:
        raise CheckpointError(f"{file} holds no tensors; fetch it again")
    return Weights(path, table, metadata, take_quantised(file, table, metadata))


def find_weight_file(folder: Path) -> Path | None:
    """Return the weight file or index of a folder, safetensors before pickles; None if there is none.

    Raises CheckpointError if there are two or more and none has a usual name.
    """
    if not folder.is_dir():
        return None
    for ending in _ENDINGS:
        for stem in _STEMS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    for ending in _ENDINGS:
        files = sorted(p for p in folder.iterdir() if p.name.endswith(ending) and p.is_file())
        if len(files) > 1:
            names = ", ".join(p.name for p in files[:3])
            raise CheckpointError(
                f"{folder} holds {len(files)} weight files ({names}, ...) and no index; name the one you mean"
            )
        if files:
            return files[0]
    return None


def weight_file(folder: Path) -> Path:
    """Return `find_weight_file`'s answer; raise CheckpointError with the folder's content if there is none."""
    if file := find_weight_file(folder):
        return file
    raise CheckpointError(f"expected a .safetensors or .bin file in {folder}, found {folder_content(folder, 6)}")


def folder_content(folder: Path, limit: int) -> str:
    """List the first `limit` names in a folder, for a message; "nothing" for an empty one."""
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "nothing"


def _read_shards(index: Path) -> tuple[Table, dict[str, str]]:
    """Read the headers of all shards that an index json names; opens only files inside its folder."""
    content = read_json(index, MAX_INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{index} is not an index of shards (a table weight_map of names and files); fetch it again"
        )
    table: Table = {}
    metadata: dict[str, str] = {}
    if len(weight_map) > MAX_TENSORS or len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(
            f"{index} names {len(weight_map):,} tensors in {len(set(weight_map.values())):,} files, expected at most "
            f"{MAX_TENSORS:,} in {MAX_SHARDS:,}; the file is not trustworthy and was not read"
        )
    shards = {file: _inside(index, file) for file in sorted(set(weight_map.values()))}
    for file, path in shards.items():
        if path is None:
            raise CheckpointError(f"{index.name} names {file}, which is not in {index.parent}; download is incomplete")
        shard_table, shard_metadata = read_table(path)
        table.update(shard_table)
        metadata.update(shard_metadata)
    if missing := [name for name in weight_map if name not in table]:
        raise CheckpointError(
            f"{index.name} lists {len(missing)} tensors that no shard holds, first {missing[0]!r}; download it again"
        )
    return table, metadata


def trusted_folders(folder: Path) -> list[Path]:
    """Folders into which links of a model folder may lead: itself, and the blobs of the Hugging Face cache it is in."""
    folder = folder.resolve()
    return [folder, *(p.parent / "blobs" for p in folder.parents if p.name == "snapshots")]


def _inside(index: Path, name: str) -> Path | None:
    """Return the path of a shard, None if there is no file; raise CheckpointError if it is outside the index's folder.

    A link may lead to the blobs of the Hugging Face cache that holds the folder: its downloads are such links.
    """
    path = index.parent / name
    parts = (PurePosixPath(name), PureWindowsPath(name))
    outside = not name or any(p.is_absolute() or p.drive or ".." in p.parts for p in parts)
    try:
        if not outside:
            outside = not any(path.resolve().is_relative_to(root) for root in trusted_folders(index.parent))
        present = not outside and path.is_file()
    except (OSError, ValueError) as error:  # too long, a zero byte, half a character
        raise CheckpointError(f"{index} names {name[:60]!r}, which no file can be called; fetch it again") from error
    if outside:
        raise CheckpointError(
            f"{index} names {name!r}, which is outside its folder; refused, the files are not trustworthy"
        )
    return path if present else None
