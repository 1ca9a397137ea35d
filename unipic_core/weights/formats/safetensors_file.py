"""Headers of safetensors files: the place of every tensor, without loading any.

The header is parsed here because the safetensors library does not expose a tensor's place in the file, which is needed
to read it straight into its final memory, and takes 7 s for a hostile header that this parser refuses in 0.1 s. For a
real header of 1,900 tensors both take about 10 ms. Pickles are read in pickle_file.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .pickle_file import read_pickle
from .tensor_spec import Table, TensorSpec

MAX_HEADER, MAX_TENSORS = 1 << 23, 100_000
"""Limits of a header in bytes and in tensors: fifty times the released network's, so that a hostile header takes less
than 2 s and 500 MB to parse. The format itself allows 100 MB."""

MAX_DIMENSIONS = 64

TEXT_TENSOR, MAX_TEXT = "unipic_", 1 << 20
"""Prefix of uint8 tensors that hold the bytes of a metadata text, and the longest such text in bytes."""

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


def read_table(path: Path) -> tuple[Table, dict[str, str]]:
    """Read the tensor table and metadata of one `.safetensors`, `.sft`, `.bin`, `.pt`, `.pth` or `.ckpt` file.

    Raises CheckpointError.
    """
    _check_file(path)
    if path.suffix in (".safetensors", ".sft"):
        return read_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return read_pickle(path), {}
    raise CheckpointError(f"{path} is not a weight file: expected .safetensors or a pickled .bin, .pt, .pth or .ckpt")


def _check_file(path: Path) -> None:
    """Raise CheckpointError for a path that is absent, a folder, empty, a Git LFS pointer or a web page."""
    if not path.exists():
        raise CheckpointError(f"there is no file {path}; check the path")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; name a weight file")
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
    if start.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path} is a GGUF file, which only a GGUF loader in ComfyUI reads; use a version in .safetensors"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself")


def read_safetensors(path: Path) -> tuple[Table, dict[str, str]]:
    """Read the table and metadata of a safetensors file; checks every number of the header against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if MAX_HEADER < length <= size - 8:
            raise CheckpointError(
                f"the header of {path} has {length:,} bytes, expected at most {MAX_HEADER:,}; the file is not "
                "trustworthy and was not read"
            )
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: its header should be {length} bytes long, "
                f"the file has {size}; fetch it again"
            )
        text = f.read(length)
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:  # counted before anything is parsed
        raise CheckpointError(
            f"{path} describes {count:,} tensors, expected at most {MAX_TENSORS:,}; the file is not trustworthy and "
            "was not read"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON; fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object; fetch it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"the metadata of {path} is not a table of strings; fetch the file again")
    table, ends = {}, {}
    for name, entry in header.items():
        table[name], ends[name] = _entry(path, name, entry, 8 + length, size)
    _check_layout(path, table, ends, 8 + length, size)
    return table, {**_extract_texts(path, table), **metadata}


def _extract_texts(path: Path, table: Table) -> dict[str, str]:
    """Remove and return the metadata texts that ComfyUI's save nodes, which write tensors only, stored as tensors."""
    texts = {}
    for stored in [name for name in table if name.rpartition(".")[2].startswith(TEXT_TENSOR)]:
        spec = table[stored]
        if spec.dtype == torch.uint8 and len(spec.shape) == 1 and spec.nbytes <= MAX_TEXT:
            try:
                texts[stored.rpartition(".")[2]] = bytes(spec.read().tolist()).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is damaged: {stored!r} is not text; fetch it again") from error
            del table[stored]
    return texts


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> tuple[TensorSpec, int]:
    """Parse one tensor of a header to (its spec, the offset of the byte behind it)."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        valid = isinstance(dtype, str) and len(shape) <= MAX_DIMENSIONS
        valid = valid and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"the header of {path} does not give type, shape and place of tensor {name!r}; fetch the file again"
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
    """Check that the tensors follow each other without gaps or overlaps up to the end of the file."""
    at = data
    for name in sorted(table, key=lambda n: (table[n].offset, ends[n])):
        if table[name].offset != at:
            raise CheckpointError(
                f"{path} is damaged: tensor {name!r} does not start where the one before it ends; fetch it again"
            )
        at = ends[name]
    if at != size:
        raise CheckpointError(
            f"{path} is damaged: {size - at} bytes behind its last tensor belong to none; fetch it again"
        )


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Lay out a file of these tensors: (its first bytes, name -> offset of the tensor, size of the file in bytes).

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
