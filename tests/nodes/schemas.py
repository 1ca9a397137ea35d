"""Prints the nodes' schemas as JSON without ComfyUI: `comfy_api.latest.io` records, all else of ComfyUI's is hollow.

Run as a script, in a process of its own, since it fills sys.modules with what is not there. With --write it writes
locales/en/nodeDefs.json, which repeats the schemas for ComfyUI's page.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "node_helpers",
    "nodes",
    "latent_preview",
    "server",
}


class Hollow(type):
    """Metaclass of a class that has every attribute, may be subclassed and called: each gives the class again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __iter__(cls) -> Any:
        return iter(())


class Nothing(metaclass=Hollow):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class HollowModule(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in COMFYUI else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return HollowModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Recorded(dict[str, Any]):
    """What a schema's part was called with, its positional arguments under their usual names."""


class IOType:
    """io.X: its Input and Output record their arguments."""

    def __init__(self, name: str) -> None:
        self.name = name

    def Input(self, id: str | Recorded, **kwargs: Any) -> Recorded:
        if isinstance(id, Recorded):  # io.MultiType: a widget that takes wires of other types too
            return Recorded(id, types=[kind.name for kind in kwargs["types"]])
        return Recorded(type=self.name, id=id, **kwargs)

    def Output(self, id: str = "", **kwargs: Any) -> Recorded:
        return Recorded(type=self.name, id=id, **kwargs)

    def __call__(self, io_type: str) -> IOType:
        """io.Custom: a type of one's own."""
        return IOType(io_type)

    def TemplateNames(self, input: Recorded, names: list[str], min: int = 1) -> Recorded:
        return Recorded(input=input, names=names, min=min)


class IO:
    ComfyNode = type("ComfyNode", (), {"hidden": None})
    Hidden = SimpleNamespace(unique_id="unique_id", prompt="prompt", dynprompt="dynprompt")

    @staticmethod
    def Schema(**kwargs: Any) -> Recorded:
        return Recorded(kwargs)

    def __getattr__(self, name: str) -> IOType:
        return IOType(name)


def install() -> None:
    sys.meta_path.insert(0, Finder())
    latest: Any = importlib.import_module("comfy_api.latest")
    latest.io, latest.ComfyExtension = IO(), object
    folders: Any = importlib.import_module("folder_paths")
    folders.models_dir = "models"
    folders.get_filename_list = folders.get_folder_paths = lambda kind: []
    folders.add_model_folder_path = lambda *args: None


def schemas() -> list[Recorded]:
    """Of every node that the pack gives to ComfyUI."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    async def nodes() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return [node.define_schema() for node in asyncio.run(nodes())]


def english(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schemas' own words in the form of a nodeDefs.json."""
    return {
        schema["node_id"]: {
            "display_name": schema["display_name"],
            "description": schema["description"],
            "inputs": {
                i["id"]: {"name": i.get("display_name", i["id"]), "tooltip": i["tooltip"]} for i in schema["inputs"]
            },
            "outputs": {
                str(slot): {"name": output.get("display_name", output["type"].upper()), "tooltip": output["tooltip"]}
                for slot, output in enumerate(schema["outputs"])
            },
        }
        for schema in found
    }


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, Path(__file__).resolve().parent)]
    install()
    found = schemas()
    if "--write" in sys.argv:
        text = json.dumps(english(found), indent=2, ensure_ascii=False) + "\n"
        (ROOT / "locales" / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
    print(json.dumps(found))
