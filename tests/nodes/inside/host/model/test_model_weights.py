"""MODEL's weights: types, scaled fp8, offloading and LoRA give what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.memory_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import pytest
import torch
from model_tools import lora_file, patched, random_inputs, relative, velocity
from safetensors.torch import load_file, save_file
from unipic_pack.nodes.host.model import loading
from unipic_pack.nodes.host.model.latent_format import read_latent_format
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.transformer import load_transformer, open_transformer

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize(
    ("weight_dtype", "stored", "most"), [("bf16", torch.bfloat16, 1e-6), ("fp8", torch.float8_e4m3fn, 0.2)]
)
def test_weight_dtypes(weight_dtype: str, stored: torch.dtype, most: float, nano: Path, nano_model: Any) -> None:
    x, text, references = random_inputs()
    patcher = load_model(nano, weight_dtype)
    assert {p.dtype for p in patcher.model.diffusion_model.parameters()} == {stored}
    difference = relative(velocity(patcher, x, 0.5, text, references), velocity(nano_model, x, 0.5, text, references))
    print(weight_dtype, difference)
    assert difference < most
    with pytest.raises(UniPicError, match="weight_dtype must be one of as stored, bf16, fp8"):
        load_model(nano, "fp4")


def scaled_file(nano: Path, path: Path, old: bool, per_row: bool = False) -> Path:
    """The nano as a single scaled fp8 file under a checkpoint's prefix, as ComfyUI's tools write it, now and before."""
    tensors = {}
    for name, w in load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors").items():
        layer = "model.diffusion_model." + name.removesuffix(".weight")
        if w.ndim != 2 or "transformer_blocks" not in name:
            tensors["model.diffusion_model." + name] = w
            continue
        scale = (w.float().abs().amax(1, keepdim=True).clamp(min=1e-6) if per_row else w.float().abs().max()) / 448
        tensors[layer + ".weight"] = (w.float() / scale).to(torch.float8_e4m3fn)
        tensors[layer + (".scale_weight" if old else ".weight_scale")] = scale
        if not old:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[layer + ".comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if old:
        tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    config = (nano / "transformer" / "config.json").read_text()
    save_file(tensors, path, {"unipic_config": config})
    return path


@pytest.mark.parametrize("form", ["now", "before", "per row"])
def test_scaled_fp8_files_stay_fp8(form: str, nano: Path, nano_model: Any, tmp_path: Path) -> None:
    from comfy.quant_ops import QuantizedTensor

    path = scaled_file(nano, tmp_path / "scaled.safetensors", form == "before", form == "per row")
    latents = read_latent_format(nano)
    patcher = load_model(path, "as stored", latents)
    weight = patcher.model.diffusion_model.transformer_blocks[0].attn.to_q.weight
    assert isinstance(weight, QuantizedTensor)
    x, text, references = random_inputs()
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references])
    core = load_transformer(path, dtype=torch.float32)(packed, 0.5, TextCond(text))  # multiplies the scales out
    want = unpack_latents(core, LatentShape(1, 4, 4))
    got = velocity(patcher, x, 0.5, text, references)
    print(form, relative(got, want), relative(got, velocity(nano_model, x, 0.5, text, references)))
    assert relative(got, want) < 1e-5
    assert relative(got, velocity(nano_model, x, 0.5, text, references)) < 0.1
    whole = load_model(path, "bf16", latents)
    assert {p.dtype for p in whole.model.diffusion_model.parameters()} == {torch.bfloat16}
    assert relative(velocity(whole, x, 0.5, text, references), want) < 0.01


def test_weights_are_mapped_until_they_are_used(nano: Path) -> None:
    weights = open_transformer(nano).weights
    tensors = loading.state_dict(weights, keep_quantised=True)
    addresses = sorted((t.data_ptr(), t.nbytes) for t in tensors.values())
    span = addresses[-1][0] + addresses[-1][1] - addresses[0][0]
    assert span == weights.nbytes  # one after the other, as in the file


def test_dynamic_offload_takes_the_mapped_tensors(nano: Path, nano_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have no weights until they are loaded, and then take the file's own pages."""
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda _: True)
        patcher = load_model(nano, "bf16")
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in patcher.model.diffusion_model.parameters()]
    assert max(s[1] for s in spans) - min(s[0] for s in spans) == sum(b - a for a, b in spans)
    x, text, references = random_inputs()
    got = velocity(patcher, x, 0.5, text, references)
    torch.testing.assert_close(got, velocity(nano_model, x, 0.5, text, references))


