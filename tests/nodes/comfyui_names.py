"""Names of ComfyUI that the nodes use, and their definitions, both read from source without running it.

`python -m tests.nodes.comfyui_names COMFYUI` writes comfyui_names.json from a checkout.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".json")
PACKAGES = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "latent_preview",
    "node_helpers",
)


@dataclass(frozen=True)
class Use:
    """Use of a name, such as comfy.utils.ProgressBar. keywords: those of a call; positional: its other arguments."""

    name: str
    where: str
    keywords: tuple[str, ...] = ()
    positional: int = 0


def uses() -> list[Use]:
    """All uses in nodes/ and the pack's __init__.py."""
    files = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))]
    return [use for path in files for use in file_uses(path)]


def file_uses(path: Path) -> list[Use]:
    """Imported names, and attributes of imported modules, with the arguments of direct calls."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    where = str(path.relative_to(ROOT))
    bindings, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_comfyui(alias.name):
                    bindings[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
                    found.append(Use(alias.name, where))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and is_comfyui(node.module):
            for alias in node.names:
                bindings[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.append(Use(f"{node.module}.{alias.name}", where))
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        name = dotted(node, bindings)
        if name:
            call = called.get(id(node))
            given = [one for one in call.args if not isinstance(one, ast.Starred)] if call else []
            keywords = tuple(one.arg for one in call.keywords if one.arg) if call else ()
            found.append(Use(name, f"{where}:{getattr(node, 'lineno', 0)}", keywords, len(given)))
    return found


def is_comfyui(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def dotted(node: ast.AST, bindings: dict[str, str]) -> str | None:
    """comfy.utils.ProgressBar, of a name or an attribute chain that begins with an imported name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in bindings:
        return None
    return ".".join([bindings[node.id], *reversed(parts)])


Definition = dict[str, Any]
"""kind: module, class, function or value; parameters: names, if known; open: takes any arguments."""


class Source:
    """Definitions in a checkout of ComfyUI."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parsed = cache(lambda path: ast.parse(path.read_text(encoding="utf-8")))

    def file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        candidates = (path.with_suffix(".py"), path / "__init__.py")
        return next((one for one in candidates if one.is_file()), None)

    def define(self, name: str) -> Definition | None:
        """Definition of a name in its module; None if it does not exist. Members of it are not looked up."""
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            module = ".".join(parts[:count])
            if self.file(module) or self.root.joinpath(*parts[:count]).is_dir():
                if count == len(parts):
                    return {"kind": "module"}
                found = self.inside(module, parts[count])
                return {"kind": f"member of a {found['kind']}"} if found and count + 1 < len(parts) else found
        return None

    def inside(self, module: str, name: str) -> Definition | None:
        """Definition of `name` in a module, through its imports."""
        path = self.file(module)
        if path is None:
            return None
        for node in top_level(self.parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return {"kind": "function", **parameters(node)}
            if isinstance(node, ast.ClassDef) and node.name == name:
                starts = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
                return {"kind": "class", **(parameters(starts[0], method=True) if starts else {})}
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return {"kind": "value"}
            if isinstance(node, ast.ImportFrom):
                found = self.imported(module, path, node, name)
                if found:
                    return found
        return None

    def imported(self, module: str, path: Path, node: ast.ImportFrom, name: str) -> Definition | None:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return self.define(f"{source}.{alias.name}") if is_comfyui(source) else {"kind": "value"}
        return None


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, also those inside if, try and with."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting[:0] = [one for one in ast.iter_child_nodes(node) if isinstance(one, ast.stmt)]


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool = False) -> Definition:
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)][method:]
    keyword_only = [one.arg for one in node.args.kwonlyargs]
    is_open = node.args.kwarg is not None or node.args.vararg is not None
    return {"parameters": names, "keyword_only": keyword_only, "open": is_open}


def recorded() -> dict[str, Definition]:
    """Definitions of comfyui_names.json."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["names"]


def main() -> None:
    root = Path(sys.argv[1])
    source, names = Source(root), sorted({use.name for use in uses()})
    found = {name: source.define(name) for name in names}
    missing = [name for name, definition in found.items() if definition is None]
    if missing:
        raise SystemExit(f"not in this ComfyUI: {', '.join(missing)}")
    version = (root / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(definition)}" for name, definition in found.items())
    RECORD.write_text(f'{{"comfyui": "{version}", "names": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{len(found)} names of ComfyUI {version}")


if __name__ == "__main__":
    main()
