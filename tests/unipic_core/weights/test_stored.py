"""The network held in little memory: the same numbers as loaded in full, or as a converted file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import TINY
from unipic_core.cli import main
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.errors import LoRAError
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.stored import StoredLinear
from unipic_core.pipeline import UniPicPipeline
from unipic_core.weights.convert import convert
from unipic_core.weights.lora import build_lora, merge_lora, read_lora, save_lora
from unipic_core.weights.merge import merge
from unipic_core.weights.stored import Storage, holds_fp8, holds_matrices_in_fp8, load_stored, merge_into_stored
from unipic_core.weights.transformer import load_transformer, open_transformer

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@torch.no_grad()
def velocity(network: MMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    packed = pack_with_references(randn(1, 16, 16), LatentShape(1, 4, 4), [[randn(1, 4, 1, 4, 6)]])
    text = TextCond(randn(1, 5, network.config.joint_attention_dim), None)
    return network(packed, 0.7, text)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY, tmp_path_factory.mktemp("fp8") / "tiny.safetensors", dtype="fp8_scaled")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    width = open_transformer(TINY).config.width
    generator = torch.Generator().manual_seed(1)
    pairs = {
        f"transformer_blocks.{i}.attn.{name}": (
            torch.randn(2, width, generator=generator) / 8,
            torch.randn(width, 2, generator=generator) / 8,
        )
        for i, name in ((0, "to_q"), (0, "add_v_proj"), (1, "to_k"))
    }
    save_lora(tmp_path / "lora.safetensors", pairs)
    return tmp_path / "lora.safetensors"


@BOTH
@pytest.mark.parametrize("left_behind", [0, 1, 2])
def test_blocks_left_behind_change_nothing(dtype: torch.dtype, left_behind: int) -> None:
    held = load_stored(open_transformer(TINY), Storage(left_behind=left_behind), dtype, "cpu")
    assert torch.equal(velocity(held), velocity(load_transformer(TINY, dtype=dtype)))


@BOTH
def test_fp8_is_what_a_converted_file_holds(dtype: torch.dtype, converted: Path) -> None:
    want = velocity(load_transformer(converted, dtype=dtype))
    opened = open_transformer(converted)
    assert holds_fp8(opened, "auto")
    assert not holds_fp8(opened, "full")
    assert not holds_fp8(open_transformer(TINY), "auto")
    for source in (opened, open_transformer(TINY)):
        held = load_stored(source, Storage(fp8=True, left_behind=1), dtype, "cpu")
        assert holds_matrices_in_fp8(held)
        # of the folder all else is float32, of the converted file bfloat16
        same = source is opened or dtype is torch.bfloat16
        assert float((velocity(held) - want).norm() / want.norm()) <= (0 if same else 0.01)


def test_fp8_takes_half_the_memory() -> None:
    opened = open_transformer(TINY)
    matrices = [
        module.weight.nbytes
        for network in (load_stored(opened, Storage(fp8=fp8), torch.bfloat16, "cpu") for fp8 in (False, True))
        for module in [network.transformer_blocks[0].attn.to_q]
    ]
    assert matrices[0] == 2 * matrices[1]


def test_only_what_is_not_left_behind_moves() -> None:
    network = load_stored(open_transformer(TINY), Storage(fp8=True, left_behind=1), torch.bfloat16, "cpu").to("meta")
    last = network.transformer_blocks[-1]
    behind = {name for name, p in network.named_parameters() if p.device.type == "cpu"}
    assert behind == {
        f"transformer_blocks.{len(network.transformer_blocks) - 1}.{name}.weight"
        for name, module in last.named_modules()
        if isinstance(module, StoredLinear)
    }
    assert {b.device.type for b in last.buffers()} == {"cpu"}
    assert [name for name, _ in last.attn.to_q.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("strengths", [(1.0,), (0.5, 0.5), (1.0, -1.0)])
def test_loras_are_rounded_to_fp8_once(strengths: tuple[float, ...], lora: Path, tmp_path: Path) -> None:
    opened, added = open_transformer(TINY), read_lora(lora)
    held, before = load_stored(opened, Storage(fp8=True), torch.float32, "cpu"), []
    for strength in strengths:
        with torch.no_grad():
            assert merge_into_stored(held, opened.weights, before, added, strength).matched == 3
        before.append((added, strength))
    merge(TINY, tmp_path / "merged.safetensors", [(lora, sum(strengths) or 1e-9)], dtype="fp8_scaled")
    want = open_transformer(tmp_path / "merged.safetensors").weights
    for name in ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.attn.to_k.weight"):
        module: Any = held.get_submodule(name.removesuffix(".weight"))
        got = module.dequantised(torch.device("cpu"), torch.float32)
        assert float((got - want.get(name)).abs().max()) <= float(module.scale) / 4


def test_a_lora_that_does_not_fit_changes_nothing(lora: Path, tmp_path: Path) -> None:
    opened = open_transformer(TINY)
    held = load_stored(opened, Storage(fp8=True), torch.float32, "cpu")
    before = velocity(held)
    save_lora(tmp_path / "other.safetensors", {"transformer_blocks.0.attn.to_q": (torch.ones(2, 7), torch.ones(7, 2))})
    with pytest.raises(LoRAError, match="does not fit"):
        merge_into_stored(held, opened.weights, [], read_lora(tmp_path / "other.safetensors"), 1.0)
    assert torch.equal(velocity(held), before)


@pytest.mark.parametrize(
    ("part", "value", "strength", "message"),
    [
        ("dora_scale", 1.0, -0.5, "strength of this LoRA should be above 0, got -0.5"),
        ("lora_B.weight", float("inf"), 1.0, "layer of transformer_blocks.1.attn.to_q.weight holds NaN or infinity"),
        ("alpha", float("nan"), 1.0, "layer of transformer_blocks.1.attn.to_q.weight holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("fp8", [True, False])
def test_a_last_layer_that_cannot_be_applied_changes_nothing(
    part: str, value: float, strength: float, message: str, fp8: bool
) -> None:
    tensors = {
        f"transformer_blocks.{block}.attn.to_q.lora_{side}.weight": torch.ones(size)
        for block in (0, 1)
        for side, size in (("A", (2, 64)), ("B", (64, 2)))
    }
    size = {"dora_scale": (64,), "alpha": ()}.get(part, (64, 2))
    tensors[f"transformer_blocks.1.attn.to_q.{part}"] = torch.full(size, value)
    lora, opened = build_lora(tensors, tensors.__getitem__, Path("mixed"), {}), open_transformer(TINY)
    held = load_stored(opened, Storage(fp8=True), torch.float32, "cpu") if fp8 else load_transformer(TINY)
    before = velocity(held)
    with pytest.raises(LoRAError, match=message):
        merge_into_stored(held, opened.weights, [], lora, strength) if fp8 else merge_lora(held, lora, strength)
    assert torch.equal(velocity(held), before)


def test_the_pipeline_in_fp8(lora: Path) -> None:
    def picture(pipe: UniPicPipeline) -> Tensor:
        made = pipe([], "a cat", width=64, height=64, num_inference_steps=2, true_cfg_scale=1, output_type="latent")
        images: Tensor = made.images
        return images

    pipe = UniPicPipeline.from_pretrained(TINY, torch_dtype=torch.float32, device="cpu", storage="fp8")
    full = UniPicPipeline.from_pretrained(TINY, torch_dtype=torch.float32, device="cpu", storage="full")
    plain, want = picture(pipe), picture(full)
    assert 0 < float((plain - want).norm() / want.norm()) < 0.05
    assert pipe.load_lora(lora).matched == full.load_lora(lora).matched == 3
    assert float((picture(pipe) - picture(full)).norm()) < float((picture(full) - want).norm())
    pipe.load_lora(lora, -1.0)
    assert torch.equal(picture(pipe), plain)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    loras = sorted((DEFAULT_MODEL / "loras").glob("*.safetensors"))
    arguments = ["--size", "64x64", "--steps", "2", "--device", "cpu", "--dtype", "bf16", "--storage", "fp8"]
    assert main(["compose", "-p", "a cat", "-o", str(out), *arguments, "--lora", str(loras[0])]) == 0
    assert out.is_file(), capsys.readouterr().err
