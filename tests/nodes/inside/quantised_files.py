"""Networks in every quantised form that ComfyUI has, written with its own layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from unipic_pack.unipic_core.model.config import MMDiTConfig
from unipic_pack.unipic_core.weights.transformer import CONFIG_KEY, expected_shapes

SIZES = MMDiTConfig(num_layers=2, num_attention_heads=2, joint_attention_dim=256)
"""As narrow as the forms with rotated groups of 256 inputs allow."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "int8 per row": {"format": "int8_tensorwise", "per_channel": True},
    "int8 rotated": {"format": "int8_tensorwise", "per_channel": True, "convrot": True, "convrot_groupsize": 64},
    "convrot_w4a4 int8": {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int8"},
}
FORMS = {name: {"format": name} for name in comfy.quant_ops.QUANT_ALGOS} | dict(OPTIONS)
"""Every format of this ComfyUI, and variants of some."""


def plain(seed: int = 0) -> dict[str, Tensor]:
    """A random network of SIZES in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return (1 + 0.1 * noise if "norm" in name else noise / shape[-1] ** 0.5).bfloat16()

    return {name: value(name, shape) for name, shape in expected_shapes(SIZES).items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith("transformer_blocks.") and tensor.ndim == 2


def quantised(form: str, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The blocks' matrices in a form of FORMS, as ComfyUI's own layers write them."""
    options = dict(FORMS[form])
    algorithm = options.pop("format")
    layout = comfy.quant_ops.QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    layers = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            out[prefix + name] = tensor
            continue
        scale = {"scale": "recalculate"} if algorithm.startswith("float8") else {}
        layer = layers.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        weight = comfy.quant_ops.QuantizedTensor.from_float(tensor, layout, **scale, **options)
        layer.quant_format, layer._full_precision_mm_config = algorithm, True
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        out |= layer.state_dict(prefix=prefix + name.removesuffix("weight"))
    return {name: tensor.contiguous() for name, tensor in out.items()}


def write(form: str, path: Path, prefix: str = "") -> Path:
    save_file(quantised(form, plain(), prefix), path, {CONFIG_KEY: _json(SIZES)})
    return path


def _json(config: MMDiTConfig) -> str:
    return json.dumps(config.to_dict())


def stock_loader(monkeypatch: pytest.MonkeyPatch, config: MMDiTConfig = SIZES) -> Callable[..., Any]:
    """ComfyUI's `load_diffusion_model` with these sizes, which it would not detect, in place of the release's."""
    detect = comfy.model_detection.detect_unet_config
    names = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "axes_dims_rope", "out_channels")

    def small(*args: Any, **kwargs: Any) -> Any:
        detected = detect(*args, **kwargs)
        if not detected or detected.get("image_model") != "qwen_image":
            return detected
        return {**detected, **{name: getattr(config, name) for name in names}}

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", small)
    return comfy.sd.load_diffusion_model
