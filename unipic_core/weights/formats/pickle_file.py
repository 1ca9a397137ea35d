"""Tensor tables of pickled weight files, without running code from them.

`torch.load(weights_only=True)` walks the pickle and calls none of the functions it names; the tensors are then read
from their places in the zip archive.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, one_line
from .tensor_spec import Table, TensorSpec


def read_pickle(path: Path) -> Table:
    """Read the table of a pickled state dict; unwraps nested ones ("state_dict", or one key around all).

    Unpickles tensors and plain containers only: a file that names another function is refused before anything in it is
    called (`weights_only=True`). Raises CheckpointError.
    """
    try:
        if zipfile.is_zipfile(path):
            records = _zip_records(path)
            table = _tensor_specs(path, _tensors(_torch_load(path, map_location="meta")), records)
            if table is not None:
                return table
            tensors = _tensors(_torch_load(path, map_location="cpu", mmap=True))
        elif tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
            # the legacy format could run code in spite of weights_only (CVE-2025-32434)
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
        raise CheckpointError(f"{path} is not a readable PyTorch file ({one_line(error)}); fetch it again") from error
    except (zipfile.BadZipFile, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)}); fetch it again") from error
    return {name: TensorSpec(t.dtype, tuple(t.shape), path, loaded=t) for name, t in tensors.items()}


def _torch_load(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, **options)


def _tensors(loaded: object) -> dict[str, Tensor]:
    """Unwrap an unpickled object to its state dict."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        if any(isinstance(v, Tensor) for v in loaded.values()):
            return {str(k): v.detach() for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = [v for k, v in loaded.items() if isinstance(v, Mapping) and (k == "state_dict" or len(loaded) == 1)]
        loaded = inner[0] if inner else None
    raise ValueError("it holds no table of tensors")


def _zip_records(path: Path) -> dict[int, int]:
    """Map the offset of every tensor storage that is uncompressed in the zip to its size in bytes.

    Empty if the storages are not in the order of their numbers: torch computes offsets from that order and errs then.
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


def _tensor_specs(path: Path, tensors: dict[str, Tensor], records: dict[int, int]) -> Table | None:
    """Locate each tensor and check it against the zip's directory; None if torch is too old to give offsets."""
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
    """Shorten torch's message of several lines to one sentence."""
    if function := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} asks to run code when opened ({function[1]}) and was refused; use a .safetensors version of these "
            "weights"
        )
    return f"{path} is not a pickle of plain tensors and was refused; use a .safetensors version of these weights"
