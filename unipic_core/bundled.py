"""LoRAs that come with the package, by the names that a saved workflow keeps."""

from __future__ import annotations

from pathlib import Path

from . import MODELS

BUNDLED = "bundled: "
"""Prefix of their names in the nodes' lists."""

RENAMED = {
    "unipic-nano/unipic-nano-few-step_prefix_causal.safetensors": "unipic-nano/unipic-nano-few-step.safetensors",
}
"""Name in an earlier version -> the LoRA in its place, so that saved workflows still run."""


def bundled_loras() -> dict[str, Path]:
    """Name, "model/file", -> file."""
    return {f"{file.parents[1].name}/{file.name}": file for file in sorted(MODELS.glob("*/loras/*.safetensors"))}
