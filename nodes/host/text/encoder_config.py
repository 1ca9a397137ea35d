"""Text encoder config: sizes of ComfyUI's classes from a config.json of transformers, old or new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....unipic_core.conditioning.vision import FRAMES, MERGE, PATCH, POSITIONS, encoder_positions
from ....unipic_core.errors import CheckpointError, joined_lines

_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
}
_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "depth": 32,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_IMAGE_TOKEN = 151655
_MROPE = [16, 24, 24]
_FIXED = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a Qwen2.5-VL; those that a config leaves out are the release's.

    text: sizes of the language model, by ComfyUI's names. rope_dims: number of frequencies for (frame, row, column).
    vision: sizes of the vision tower, by ComfyUI's names. full_attention: its blocks that attend to the whole picture.
    positions: one of POSITIONS. image_token: id of the token that image tokens replace.
    """

    text: dict[str, Any]
    head_dim: int
    rope_dims: list[int]
    vision: dict[str, int]
    full_attention: list[int]
    positions: str
    image_token: int

    @classmethod
    def read(cls, file: Path) -> EncoderConfig:
        """Read a config.json. CheckpointError if it is missing, damaged or of another kind of encoder."""
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            return cls.from_dict(config)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({joined_lines(error)}); download the text_encoder folder again"
            ) from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """Sizes from config.json's dictionary: flat, as transformers 4 wrote it, or with `text_config`."""
        if config.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(
                f"expected model_type qwen2_5_vl, got {config.get('model_type')!r}; use the text_encoder of "
                "Qwen-Image-Edit"
            )
        language = {**config, **(config.get("text_config") or {})}
        vision = config.get("vision_config") or {}
        other = [f"{name} {vision[name]}" for name, value in _FIXED.items() if vision.get(name, value) != value]
        if other:
            raise CheckpointError(
                f"expected the vision tower of Qwen2.5-VL, got {', '.join(other)}; use the text_encoder of "
                "Qwen-Image-Edit"
            )
        text: dict[str, Any] = {name: type(default)(language.get(name, default)) for name, default in _TEXT.items()}
        rope = language.get("rope_parameters") or language.get("rope_scaling") or {}
        text["rope_theta"] = float(rope.get("rope_theta") or language.get("rope_theta") or 1e6)
        sizes = {name: vision.get(name, default) for name, default in _VISION.items()}
        positions = encoder_positions(config.get("unipic_positions"), config.get("transformers_version"))
        if positions not in POSITIONS:
            raise CheckpointError(
                f"unipic_positions must be one of {', '.join(POSITIONS)}, got {positions!r}; remove the key"
            )
        return cls(
            text=text,
            head_dim=int(language.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]),
            rope_dims=[int(n) for n in rope.get("mrope_section") or _MROPE],
            vision={
                "hidden_size": int(sizes["hidden_size"]),
                "output_hidden_size": text["hidden_size"],
                "intermediate_size": int(sizes["intermediate_size"]),
                "num_heads": int(sizes["num_heads"]),
                "num_layers": int(sizes["depth"]),
                "window_size": int(sizes["window_size"]),
            },
            full_attention=[int(n) for n in sizes["fullatt_block_indexes"]],
            positions=positions,
            image_token=int(config.get("image_token_id") or _IMAGE_TOKEN),
        )
