"""Restricted unpickler for tables of tensors: calls no function that a file names, and bounds time and memory.

PyTorch's restricted unpickler builds tensors, and limits neither the length of a pickle nor the keys of its tables
(hashing nested tuples takes exponential time).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, ClassVar

import torch

MAX_PICKLE = 1 << 22
"""Longest pickle in bytes: ten times the released network's."""

MAX_READS = 1_000_000
"""Most reads of one pickle, about one per instruction; they take a second."""

MAX_DIMENSIONS = 64

_OPCODES = (
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID"),
)
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class Refused(pickle.UnpicklingError):
    """A pickle needs more than a table of tensors does. function: name of the function that it calls, or ""."""

    def __init__(self, function: str = "") -> None:
        super().__init__(function)
        self.function = function


class Limited:
    """File with a limit of bytes and of reads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        if size > MAX_PICKLE:
            raise ValueError(f"its list of tensors has {size:,} bytes, expected at most {MAX_PICKLE:,}")
        self.file, self.left, self.reads = file, size, MAX_READS

    def read(self, size: int = -1) -> bytes:
        return self._counted(self.file.read(self.left if size < 0 else min(size, self.left)))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.reads -= 1
        if self.reads < 0:
            raise ValueError(f"its list of tensors has more than {MAX_READS:,} entries")
        return data


class Tables(dict[Any, Any]):
    """Unpickled dict or OrderedDict."""


@dataclass(frozen=True)
class Storage:
    """A pickled storage. key: its name in the file."""

    key: str
    dtype: torch.dtype

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A pickled tensor: a view of a storage, with first index and stride in elements of dtype."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Machine(pickle._Unpickler):
    """Unpickler of tables of tensors, as Stored, and plain numbers, texts and lists; raises Refused for all else."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(getattr(pickle, name)): pickle._Unpickler.dispatch[ord(getattr(pickle, name))] for name in _OPCODES
    }

    def __init__(self, file: Limited) -> None:
        super().__init__(file, encoding="latin1")

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:  # an instruction that is not in `dispatch`, or a memo that was never set
            raise Refused from error

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a name that `torch.save` writes; raise Refused for any other."""
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _REPLACEMENTS:
            return _REPLACEMENTS[module, name]
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """Read ("storage", type, key, device, number of elements), with the base of a view in older files."""
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Refused
        if view not in ([], [None]):
            raise ValueError("its storages are views of others, as before PyTorch 0.4; save it again")
        return Storage(key, dtype)

    def load_frame(self) -> None:
        """Skip the length of a frame; its bytes are read and counted one by one."""
        self.read(8)  # type: ignore[attr-defined]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if not any(function is known for known in _REPLACEMENTS.values()) or not isinstance(arguments, tuple):
            raise Refused
        self.stack[-1] = function(*arguments)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Discard attributes, such as a state dict's versions."""
        self.stack.pop()  # type: ignore[attr-defined]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set(self.stack[-1], [key, value])  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._set(self.stack[-1], items)  # type: ignore[attr-defined]

    def load_empty_dictionary(self) -> None:
        self.append(Tables())  # type: ignore[attr-defined]

    @staticmethod
    def _set(table: object, items: list[object]) -> None:
        if not isinstance(table, Tables) or not all(isinstance(key, str | int | float) for key in items[::2]):
            raise Refused
        table.update(zip(items[::2], items[1::2], strict=True))

    dispatch |= {
        ord(pickle.FRAME): load_frame,
        ord(pickle.REDUCE): load_reduce,
        ord(pickle.BUILD): load_build,
        ord(pickle.SETITEM): load_setitem,
        ord(pickle.SETITEMS): load_setitems,
        ord(pickle.EMPTY_DICT): load_empty_dictionary,
    }


def _tensor(storage: object, first: object, shape: object, stride: object, *rest: object) -> Stored:
    """Replace `torch._utils._rebuild_tensor_v2`, and v3, which has the dtype as the third of `rest`."""
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else None
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise Refused
    numbers = (first, *shape, *stride)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(shape) != len(stride):
        raise Refused
    if len(shape) > MAX_DIMENSIONS or prod(shape) >= 1 << 62:
        raise Refused
    return Stored(storage, int(str(first)), shape, stride, dtype or storage.dtype)


def _parameter(data: object, *_: object) -> object:
    return data


def _subclass(function: Callable[..., Any], _: object, arguments: object, *__: object) -> Stored:
    """Rebuild a tensor with Python attributes, without the attributes."""
    if function is not _tensor or not isinstance(arguments, tuple):
        raise Refused
    return _tensor(*arguments)


def _table(*_: object) -> Tables:
    return Tables()


def _shape(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _nothing(*_: object) -> None:
    return None


_REPLACEMENTS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _table,
    ("torch", "Size"): _shape,
    ("torch", "device"): _nothing,
    ("torch", "Tensor"): _nothing,
    ("torch.nn.parameter", "Parameter"): _nothing,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
}
