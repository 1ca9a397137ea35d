"""Tensor tables of pickled weight files: the place of every storage in the file, without loading any.

Reads both formats of `torch.save`: a zip with `data.pkl` and a record for each storage, and the older stream of
pickles. `torch.load` gives places only if the records are in the order of their numbers, which PyTorch 2.6 and later do
not guarantee; otherwise it would load the whole file.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from ...errors import CheckpointError, one_line
from .pickle_machine import MAX_PICKLE, Limited, Machine, Refused, Stored, Tables
from .tensor_spec import Table, TensorSpec

MAX_RECORDS, MAX_DIRECTORY = 100_000, 1 << 24
"""Most files in a zip, and the longest directory in bytes."""

MAX_GROWTH, SMALL = 4, 1 << 20
"""Tensors may have MAX_GROWTH times the bytes of their file, plus SMALL: several may share a storage, and one may
repeat it."""

_BIG_ENDIAN = "its numbers are big-endian; save it again on another computer"
_UNREADABLE = (
    *(pickle.UnpicklingError, ArithmeticError, RuntimeError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError),
)
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_pickle(path: Path) -> Table:
    """Read the table of a pickled state dict; unwraps nested ones ("state_dict", or one key around all).

    No function that the pickle names is called: those that `torch.save` names for tensors are replaced by functions of
    `pickle_machine`, all others are refused. Raises CheckpointError.
    """
    try:
        table = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except Refused as error:
        raise CheckpointError(_refusal(path, error)) from error
    except (OSError, zipfile.BadZipFile, struct.error, MemoryError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)}); fetch it again") from error
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable PyTorch file ({one_line(error)}); fetch it again") from error
    _check_growth(path, table)
    return table


def _check_growth(path: Path, table: Table) -> None:
    size, needed = os.path.getsize(path), sum(spec.nbytes for spec in table.values())
    if needed > MAX_GROWTH * size + SMALL:
        raise CheckpointError(
            f"{path} has {size:,} bytes and describes tensors of {needed:,}, which repeat the same bytes; the file is "
            "not trustworthy and was not read"
        )


def _read_zip(path: Path) -> Table:
    """Read the table of a zip of `torch.save`."""
    _check_directory(path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = {info.filename: info for info in archive.infolist()}
        pickled = next((name for name in infos if name.rpartition("/")[2] == "data.pkl"), None)
        if pickled is None:
            raise ValueError("it is a zip without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        _check_byte_order(path, file, infos.get(f"{folder}byteorder"))
        file.seek(_place(path, file, infos[pickled]))
        machine = Machine(Limited(file, infos[pickled].file_size))
        tensors = _tensors(machine.load())
        places = {}
        for key in {stored.storage.key for stored in tensors.values()}:
            info = infos.get(f"{folder}data/{key}")
            if info is not None:
                places[key] = (_place(path, file, info), info.file_size)
    return {name: _spec(path, name, stored, places) for name, stored in tensors.items()}


def _check_directory(path: Path) -> None:
    """Raise CheckpointError for a zip with a longer directory than any weight file's, before ZipFile reads it."""
    with open(path, "rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    count, length = (end[4], end[5]) if end else (0, 0)
    if count > MAX_RECORDS or length > MAX_DIRECTORY:
        raise CheckpointError(
            f"{path} lists {count:,} files in {length:,} bytes, expected at most {MAX_RECORDS:,}; the file is not "
            "trustworthy and was not read"
        )


def _check_byte_order(path: Path, file: BinaryIO, info: zipfile.ZipInfo | None) -> None:
    if info is not None:
        file.seek(_place(path, file, info))
        if file.read(3) == b"big":
            raise ValueError(_BIG_ENDIAN)


def _place(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a record's bytes in the file. Raises CheckpointError if they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(
            f"{path} holds {info.filename.rpartition('/')[2]} compressed, which PyTorch never writes; save it again "
            "with torch.save or as .safetensors"
        )
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    return info.header_offset + 30 + int(name) + int(extra)


def _read_legacy(path: Path) -> Table:
    """Read the table of the older stream: magic number, version, system, tensors, storage keys, then size and bytes of
    each storage."""
    with open(path, "rb") as file:
        limited = Limited(file, MAX_PICKLE)
        if (magic := Machine(limited).load()) != _LEGACY_MAGIC:
            tensors_alone = isinstance(magic, dict)
            raise ValueError("it is a plain pickle" if tensors_alone else "it does not begin as torch.save does")
        if Machine(limited).load() != _LEGACY_VERSION:
            raise ValueError("it was written by a version of PyTorch that is not known")
        system = Machine(limited).load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise ValueError(_BIG_ENDIAN)
        tensors = _tensors(Machine(limited).load())
        keys = Machine(limited).load()
        places, sizes = {}, {stored.storage.key: stored.storage.item for stored in tensors.values()}
        size = os.path.getsize(path)
        at = file.tell()
        for key in keys if isinstance(keys, list) else ():
            file.seek(at)
            (count,) = struct.unpack("<q", file.read(8))
            nbytes = count * sizes.get(str(key), 1)
            if not 0 <= nbytes <= size - at - 8 or str(key) not in sizes:
                raise ValueError(f"its storage {str(key)[:40]!r} is not whole")
            places[str(key)] = (at + 8, nbytes)
            at += 8 + nbytes
    return {name: _spec(path, name, stored, places) for name, stored in tensors.items()}


def _tensors(loaded: object) -> dict[str, Stored]:
    """Unwrap an unpickled object to its state dict."""
    for _ in range(3):
        if not isinstance(loaded, Tables):
            break
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Stored)}
        if tensors:
            return tensors
        inner = [v for k, v in loaded.items() if isinstance(v, Tables) and (k == "state_dict" or len(loaded) == 1)]
        loaded = inner[0] if inner else None
    raise ValueError("it holds no table of tensors")


def _spec(path: Path, name: str, stored: Stored, places: dict[str, tuple[int, int]]) -> TensorSpec:
    """Locate a tensor in the file and check it against the size of its storage."""
    offset, room = places.get(stored.storage.key, (0, 0))
    contiguous = stored.stride == _plain_strides(stored.shape) or 0 in stored.shape
    stride = None if contiguous else stored.stride
    spec = TensorSpec(stored.dtype, stored.shape, path, offset, stored.first, stride)
    needed = (spec.first + spec.extent) * spec.dtype.itemsize
    if spec.extent and (needed > room or offset + needed > os.path.getsize(path)):
        raise CheckpointError(f"{path} is damaged: tensor {name!r} reaches beyond its data; fetch it again")
    return spec


def _plain_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _refusal(path: Path, error: Refused) -> str:
    """Message for a refused pickle."""
    if error.function and re.fullmatch(r"[\w.]{1,100}", error.function):
        return (
            f"{path} asks to run code when opened ({error.function}) and was refused; use a .safetensors version of "
            "these weights"
        )
    return f"{path} is not a pickle of plain tensors and was refused; use a .safetensors version of these weights"
