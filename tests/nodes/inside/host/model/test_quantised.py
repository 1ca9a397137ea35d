"""Every quantisation of this ComfyUI comes through Load UniPic as through UNETLoader, and stays quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.quant_ops
import pytest
import torch
from causal_tools import conditioning
from model_tools import random_inputs, relative, velocity
from quantised_files import FORMS, SIZES, is_matrix, plain, stock_loader, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from unipic_pack.nodes.host.model.latent_format import PictureLatents
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.lora import add_lora
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.errors import CheckpointError
from unipic_pack.unipic_core.weights.lora import build_lora

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a form, written once."""
    folder = tmp_path_factory.mktemp("quantised")

    def written(form: str) -> Path:
        path = folder / f"{form}.safetensors"
        return path if path.exists() else write(form, path)

    return written


def layers(patcher: Any) -> dict[str, Any]:
    weights = patcher.model.diffusion_model.named_parameters()
    return {name: w for name, w in weights if isinstance(w, comfy.quant_ops.QuantizedTensor)}


@pytest.mark.parametrize("form", FORMS)
def test_as_through_the_stock_loader(form: str, file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = load_model(file(form)), stock_loader(monkeypatch)(str(file(form)))
    assert layers(ours).keys() == layers(stock).keys() == {n for n, w in plain().items() if is_matrix(n, w)}
    for name, weight in layers(ours).items():
        other = layers(stock)[name]
        assert (weight._layout_cls, weight.storage_dtype) == (other._layout_cls, other.storage_dtype)
        assert torch.equal(weight._qdata, other._qdata)
        assert torch.equal(weight.dequantize(), other.dequantize())
    x, text, references = random_inputs(width=SIZES.joint_attention_dim)
    references = [z[..., :4, :4] for z in references]  # larger ones move stock's text
    # layers that round their inputs to int8 may round a difference of 1e-7 to the next number
    assert relative(velocity(ours, x, 0.5, text, references), velocity(stock, x, 0.5, text, references)) < 3e-3


@pytest.mark.parametrize("form", FORMS)
def test_our_sampler_on_both_loaders(form: str, file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    x, text, references = random_inputs(width=SIZES.joint_attention_dim)
    positive = conditioning(text, [z[..., :4, :4] for z in references])

    def sampled(model: Any) -> Tensor:
        empty = {"samples": torch.zeros_like(x)}
        out = FewStepSampler.execute(model, positive, positive, empty, 3, 2, 1.0, "consistency", 1.0)
        return out[0]["samples"]

    stock = stock_loader(monkeypatch)(str(file(form)))
    assert relative(sampled(load_model(file(form))), sampled(stock)) < 3e-3


@pytest.mark.parametrize("form", FORMS)
def test_bf16_multiplies_out_what_the_layers_would(form: str, file: Callable[[str], Path]) -> None:
    quantised, whole = load_model(file(form)), load_model(file(form), "bf16")
    assert not layers(whole)
    weights = dict(whole.model.diffusion_model.named_parameters())
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    for name, weight in layers(quantised).items():
        assert torch.equal(weights[name], weight.dequantize().bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_fits_quantised_layers(form: str, file: Callable[[str], Path]) -> None:
    model = load_model(file(form))
    layer, width = "transformer_blocks.0.attn.to_q", SIZES.width
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"transformer.{layer}.lora_A.weight": torch.randn(4, width, generator=generator) * 0.2,
        f"transformer.{layer}.lora_B.weight": torch.randn(width, 4, generator=generator) * 0.2,
    }
    lora = build_lora(tensors, tensors.__getitem__, Path("l.safetensors"), {})
    changed, report = add_lora(model, lora, 1.0)
    assert report.matched == 1
    x, text, references = random_inputs(width=SIZES.joint_attention_dim)
    before = velocity(model, x, 0.5, text, references)
    with_lora = velocity(changed, x, 0.5, text, references)
    assert relative(with_lora, before) > 0.005
    stock = velocity(_patched(model, tensors, layer), x, 0.5, text, references)
    torch.testing.assert_close(with_lora, stock, rtol=1e-3, atol=1e-3)


def _patched(model: Any, tensors: dict[str, Tensor], layer: str) -> Any:
    """The LoRA as a plain difference of the weight, through ComfyUI alone."""
    clone = model.clone()
    down, up = (tensors[f"transformer.{layer}.lora_{side}.weight"] for side in "AB")
    clone.add_patches({f"diffusion_model.{layer}.weight": ("diff", (up @ down,))}, 1.0)
    return clone


@pytest.mark.parametrize("scale", [(256, 1), (256,)])
def test_fp8_with_a_scale_for_each_row(scale: tuple[int, ...], file: Callable[[str], Path], tmp_path: Path) -> None:
    """ComfyUI would spread a row's scale of shape [rows] over the columns."""
    tensors = load_file(file("float8_e4m3fn"))
    name = "transformer_blocks.0.attn.to_q.weight"
    rows = torch.linspace(0.001, 0.01, 256)
    tensors[f"{name}_scale"] = rows.reshape(scale)
    save_file(tensors, tmp_path / "rows.safetensors", {"unipic_config": _config(file)})
    model = load_model(tmp_path / "rows.safetensors")
    got = layers(model)[name]
    assert torch.equal(got.dequantize().float(), tensors[name].float() * rows[:, None])
    assert model.model.diffusion_model.get_submodule(name.removesuffix(".weight"))._full_precision_mm


def _config(file: Callable[[str], Path]) -> str:
    with safe_open(file("float8_e4m3fn"), "pt") as tensors:
        return tensors.metadata()["unipic_config"]


def test_described_in_the_metadata_alone(file: Callable[[str], Path], tmp_path: Path) -> None:
    """The settings there count, as a rotation does."""
    tensors = load_file(file("int8 rotated"))
    notes = {n: json.loads(bytes(t.tolist())) for n, t in tensors.items() if n.endswith(".comfy_quant")}
    declared = {"layers": {n.removesuffix(".comfy_quant"): note for n, note in notes.items()}}
    metadata = {"unipic_config": _config(file), "_quantization_metadata": json.dumps(declared)}
    save_file({n: t for n, t in tensors.items() if n not in notes}, tmp_path / "m.safetensors", metadata)
    got, want = layers(load_model(tmp_path / "m.safetensors")), layers(load_model(file("int8 rotated")))
    for name, weight in want.items():
        assert got[name]._params.convrot
        assert torch.equal(got[name].dequantize(), weight.dequantize())


def test_a_form_that_this_comfyui_does_not_know(file: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(file("int8_tensorwise"))
    note = torch.tensor(list(b'{"format": "int3_future"}'), dtype=torch.uint8)
    tensors = {n: note.clone() if n.endswith(".comfy_quant") else t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "new.safetensors", {"unipic_config": _config(file)})
    for dtype in ("as stored", "bf16"):
        with pytest.raises(CheckpointError, match="as int3_future, which this ComfyUI does not know; update ComfyUI"):
            load_model(tmp_path / "new.safetensors", dtype, PictureLatents())
