"""Find a ComfyUI and make it importable in this process: on the CPU, and without torchvision's compiled operators."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACK = "unipic_pack"
CASES = sorted(path.name for path in (ROOT / "tests" / "golden" / "cases").iterdir())
"""Names of the golden cases."""


def comfyui_path() -> Path | None:
    """COMFYUI_PATH, or the ComfyUI in whose custom_nodes/ this checkout lies."""
    candidates = [os.environ.get("COMFYUI_PATH", "")]
    if ROOT.parent.name == "custom_nodes":
        candidates.append(str(ROOT.parent.parent))
    return next((Path(c) for c in candidates if c and (Path(c) / "comfy" / "model_base.py").is_file()), None)


def prepare(path: Path, base: Path) -> None:
    """ComfyUI's folder first on the path, its models, input and output under `base`. Call before anything of comfy."""
    define_torchvision_operators()
    give_example(path, base)
    sys.path[:] = [str(path), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.disable_api_nodes = True


def give_example(path: Path, base: Path) -> None:
    """Put the picture that ComfyUI comes with into the input folder under `base`."""
    (base / "input").mkdir(exist_ok=True)
    shutil.copy(path / "input" / "example.png", base / "input")


def define_torchvision_operators() -> None:
    """torchvision has no CPU build for this torch; its Python half imports once these two are declared."""
    import torch

    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # a torchvision with its compiled half has them
        return
    sys.modules.setdefault("_unipic_torchvision", ModuleType("_unipic_torchvision")).library = library  # keep it alive


def load_pack() -> ModuleType:
    """The pack by path, as ComfyUI loads it, under the name `unipic_pack`."""
    if PACK in sys.modules:
        return sys.modules[PACK]
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
