"""Checks of what wires bring: a node of another author may give another kind of value, or none."""

from __future__ import annotations

from collections.abc import Mapping

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...unipic_core.errors import UniPicError

_NONE: Mapping[str, object] = {}


def check_tensors(required: Mapping[str, object], optional: Mapping[str, object] = _NONE) -> None:
    """UniPicError for an input, name -> value, that is not a tensor; optional ones may be None."""
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {**required, **given}.items():
        if not isinstance(value, Tensor):
            raise UniPicError(f"{name} must be an IMAGE or a MASK, got {kind_of(value)}; connect Load Image")


def check_model(model: object) -> None:
    """UniPicError unless an input is a MODEL."""
    if not isinstance(model, ModelPatcher):
        raise UniPicError(f"model must be the MODEL of Load UniPic, got {kind_of(model)}; connect that node")


def check_part(name: str, part: object, attribute: str) -> None:
    """UniPicError unless an input is a CLIP or a VAE. attribute: one that each of this kind has."""
    if not hasattr(part, attribute):
        raise UniPicError(f"{name} must come from Load UniPic, got {kind_of(part)}; connect that node")


def check_conditioning(name: str, value: object) -> None:
    """UniPicError unless an input is a CONDITIONING: a list of [text, options]."""
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[1], dict) for p in pairs):
        raise UniPicError(f"{name} must be a CONDITIONING, got {kind_of(value)}; connect that of Multi-Image Compose")


def kind_of(value: object) -> str:
    """Kind of a value, for a message."""
    return "nothing" if value is None else type(value).__name__
