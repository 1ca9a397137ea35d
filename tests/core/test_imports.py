"""Who may import whom (syntax trees): the core needs torch, numpy, Pillow and safetensors only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "unipic_core"
CORE_NEEDS = {"torch", "numpy", "PIL", "safetensors"}
PIPELINE_NEEDS = CORE_NEEDS | {"transformers"}
CLI_NEEDS = PIPELINE_NEEDS | {"tqdm"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it is imported when the file is) of every import."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        eager = node not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield name, eager
            yield from ((f"{name}.{alias.name}", eager) for alias in node.names)


def foreign(name: str) -> str | None:
    """Top-level package, unless it is Python's own."""
    top = name.partition(".")[0]
    return None if top in sys.stdlib_module_names else top


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py")) if (ROOT / folder).is_dir() else []


@pytest.mark.parametrize("path", sources("unipic_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core(path: Path) -> None:
    in_pipeline, is_cli = CORE / "pipeline" in path.parents, path.name == "cli.py"
    allowed = CLI_NEEDS if is_cli else PIPELINE_NEEDS if in_pipeline else CORE_NEEDS
    for name, eager in imports(path):
        top = foreign(name)
        assert top is None or top == "unipic_core" or top in allowed, f"{path.name} may not import {name}"
        if not in_pipeline and not is_cli:
            assert not name.startswith("unipic_core.pipeline"), f"{path.name} may not import the pipeline"
        if is_cli and eager:
            assert (
                top is None
                or name.startswith(("unipic_core.errors", "unipic_core.__version__"))
                or name == "unipic_core"
            )


@pytest.mark.parametrize("path", sources("nodes"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nodes_use_the_core_but_never_the_pipeline(path: Path) -> None:
    for name, _ in imports(path):
        assert "pipeline" not in name.split("."), f"{path.name} may not import {name}"
        assert foreign(name) not in {"transformers", "diffusers", "accelerate", "peft", "trainers"}, (
            f"{path.name}: {name}"
        )


def test_nobody_imports_nodes_or_trainers() -> None:
    for folder, forbidden in (("unipic_core", {"nodes", "trainers"}), ("nodes", {"trainers"}), ("trainers", {"nodes"})):
        for path in sources(folder):
            for name, _ in imports(path):
                assert name.partition(".")[0] not in forbidden, f"{path} may not import {name}"


def test_the_core_imports_without_transformers_diffusers_or_torchvision() -> None:
    modules = [f"unipic_core.{p.stem}" for p in sorted(CORE.glob("*.py")) if not p.stem.startswith("__")]
    code = (
        "import sys, importlib\n"
        "for name in ('transformers', 'diffusers', 'torchvision', 'peft', 'tqdm'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_needs_no_torch() -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom unipic_core.cli import main\nmain(['compose', '--help'])\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "--reference-budget" in done.stdout
