"""Who may import whom, read from the syntax trees; no circles, no crowded rooms (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

CORE = ROOT / "unipic_core"
PACKAGES = ("unipic_core", "nodes", "trainers")
MOST_FILES = 16
CORE_NEEDS = {"torch", "numpy", "PIL", "safetensors"}
ROOM_NEEDS = {"pipeline": CORE_NEEDS | {"transformers"}, "cli": CORE_NEEDS | {"transformers", "tqdm"}}
"""Packages that a room of the core may import beyond Python's own; the other rooms: CORE_NEEDS."""
QUICK = [f"cli/{name}.py" for name in ("commands", "arguments", "argument_types", "terminal")]
"""Files of the command line that --help needs; with Python's own packages and each other alone it is there at once."""
QUICK_IMPORTS = (
    *(f"unipic_core.{file.removesuffix('.py').replace('/', '.')}" for file in QUICK),
    *("unipic_core.__version__", "unipic_core.MODELS", "unipic_core.errors"),
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sources(package)}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module or name, whether it is imported when the file is, type-only imports included)."""
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
            for alias in node.names:
                yield f"{name}.{alias.name}", eager


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports at module level: the deepest file that each name leads to."""
    found = set()
    for name, eager in imports(path):
        parent = name.rpartition(".")[0]
        module = name if name in MODULES else parent
        if eager and module in MODULES and MODULES[module] != path:
            found.add(module)
    return found


def foreign(name: str) -> str | None:
    """Top-level package, unless it is Python's own."""
    top = name.partition(".")[0]
    return None if top in sys.stdlib_module_names else top


def test_no_two_files_import_each_other_in_a_circle() -> None:
    lazy = {"unipic_core"}  # its imports are for type checkers alone, and are made when a name is asked for
    assert_no_circle({name: set() if name in lazy else imported_modules(path) for name, path in MODULES.items()})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_rooms_import_each_other_in_a_circle(package: str) -> None:
    """A room: a folder directly below the package."""
    graph: dict[str, set[str]] = {}
    for path in sources(package):
        room = path.relative_to(ROOT / package).parts[0]
        used = {module.split(".")[1] for module in imported_modules(path) if module.startswith(f"{package}.")}
        graph.setdefault(room.removesuffix(".py"), set()).update(used - {room.removesuffix(".py")})
    assert_no_circle(graph)


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_is_crowded(package: str) -> None:
    for folder in (ROOT / package, *(p for p in (ROOT / package).rglob("*") if p.is_dir())):
        files = sorted(path.name for path in folder.glob("*.py"))
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} files; split it: {files}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_stands_in_the_drawing(package: str) -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    rooms = {path.parent for path in sources(package)} - {ROOT / package}
    absent = sorted(room.relative_to(ROOT).as_posix() for room in rooms if f" {room.name}/ " not in tree)
    assert not absent, f"docs/architecture.md does not name {absent}"


@pytest.mark.parametrize("path", sources("unipic_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports(path: Path) -> None:
    room = path.relative_to(CORE).parts[0]
    for name, eager in imports(path):
        top = foreign(name)
        allowed = ROOM_NEEDS.get(room, CORE_NEEDS)
        assert top is None or top == "unipic_core" or top in allowed, f"{path.name} may not import {name}"
        if room not in ("pipeline", "cli", "__init__.py", "__main__.py"):
            assert not name.startswith(("unipic_core.pipeline", "unipic_core.cli")), f"{path.name} imports {name}"
        if path.relative_to(CORE).as_posix() in QUICK and eager:
            assert top is None or name.startswith(QUICK_IMPORTS), name


@pytest.mark.parametrize("path", sources("nodes"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nodes_use_the_core_but_never_the_pipeline(path: Path) -> None:
    for name, _ in imports(path):
        assert not {"pipeline", "cli"} & set(name.split(".")), f"{path.name} may not import {name}"
        assert foreign(name) not in {"transformers", "diffusers", "accelerate", "peft", "trainers"}, (
            f"{path.name}: {name}"
        )


def test_nobody_imports_nodes_or_trainers() -> None:
    for folder, forbidden in (("unipic_core", {"nodes", "trainers"}), ("nodes", {"trainers"}), ("trainers", {"nodes"})):
        for path in sources(folder):
            for name, _ in imports(path):
                assert name.partition(".")[0] not in forbidden, f"{path} may not import {name}"


def test_the_core_imports_without_transformers_diffusers_or_torchvision() -> None:
    modules = [
        name
        for name, path in MODULES.items()
        if CORE in path.parents and not {"pipeline", "cli", "__main__"} & set(name.split("."))
    ]
    assert len(modules) > 30
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
