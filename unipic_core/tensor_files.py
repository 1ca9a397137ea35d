"""Tensor files as tables: where each tensor lies, read without loading any of them.

A safetensors header is parsed and checked here, byte by byte, because it may come from anyone. A pickled `.bin` is
walked by `torch.load(weights_only=True)`, which never runs code from the file; its tensors are then read from their
places in the zip.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest safetensors header accepted, in bytes; the format's own limit."""

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: its type and shape, and where its bytes are.

    offset: first byte of the tensor's storage in `file`. first: index of its first element in that storage; stride: in
    elements, None = contiguous. loaded: the tensor itself, for the old pickles that cannot be read piecewise.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    first: int = 0
    stride: tuple[int, ...] | None = None
    loaded: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements from the first to the last that the tensor touches."""
        if not prod(self.shape):
            return 0
        if self.stride is None:
            return prod(self.shape)
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """The tensor in memory of its own. CheckpointError if the file has become shorter."""
        if self.loaded is not None:
            return self.loaded.clone()
        size = self.extent * self.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8)
        try:
            with open(self.file, "rb") as f:
                f.seek(self.offset + self.first * self.dtype.itemsize)
                got = f.readinto(buffer.numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        if got != size:
            raise CheckpointError(
                f"{self.file} ends {size - got} bytes too early: it changed or is damaged; fetch it again"
            )
        return self._shaped(buffer.view(self.dtype))

    def mapped(self, area: mmap.mmap) -> Tensor:
        """The tensor as a view of its mapped file: no memory until touched; writing to it does not reach the file."""
        start = self.offset + self.first * self.dtype.itemsize
        if self.loaded is not None or not self.extent or start % self.dtype.itemsize:
            return self.read()
        return self._shaped(torch.frombuffer(area, dtype=self.dtype, count=self.extent, offset=start))

    def _shaped(self, flat: Tensor) -> Tensor:
        if self.stride is None or not self.extent:
            return flat.reshape(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()


Table = dict[str, TensorSpec]


def read_table(path: Path) -> tuple[Table, dict[str, str]]:
    """Tensors and metadata of one `.safetensors`, `.sft`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or CheckpointError."""
    _check_file(path)
    if path.suffix in (".safetensors", ".sft"):
        return read_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return read_pickle(path), {}
    raise CheckpointError(f"{path} is not a weight file: expected .safetensors or a pickled .bin, .pt, .pth or .ckpt")


def _check_file(path: Path) -> None:
    """Everything that ends in the name of a weight file and is none, with what to do about it."""
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself")


def read_safetensors(path: Path) -> tuple[Table, dict[str, str]]:
    """Table and metadata of a safetensors file; every number in the header is checked against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a whole safetensors file: its header should be {length} bytes long, "
                f"the file has {size}; fetch it again"
            )
        text = f.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON; fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"the metadata of {path} is not a table of strings; the file is damaged")
    table, ends = {}, {}
    for name, entry in header.items():
        table[name], ends[name] = _entry(path, name, entry, 8 + length, size)
    _check_layout(path, table, ends, 8 + length, size)
    return table, metadata


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> tuple[TensorSpec, int]:
    """One tensor of a header, and the byte behind it."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"the header of {path} describes tensor {name!r} wrongly; the file is damaged, fetch it again"
        )
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path} stores {name!r} as {dtype!r}, which is not supported; convert it to BF16 first")
    spec = TensorSpec(_DTYPES[dtype], tuple(shape), path, data + begin)
    if end - begin != spec.nbytes or data + end > size:
        raise CheckpointError(
            f"{path} is truncated or damaged: tensor {name!r} needs {spec.nbytes} bytes and has "
            f"{max(min(data + end, size) - data - begin, 0)}; fetch it again"
        )
    return spec, data + end


def _check_layout(path: Path, table: Table, ends: dict[str, int], data: int, size: int) -> None:
    """Tensors follow each other without holes or overlaps, up to the end of the file."""
    at = data
    for name in sorted(table, key=lambda n: (table[n].offset, ends[n])):
        if table[name].offset != at:
            raise CheckpointError(f"{path} is damaged: tensor {name!r} does not start where the one before it ends")
        at = ends[name]
    if at != size:
        raise CheckpointError(
            f"{path} is damaged: {size - at} bytes behind its last tensor belong to none; fetch it again"
        )


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """(first bytes of the file, where each tensor starts in it, size of the whole file).

    The widest types come first, so that every tensor is aligned for its type.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, starts = 0, {}
    for name in sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n)):
        dtype, shape = tensors[name]
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        starts[name], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data + start for name, start in starts.items()}, data + at


