"""The encoder's config.json, old and new; needs no ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.nodes.comfyui import load_pack
from tests.paths import ROOT, TINY

load_pack()
from unipic_pack.nodes.host.text.encoder_config import EncoderConfig  # noqa: E402
from unipic_pack.unipic_core.conditioning.vision import encoder_positions  # noqa: E402
from unipic_pack.unipic_core.errors import CheckpointError  # noqa: E402

RELEASED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "transformers_version": "4.53.1",
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
    },
    "vocab_size": 152064,
}
"""What transformers 4 writes for the 7B, without the fields that do not change the numbers."""


def test_released() -> None:
    config = EncoderConfig.from_dict(RELEASED)
    assert config == EncoderConfig.from_dict({"model_type": "qwen2_5_vl", "transformers_version": "4.53.1"})
    assert config.head_dim == 128
    assert config.positions == "multimodal"
    assert config.text["rope_theta"] == 1e6
    assert config.vision["output_hidden_size"] == 3584


def test_nested_text_config_goes_first() -> None:
    nested = {**RELEASED, "text_config": {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 5.0}}
    config = EncoderConfig.from_dict(nested)
    assert (config.text["hidden_size"], config.head_dim, config.text["rope_theta"]) == (64, 32, 5.0)
    assert config.vision["output_hidden_size"] == 64


def test_bundled_and_golden() -> None:
    nano = EncoderConfig.read(ROOT / "unipic_core" / "models" / "unipic-nano" / "text_encoder" / "config.json")
    assert (nano.positions, nano.head_dim, nano.rope_dims, nano.full_attention) == ("multimodal", 32, [4, 6, 6], [1])
    tiny = EncoderConfig.read(TINY / "text_encoder" / "config.json")
    assert (tiny.positions, tiny.image_token, tiny.text["rms_norm_eps"]) == ("sequential", 261, 1e-5)


@pytest.mark.parametrize(
    ("asked", "version", "positions"),
    [
        ("multimodal", "5.23.0", "multimodal"),
        ("sequential", "4.53.1", "sequential"),
        (None, "5.2.9", "multimodal"),
        (None, "5.3.0", "sequential"),
        (None, None, "sequential"),
        (None, "4.41.2", "multimodal"),
    ],
)
def test_positions(asked: str | None, version: str | None, positions: str) -> None:
    assert encoder_positions(asked, version) == positions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected model_type qwen2_5_vl, got 'llama'"),
        ({"vision_config": {"patch_size": 16}}, "expected the vision tower of Qwen2.5-VL, got patch_size 16"),
        ({"unipic_positions": "spiral"}, "must be one of multimodal, sequential, got 'spiral'"),
        ({"hidden_size": "wide"}, "cannot be read"),
        ({"num_attention_heads": 0}, "cannot be read"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**RELEASED, **change}))
    with pytest.raises(CheckpointError, match=message):
        EncoderConfig.read(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        EncoderConfig.read(tmp_path / "config.json")
