"""A LoRA to merge, and an empty folder for what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.unipic_core.weights.merge.small_loras import SOURCE, STUDENT, make_lora


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(SOURCE)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    make_lora(folder / "student.safetensors", 1, STUDENT)
    return folder / "student.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
