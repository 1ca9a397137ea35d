"""Every file that convert, merge and ComfyUI's saving nodes write loads again, with attention form and recipe."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from causal_tools import run as sampled
from comfy_extras.nodes_model_merging import CheckpointSave, CLIPSave, ModelSave, VAESave
from model_tools import random_inputs, relative, velocity
from quantised_files import stock_loader
from safetensors import safe_open
from torch import Tensor
from unipic_pack.nodes.host import model_paths as sources
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.load import LoadUniPic
from unipic_pack.nodes.lora import add_lora, read_lora
from unipic_pack.unipic_core.weights.convert import convert
from unipic_pack.unipic_core.weights.merge import merge
from unipic_pack.unipic_core.weights.transformer import open_transformer

torch.set_num_threads(1)
NANO = sources.DEFAULT_MODEL


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty models and output folders of ComfyUI's, for each test."""
    table = dict(folder_paths.folder_names_and_paths)
    for kind in ("diffusion_models", "text_encoders", "vae", "diffusers", "unipic", "embeddings"):
        table[kind] = ([str(tmp_path / kind)], table.get(kind, ([], set()))[1])
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a causal form is unipic's alone
        yield tmp_path


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return LoadUniPic.execute(NANO, "auto", "auto", "as stored").result


@pytest.fixture(scope="module")
def causal(parts: tuple[Any, Any, Any], causal_lora: Path) -> Any:
    with torch.inference_mode():
        return add_lora(parts[0], read_lora(causal_lora), 1.0)[0]


def saved(node: Any, *arguments: Any) -> Path:
    """The file that a saving node writes."""
    before = set(Path(folder_paths.get_output_directory()).rglob("*.safetensors"))
    node().save(*arguments, "saved/file")
    [file] = set(Path(folder_paths.get_output_directory()).rglob("*.safetensors")) - before
    return file


WRITERS: dict[str, Callable[[Path, Path, Any, tuple[Any, Any, Any]], Path]] = {
    "convert fp32": lambda nano, d, m, p: convert(nano, d / "c.safetensors", dtype="fp32"),
    "convert bf16": lambda nano, d, m, p: convert(nano, d / "c.safetensors"),
    "convert fp8": lambda nano, d, m, p: convert(nano, d / "c.safetensors", dtype="fp8_scaled"),
    "ModelSave": lambda nano, d, m, p: saved(ModelSave, m),
    "CheckpointSave": lambda nano, d, m, p: saved(CheckpointSave, m, p[1], p[2]),
    "convert of ModelSave": lambda nano, d, m, p: convert(saved(ModelSave, m), d / "c.safetensors"),
    "convert of CheckpointSave": lambda nano, d, m, p: convert(
        saved(CheckpointSave, m, p[1], p[2]), d / "c.safetensors"
    ),
}
MOST = {"convert fp8": 0.1}
"""Relative error of the velocity by what the file is rounded to; 0.02 for bf16."""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_network_comes_back(
    writer: str, nano: Path, tmp_path: Path, parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parts[0]
    file = WRITERS[writer](nano, tmp_path, model, parts)
    shutil.copy(file, tmp_path / "diffusion_models" / "mine.safetensors")
    again, *_ = LoadUniPic.execute("mine.safetensors", NANO, NANO, "as stored").result
    x, text, references = random_inputs()
    references = [z[..., :4, :4] for z in references]
    want = velocity(model, x, 0.5, text, references)
    assert relative(velocity(again, x, 0.5, text, references), want) < MOST.get(writer, 0.02)
    kept, live = attachment_of(again).recipe, attachment_of(model).recipe
    assert (kept.steps, kept.sampler, kept.guidance) == (live.steps, live.sampler, live.guidance)
    assert open_transformer(file).config == open_transformer(nano).config
    stock = stock_loader(monkeypatch, open_transformer(nano).config)(str(file))
    assert relative(velocity(stock, x, 0.5, text, references), want) < MOST.get(writer, 0.02)


@pytest.mark.parametrize(
    "writer", ["merge to a file", "merge to a folder", "ModelSave", "CheckpointSave", "convert of ModelSave"]
)
def test_a_causal_lora_keeps_form_and_recipe(
    writer: str, nano: Path, tmp_path: Path, parts: tuple[Any, Any, Any], causal: Any, causal_lora: Path
) -> None:
    if writer.startswith("merge"):
        file = tmp_path / ("m.safetensors" if writer == "merge to a file" else "m")
        merge(nano, file, [(causal_lora, 1.0)], dtype="fp32")
    else:
        file = WRITERS[writer](nano, tmp_path, causal, parts)
    again = load_model(file)
    assert again.model.diffusion_model.config.attention_form == "prefix_causal"
    assert open_transformer(file).recipe.attention_form == "prefix_causal"
    kept, live = attachment_of(again).recipe, attachment_of(causal).recipe
    assert (kept.steps, kept.sampler, kept.guidance) == (live.steps, live.sampler, live.guidance)
    assert relative(sampled(again), sampled(causal)) < (0.03 if writer.startswith("convert") else 2e-3)


def encoded(clip: Any) -> Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize("a red ball"))[0][0]


def test_an_encoder_comes_back(models_folder: Path, parts: tuple[Any, Any, Any]) -> None:
    shutil.copy(saved(CLIPSave, parts[1]), models_folder / "text_encoders" / "mine.safetensors")
    _, clip, _ = LoadUniPic.execute(NANO, "mine.safetensors", "auto", "as stored").result
    assert torch.equal(encoded(clip), encoded(parts[1]))


def test_a_vae_comes_back(models_folder: Path, parts: tuple[Any, Any, Any]) -> None:
    shutil.copy(saved(VAESave, parts[2]), models_folder / "vae" / "mine.safetensors")
    _, _, vae = LoadUniPic.execute(NANO, "auto", "mine.safetensors", "as stored").result
    z = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.decode(z), parts[2].decode(z))
    with safe_open(models_folder / "vae" / "mine.safetensors", "pt") as tensors:
        assert len(tensors.get_slice("decoder.conv1.weight").get_shape()) == 5  # as ComfyUI's network has it


def test_a_checkpoint_brings_its_encoder_and_vae(models_folder: Path, parts: tuple[Any, Any, Any]) -> None:
    shutil.copy(saved(CheckpointSave, *parts), models_folder / "diffusion_models" / "mine.safetensors")
    model, clip, vae = LoadUniPic.execute("mine.safetensors", "auto", "auto", "as stored").result
    assert relative(sampled(model), sampled(parts[0])) < 2e-3
    assert torch.equal(encoded(clip), encoded(parts[1]))
    z = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.decode(z), parts[2].decode(z))


def test_zero_cond_t_of_convert_loads_in_the_stock_network(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(nano / "transformer", tmp_path / "t", copy_function=shutil.copy)
    config = json.loads((folder / "config.json").read_text()) | {"zero_cond_t": True}
    (folder / "config.json").write_text(json.dumps(config))
    file = convert(folder, tmp_path / "z.safetensors", dtype="fp32")
    stock = stock_loader(monkeypatch, open_transformer(nano).config)(str(file))
    assert stock.model.diffusion_model.default_ref_method == "index_timestep_zero"
    x, text, references = random_inputs()
    references = [z[..., :4, :4] for z in references]
    ours = velocity(load_model(file), x, 0.5, text, references)
    assert relative(velocity(stock, x, 0.5, text, references), ours) < 0.02
