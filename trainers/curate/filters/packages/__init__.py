"""Filters that need the packages of the extra `[curate]`: text, quality without a reference, heads, faces.

Each is imported when it is first needed. Without its package a filter says "not run", and the next run tries again.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...manifest.scores import NOT_RUN
from ...manifest.shards import Row
from ..picture import Decoded

NEEDS = {
    "brisque": ("brisque",),
    "text": ("rapidocr", "onnxruntime"),
    "head": ("dlib", "face_recognition_models"),
    "face_identity": ("dlib", "face_recognition_models"),
}
"""Filter -> packages. `brisque` and `face_recognition_models` are never imported: only their weights are read."""

ROOMS = {"brisque": "brisque", "text": "text", "head": "faces", "face_identity": "faces"}


def measure_with_package(name: str, picture: Decoded) -> Any:
    """Value of a filter, or {"not run": reason} if a package is missing."""
    return missing(name) or _function(name)(picture)


def compare_with_package(name: str, out: Path, row: Row) -> Any:
    """Value of a filter that looks at the sources too. Raises UniPicError for an unreadable picture."""
    return missing(name) or _function(name)(out, row)


def missing(name: str) -> dict[str, Any] | None:
    """Value of a filter whose package is not installed; None if all are."""
    absent = [package for package in NEEDS[name] if find_spec(package) is None]
    if not absent:
        return None
    return {NOT_RUN: f'{absent[0]} is not installed; run pip install "comfyui-unipic[curate]"'}


def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{ROOMS[name]}"), name)
    return function


def folder_of(package: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(package)
    assert spec is not None  # checked by `missing`
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))
