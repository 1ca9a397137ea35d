"""These tests run in a process of their own, started by tests/nodes/test_inside_comfyui.py; else they are left out.

By hand: COMFYUI_PATH=... UNIPIC_INSIDE_COMFYUI=1 python -m pytest tests/nodes/inside --confcutdir tests/nodes/inside
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INSIDE = bool(os.environ.get("UNIPIC_INSIDE_COMFYUI"))
collect_ignore_glob = [] if INSIDE else ["*"]

if INSIDE:
    sys.path[:0] = [str(HERE), str(HERE.parent)]  # helpers: ComfyUI has a package `tests`, so ours is not importable
    import tempfile

    import comfyui

    BASE = Path(tempfile.mkdtemp(prefix="unipic-comfyui-"))
    path = comfyui.comfyui_path()
    assert path is not None, "set COMFYUI_PATH to a ComfyUI checkout"
    comfyui.prepare(path, BASE)
    comfyui.load_pack()


@pytest.fixture(scope="session")
def golden() -> Path:
    return HERE.parents[1] / "golden"


@pytest.fixture(scope="session")
def nano() -> Path:
    return HERE.parents[2] / "unipic_core" / "models" / "unipic-nano"


@pytest.fixture(scope="session")
def pipeline(golden):
    """The reference implementation, of another copy of the core: give it plain tensors and pictures."""
    root = str(golden.parents[1])
    if root not in sys.path:
        sys.path.append(root)  # behind ComfyUI, whose own `nodes` must come first
    return importlib.import_module("unipic_core.pipeline")


@pytest.fixture(scope="module")
def tiny(golden):
    """(clip, vae) of the golden model, for Multi-Image Compose."""
    from unipic_pack.nodes.host.pictures.vae import load_vae
    from unipic_pack.nodes.host.text.encoder import load_clip

    return load_clip(golden / "tiny"), load_vae(golden / "tiny")


@pytest.fixture
def fresh():
    """Empty caches of encodings."""
    from unipic_pack.nodes.host import composition

    composition.clear_caches()


@pytest.fixture(scope="module")
def nano_model(nano):
    """The bundled nano's MODEL."""
    from unipic_pack.nodes.host.model.loading import load_model

    return load_model(nano)


@pytest.fixture(scope="module")
def causal_folders(nano, tmp_path_factory):
    """By form: the nano, as if its weights had been trained in it."""
    folders = {}
    for form in ("reference_causal", "prefix_causal"):
        folders[form] = shutil.copytree(nano, tmp_path_factory.mktemp(form) / "nano")
        config = folders[form] / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_form": form}))
    return folders


@pytest.fixture(scope="module")
def causal_models(causal_folders):
    """By form: the MODEL of such a folder."""
    from unipic_pack.nodes.host.model.loading import load_model

    return {form: load_model(folder) for form, folder in causal_folders.items()}


@pytest.fixture(scope="session")
def causal_lora(nano, tmp_path_factory) -> Path:
    """A LoRA file for the bundled nano with the recipe of few steps and a causal form, of small random weights."""
    import torch
    from unipic_pack.unipic_core.weights.lora import save_lora
    from unipic_pack.unipic_core.weights.recipe import Recipe
    from unipic_pack.unipic_core.weights.transformer import open_transformer

    rng, width = torch.Generator().manual_seed(0), open_transformer(nano).config.width
    names = [f"transformer_blocks.{block}.attn.to_{part}" for block in range(2) for part in "qkv"]
    layers = {name: (torch.randn(4, width, generator=rng), torch.randn(width, 4, generator=rng) / 50) for name in names}
    recipe = Recipe(steps=8, guidance=1.0, sampler="consistency", schedule="few_step", attention_form="prefix_causal")
    file = tmp_path_factory.mktemp("loras") / "causal.safetensors"
    save_lora(file, layers, recipe=recipe)
    return file


@pytest.fixture
def inference():
    """As ComfyUI's executor runs nodes."""
    import torch

    with torch.inference_mode():
        yield
