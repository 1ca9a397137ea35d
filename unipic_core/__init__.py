"""The UniPic 3 core: network, conditioning, sampling, weights. Torch, numpy, Pillow and safetensors only.

`UniPicPipeline`, which needs transformers too, and `load_image` are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conditioning.images import load_image
    from .pipeline import UniPicPipeline

__version__ = "0.1.0"

MODELS = Path(__file__).parent / "models"
"""Folder of the bundled models; their LoRAs are in loras/ of each model."""

__all__ = ["MODELS", "UniPicPipeline", "load_image"]

_ROOMS = {"UniPicPipeline": ".pipeline", "load_image": ".conditioning.images"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name], __name__), name)
