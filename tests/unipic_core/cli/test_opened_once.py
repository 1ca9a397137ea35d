"""One compose opens each weight file's header once and converts each picture once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unipic_core.cli import main
from unipic_core.conditioning import images
from unipic_core.weights.formats import safetensors_file
from unipic_core.weights.lora import save_lora


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file was read, by name of its folder and file."""
    count: Counter[str] = Counter()
    code = safetensors_file.read_safetensors

    def counted(path: Path) -> Any:
        count[f"{path.parent.name}/{path.name}"] += 1
        return code(path)

    for module in (safetensors_file, *_importers("read_safetensors", code)):
        monkeypatch.setattr(module, "read_safetensors", counted)
    return count


def _importers(name: str, function: Any) -> list[Any]:
    """Loaded modules that imported the function by name."""

    return [
        m for key, m in list(sys.modules.items()) if key.startswith("unipic_core") and vars(m).get(name) is function
    ]


def test_a_compose_with_a_lora(
    golden: Path, tmp_path: Path, headers: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_lora(lora, {"img_in": (torch.ones(2, 16), torch.ones(64, 2))})
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(pictures):
        Image.new("RGBA", (40, 40), (80 * i, 0, 0, 128)).save(path)
    converted: list[Any] = []
    by_bands = images._by_bands
    monkeypatch.setattr(images, "_by_bands", lambda image, *rest: converted.append(image) or by_bands(image, *rest))
    place = ["--model", golden / "tiny", "--lora", lora, "--size", "32x32", "--reference-budget", "64", "--steps", "1"]
    arguments = ["compose", *pictures, "--prompt", "a cat", *place, "--device", "cpu", "--out", tmp_path / "out.png"]
    assert main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "out.png").is_file()
    assert len(headers) == 4, "network, encoder, VAE and LoRA"
    assert set(headers.values()) == {1}, headers
    assert len(converted) == 3