def read_pickle(path: Path) -> Table:
    """Table of a pickled state dict; nested ones ("state_dict", or one key around all) are unwrapped.

    Only tensors and plain containers are unpickled: a file that names any other function is refused before anything of
    it is called (`weights_only=True`).
    """
    try:
        if zipfile.is_zipfile(path):
            records = _zip_records(path)
            table = _places(path, _tensors(_torch_load(path, map_location="meta")), records)
            if table is not None:
                return table
            tensors = _tensors(_torch_load(path, map_location="cpu", mmap=True))
        elif tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
            # the old format could run code in spite of weights_only (CVE-2025-32434)
            raise CheckpointError(
                f"{path} is in PyTorch's old format, safe to open from PyTorch 2.6 on; update PyTorch"
            )
        else:
            tensors = _tensors(_torch_load(path, map_location="cpu"))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable PyTorch file ({_one_line(error)}); fetch it again") from error
    except (zipfile.BadZipFile, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_one_line(error)}); fetch it again") from error
    return {name: TensorSpec(t.dtype, tuple(t.shape), path, loaded=t) for name, t in tensors.items()}


def _torch_load(path: Path, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, **how)


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """The state dict inside what was pickled."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        if any(isinstance(v, Tensor) for v in loaded.values()):
            return {str(k): v.detach() for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = [v for k, v in loaded.items() if isinstance(v, Mapping) and (k == "state_dict" or len(loaded) == 1)]
        loaded = inner[0] if inner else None
    raise ValueError("it holds no table of tensors")


def _zip_records(path: Path) -> dict[int, int]:
    """Start -> size of every tensor storage that lies uncompressed in the zip.

    Empty if they do not lie in the order of their numbers: torch computes places from that order, and would be wrong.
    """
    records, numbers = {}, []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as f:
        for info in sorted(archive.infolist(), key=lambda i: i.header_offset):
            folder, _, number = info.filename.rpartition("/")
            if not folder.endswith("/data") or info.compress_type != zipfile.ZIP_STORED:
                continue
            f.seek(info.header_offset)
            name, extra = struct.unpack("<26xHH", f.read(30))
            records[info.header_offset + 30 + name + extra] = info.file_size
            numbers.append(number)
    return records if numbers == [str(n) for n in range(len(numbers))] else {}


def _places(path: Path, tensors: dict[str, Tensor], records: dict[int, int]) -> Table | None:
    """Where each tensor lies, checked against the zip's own directory; None if torch is too old to say it."""
    size = os.path.getsize(path)
    table = {}
    for name, tensor in tensors.items():
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or (offset not in records and tensor.numel()):
            return None
        stride = None if tensor.is_contiguous() else tuple(tensor.stride())
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape), path, offset, int(tensor.storage_offset()), stride)
        needed = (spec.first + spec.extent) * spec.dtype.itemsize
        if tensor.numel() and (needed > records[offset] or offset + needed > size):
            raise CheckpointError(f"{path} is damaged: tensor {name!r} reaches beyond its data; fetch it again")
        table[name] = spec
    return table


def _refusal(path: Path, error: Exception) -> str:
    """torch's long message as one sentence."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked:
        what = f"asks to run code when opened ({asked[1]})"
        return f"{path} {what} and was refused; use a .safetensors version of these weights"
    return f"{path} is not a pickle of plain tensors and was refused; use a .safetensors version of these weights"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
