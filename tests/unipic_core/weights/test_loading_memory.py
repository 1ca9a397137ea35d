"""Peak memory while parts load, against the size of their files: there is never a second copy of the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import ROOT
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.weights.transformer import expected_shapes
from unipic_core.weights.vae import video_shapes
from unipic_core.weights.write import write_safetensors

MEASURE = """
import ctypes
import gc
import sys
import torch
from pathlib import Path
from unipic_core.weights.transformer import load_transformer
from unipic_core.pipeline import VAE, TextEncoder, UniPicPipeline
from unipic_core.weights.vae import load_image_vae

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024

def touched(module):
    for p in module.parameters():
        p.detach().reshape(-1)[::512].sum()  # every page, also of what is only mapped
    return module

def settle():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for reuse is in `before` and would hide from the peak

bf16 = torch.bfloat16
LOAD = {
    "transformer": lambda folder: touched(load_transformer(folder, dtype=bf16)),
    "transformer in float32": lambda folder: touched(load_transformer(folder, dtype=torch.float32)),
    "vae": lambda folder: touched(load_image_vae(folder / "vae", bf16)),
    "text_encoder": lambda folder: touched(TextEncoder.from_pretrained(folder, bf16).model),
    "pipeline": lambda folder: UniPicPipeline.from_pretrained(folder, torch_dtype=bf16, device="cpu"),
}
torch.set_num_threads(1)
tiny, large = map(Path, sys.argv[1:])
for load in LOAD.values():
    load(tiny)
for name, load in LOAD.items():
    settle()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    loaded = load(large)
    print(name, status("VmHWM") - before, sep=":")
    del loaded
"""


def write(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], stem: str) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.full(shape, 0.25, dtype=torch.bfloat16)

    described = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_safetensors(folder / f"{stem}.safetensors", described, tensors(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def encoder_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    text |= {"rope_parameters": {**text["rope_parameters"], "mrope_section": [16, 24, 24]}, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 12}
    return {**config, "text_config": text, "vision_config": {**config["vision_config"], "out_hidden_size": 512}}


def encoder_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    return {name: tuple(w.shape) for name, w in model.state_dict().items()}


@pytest.fixture(scope="module")
def large(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about half a gigabyte in bfloat16."""
    folder = shutil.copytree(golden / "tiny", tmp_path_factory.mktemp("large") / "model")
    stem = "diffusion_pytorch_model"
    network = MMDiTConfig(num_layers=6, num_attention_heads=4, joint_attention_dim=512)
    write(folder / "transformer", expected_shapes(network), network.to_dict(), stem)
    with torch.device("meta"):
        vae = ImageVAE(VAEConfig())
    write(folder / "vae", video_shapes(vae), vae.config.to_dict(), stem)
    encoder = encoder_config(folder / "text_encoder")
    write(folder / "text_encoder", encoder_shapes(encoder), encoder, "model")
    return folder


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_makes_no_second_copy(large: Path, golden: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(golden / "tiny"), str(large)]
    # glibc would keep freed blocks of this size (not those of a 20B network), and they would be counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = {name: int(peak) for name, peak in (line.split(":") for line in done.stdout.splitlines())}
    network, encoder, vae = (stored(large / part) for part in ("transformer", "text_encoder", "vae"))
    assert min(network, encoder, vae) > 90e6
    sizes = {
        "transformer": network,
        "transformer in float32": 2 * network,
        "vae": vae // 3,  # a third of the video kernels stays, and nearly all weights are kernels
        "text_encoder": encoder,
        "pipeline": network + encoder + vae // 3,
    }
    for name, size in sizes.items():
        assert peaks[name] < 1.25 * size + 8e6, (name, peaks[name], size)
    assert peaks["transformer"] > 0.9 * network  # what is measured is really loaded
    assert peaks["text_encoder"] > 0.9 * encoder
