"""These tests run in a process of their own, started by tests/nodes/test_inside_comfyui.py; else they are left out.

By hand: COMFYUI_PATH=... UNIPIC_INSIDE_COMFYUI=1 python -m pytest tests/nodes/inside --confcutdir tests/nodes/inside
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INSIDE = bool(os.environ.get("UNIPIC_INSIDE_COMFYUI"))
collect_ignore_glob = [] if INSIDE else ["test_*.py"]

if INSIDE:
    sys.path.insert(0, str(HERE.parent))
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
        sys.path.append(root)  # behind ComfyUI, whose own `nodes` must be found first
    return importlib.import_module("unipic_core.pipeline")


@pytest.fixture(scope="module")
def nano_model(nano):
    """The bundled nano's MODEL."""
    from unipic_pack.nodes.model import load_model

    return load_model(nano)


@pytest.fixture
def inference():
    """As ComfyUI's executor runs nodes."""
    import torch

    with torch.inference_mode():
        yield