def test_custom_operations_make_every_layer(nano: Path, nano_model: Any) -> None:
    """As GGUF loaders bring them."""

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            pass

    patcher = load_model(nano, custom_operations=Operations)
    layers = [m for m in patcher.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers
    assert all(isinstance(m, Operations.Linear) for m in layers)
    x, text, references = random_inputs()
    torch.testing.assert_close(
        velocity(patcher, x, 0.5, text, references), velocity(nano_model, x, 0.5, text, references)
    )


def test_reload_without_dynamic_offload(nano: Path, nano_model: Any) -> None:
    loader, args = nano_model.cached_patcher_init
    patcher = loader(*args, disable_dynamic=True)
    assert type(patcher) is comfy.model_patcher.ModelPatcher
    x, text, references = random_inputs()
    torch.testing.assert_close(
        velocity(patcher, x, 0.5, text, references), velocity(nano_model, x, 0.5, text, references)
    )
    assert attachment_of(patcher) == attachment_of(nano_model)


@pytest.mark.parametrize("with_lora", [False, True])
def test_low_vram(with_lora: bool, nano: Path, nano_model: Any) -> None:
    """Most layers stay behind and are cast when they are used; a LoRA on them is added then, without rounding."""
    x, text, references = random_inputs()
    patcher, whole = load_model(nano), nano_model
    if with_lora:
        patcher, whole = (patched(p, lora_file("diffusion_model.{}.lora_{}.weight")) for p in (patcher, whole))
    want = velocity(whole, x, 0.5, text, references)
    model = patcher.model
    patcher.load(patcher.load_device, lowvram_model_memory=200_000)
    behind = [m for m in model.diffusion_model.modules() if getattr(m, "comfy_patched_weights", None) is None]
    assert model.model_lowvram
    assert model.lowvram_patch_counter == (12 if with_lora else 0)
    assert len(behind) > 50
    denoised = model.apply_model(x, torch.tensor([0.5]), c_crossattn=text, ref_latents=references)
    assert relative((x - denoised) / 0.5, want) < (0.01 if with_lora else 1e-5)
    patcher.detach()


@pytest.mark.parametrize(
    "pattern", ["{}.lora_{}.weight", "transformer.{}.lora_{}.weight", "diffusion_model.{}.lora_{}.weight"]
)
def test_stock_lora_loading(pattern: str, nano: Path, nano_model: Any) -> None:
    x, text, references = random_inputs()
    lora = lora_file(pattern)
    network = load_transformer(nano, dtype=torch.float32)
    for layer in {n.rsplit(".lora_", 1)[0] for n in lora}:
        module = network.get_submodule(layer.removeprefix("transformer.").removeprefix("diffusion_model."))
        module.weight.data += lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references])
    want = unpack_latents(network(packed, 0.5, TextCond(text)), LatentShape(1, 4, 4))
    with_lora = patched(nano_model, lora)
    got = velocity(with_lora, x, 0.5, text, references)
    print(relative(got, want), relative(velocity(nano_model, x, 0.5, text, references), want))
    assert relative(got, want) < 0.01  # ComfyUI adds it to bfloat16 weights
    assert relative(velocity(nano_model, x, 0.5, text, references), want) > 0.05


def test_kohya_names(nano_model: Any) -> None:
    key_map = comfy.lora.model_lora_keys_unet(nano_model.model, {})
    expected = "diffusion_model.transformer_blocks.0.attn.to_out.0.weight"
    assert key_map["lora_unet_transformer_blocks_0_attn_to_out_0"] == expected
    assert key_map["lycoris_transformer_blocks_0_attn_to_out_0"] == expected
