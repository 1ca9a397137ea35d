"""The released sizes end to end: a model folder whose weight files have the real headers and no content on the disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import TINY
from unipic_core.cli import main
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.pipeline.loading import OpenedPipeline, open_pipeline
from unipic_core.pipeline.memory_plan import plan_memory
from unipic_core.weights.convert import encode_tensors, output_layout, stored_tensors
from unipic_core.weights.describe import describe
from unipic_core.weights.formats.safetensors_file import safetensors_header
from unipic_core.weights.lora import read_lora, save_lora
from unipic_core.weights.transformer import expected_shapes, load_transformer, open_transformer
from unipic_core.weights.vae import video_shapes

GIB = 2**30
RELEASED = MMDiTConfig()


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A bf16 safetensors file of its full size with nothing but the header written; skips where that takes disk."""
    described = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    header, _, size = safetensors_header(described, {"format": "pt"})
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(1 << 26)
        if f.flush() or path.stat().st_blocks * 512 > 1 << 25:
            pytest.skip(f"the filesystem of {path.parent} has no sparse files")
        try:
            f.truncate(size)
        except OSError as error:
            pytest.skip(f"the filesystem of {path.parent} has no files of {size} bytes: {error}")


def encoder(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Qwen2.5-VL-7B's config in the layout of the tiny one's, and its parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {**config["text_config"]["rope_parameters"], "mrope_section": [16, 24, 24]}
    text = {**config["text_config"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": rope}
    text |= {"layer_types": ["full_attention"] * 28, "max_window_layers": 28}
    vision = {**config["vision_config"], "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
    made = {**config, "text_config": text, "vision_config": {**vision, "out_hidden_size": 3584}}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**made))
    return made, {name: tuple(w.shape) for name, w in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("released") / "Unipic3-DMD")
    stem = "diffusion_pytorch_model.safetensors"
    sparse(folder / "transformer" / stem, expected_shapes(RELEASED))
    (folder / "transformer" / "config.json").write_text(json.dumps(RELEASED.to_dict()))
    with torch.device("meta"):
        vae = ImageVAE(VAEConfig())
    sparse(folder / "vae" / stem, video_shapes(vae))
    (folder / "vae" / "config.json").write_text(json.dumps(vae.config.to_dict()))
    config, shapes = encoder(json.loads((folder / "text_encoder" / "config.json").read_text()))
    sparse(folder / "text_encoder" / "model.safetensors", shapes)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenedPipeline:
    return open_pipeline(folder)


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = describe(folder)
    assert table["missing"] == []
    network = table["parts"]["transformer"]
    assert (network["layers"], network["width"], network["heads"]) == (60, 3072, 24)
    assert network["parameters"] == pytest.approx(20.4e9, rel=0.01)
    assert table["parts"]["text_encoder"]["parameters"] == pytest.approx(8.3e9, rel=0.01)
    assert main(["info", str(folder)]) == 0
    assert "60 layers, width 3072, 24 heads of 128, 20.4 billion parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fp8", "gib", "left_behind"), [(False, 39, 7), (False, 31, 20), (False, 23.5, 32), (True, 31, 0), (True, 23.5, 0)]
)
def test_the_plan_for_smaller_cards(opened: OpenedPipeline, fp8: bool, gib: float, left_behind: int) -> None:
    """As many blocks as do not fit, and two whose room the copied ones take in turns."""
    sizes, free = opened.sizes(torch.bfloat16, fp8), int(gib * GIB)
    assert sizes.parts["network"] == pytest.approx(40.9e9 / (2 if fp8 else 1), rel=0.03)
    plan = plan_memory(torch.device("cuda"), sizes, lambda device: (free, free), lambda: 10**11)
    assert (plan.turns, plan.left_behind) == (True, left_behind)


def test_the_network_loads_on_meta(opened: OpenedPipeline) -> None:
    start = time.perf_counter()
    network = load_transformer(opened.model, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in network.parameters()) == opened.model.parameters
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert time.perf_counter() - start < 20, "nothing of 41 GB is read"


def test_a_lora_matches(opened: OpenedPipeline, tmp_path: Path) -> None:
    down, up = torch.ones(1, 3072), torch.ones(3072, 1)
    names = [f"transformer_blocks.{i}.attn.{name}" for i in range(60) for name in ("to_q", "to_out.0", "add_k_proj")]
    save_lora(tmp_path / "lora.safetensors", dict.fromkeys(names, (down, up)))
    assert read_lora(tmp_path / "lora.safetensors").fit(opened.model.weights.shapes()).report.matched == 180


@pytest.mark.parametrize("dtype", ["bf16", "fp8_scaled"])
def test_a_block_converts(opened: OpenedPipeline, dtype: str) -> None:
    weights, config = opened.model.weights, opened.model.config
    layout = output_layout(expected_shapes(config), config, dtype)
    size = safetensors_header(layout, {})[2]
    assert size == pytest.approx(40.9e9 if dtype == "bf16" else 20.6e9, rel=0.01)
    block = "transformer_blocks.59."
    names = [name for name in weights if name.startswith(block) and ".txt_m" not in name]
    written = dict.fromkeys(name for name in layout if name.startswith(block) and ".txt_m" not in name)
    for name, tensor in encode_tensors(stored_tensors(weights, names), layout):
        assert (tensor.dtype, tuple(tensor.shape)) == layout[name]
        del written[name]
    assert not written


def test_the_command_line_refuses_before_it_reads(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unipic_core.pipeline.memory_plan.main_memory", lambda: 48 * 10**9)
    arguments = ["--prompt", "a cat", "--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "out.png")]
    start = time.perf_counter()
    assert main(["compose", *arguments]) == 2
    assert "112.9 GB of main memory, this machine has 48.0 GB" in capsys.readouterr().err
    assert time.perf_counter() - start < 30


def test_another_index_and_single_files(folder: Path, tmp_path: Path) -> None:
    """The same network as one file without a config, whose sizes come from the shapes."""
    file = tmp_path / "unipic3_dmd.safetensors"
    sparse(file, {f"model.diffusion_model.{name}": shape for name, shape in expected_shapes(RELEASED).items()})
    alone = open_transformer(file)
    assert alone.config == RELEASED
    assert alone.recipe.steps == 8
