"""Pickled weight files as tables of tensors, without running code from them.

`torch.load(weights_only=True)` walks the pickle and never calls what it names; the tensors are then read from their
places in the zip.
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
        raise CheckpointError(f"{path} is not a readable PyTorch file ({one_line(error)}); fetch it again") from error
    except (zipfile.BadZipFile, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)}); fetch it again") from error
    return {name: TensorSpec(t.dtype, tuple(t.shape), path, loaded=t) for name, t in tensors.items()}


def _torch_load(path: Path, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, **how)


def _tensors(loaded: object) -> dict[str, Tensor]:
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
