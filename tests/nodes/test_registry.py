"""What surrounds the nodes: registry metadata, requirements, help pages, translations, shipped workflows."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.nodes.schemas import english
from tests.paths import ROOT
from unipic_core.run.kv_cache import REUSE_WITHIN
from workflows import build
from workflows.kinds import KINDS

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

CHINESE = re.compile("[一-鿿]")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines(path: Path) -> list[str]:
    text = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in text if line and not line.startswith("#")]


def test_requirements_are_in_step(pyproject) -> None:
    """The same packages; without versions, so that no installer replaces ComfyUI's torch."""
    names = [re.split("[<>=!~ ]", dependency)[0] for dependency in pyproject["project"]["dependencies"]]
    assert lines(ROOT / "requirements.txt") == names


def test_registry_metadata(pyproject) -> None:
    comfy = pyproject["tool"]["comfy"]
    assert re.fullmatch("[a-z][a-z0-9-]+", comfy["PublisherId"])
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert all((ROOT / name).is_dir() for name in comfy["includes"])
    for model in comfy["Models"]:
        assert model["location"].startswith("/")
        assert model["model_url"].startswith("https://huggingface.co/")
    version = (ROOT / comfy["version"]["path"]).read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', version, re.MULTILINE)


def test_icon_and_banner(pyproject) -> None:
    """The registry wants the address of a square icon of at most 400 x 400, and of a banner of 21:9."""
    repository = pyproject["project"]["urls"]["Repository"]
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    files = []
    for name in ("Icon", "Banner"):
        address = pyproject["tool"]["comfy"][name]
        assert address.startswith(raw)
        files.append(ROOT / address.removeprefix(raw))
    icon, banner = (ElementTree.parse(file).getroot() for file in files)
    assert icon.get("width") == icon.get("height")
    assert int(icon.get("width")) <= 400
    assert int(banner.get("width")) * 9 == int(banner.get("height")) * 21


def test_the_archive_holds_the_licence_of_the_pictures() -> None:
    """The registry leaves out what .comfyignore names, so a licence that lies only there would not come along."""
    left_out = tuple(lines(ROOT / ".comfyignore"))
    named = re.findall(r"[\w/]+/NOTICE", (ROOT / "NOTICE").read_text(encoding="utf-8"))
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in named if not name.startswith(left_out)]
    assert len(named) > len(texts) > 0
    for text in texts:
        assert "Copyright (c) Microsoft Corporation." in text
        assert "Permission is hereby granted, free of charge" in text


def test_every_node_has_help_in_both_languages(schemas) -> None:
    pages = ROOT / "web" / "docs"
    for schema in schemas:
        for page in (pages / f"{schema['node_id']}.md", pages / schema["node_id"] / "zh.md"):
            text = page.read_text(encoding="utf-8")
            explained = set(re.findall("`([a-zA-Z0-9_]+)`", text))
            names = [i["id"] for i in schema["inputs"]]
            names += [o.get("display_name", o["type"].upper()) for o in schema["outputs"]]
            missing = set(names) - explained
            assert not missing, f"{page} does not explain {missing}"
            assert bool(CHINESE.search(text)) == (page.name == "zh.md")
    known = {schema["node_id"] for schema in schemas}
    assert {page.stem for page in pages.glob("*.md")} == {page.parent.name for page in pages.glob("*/zh.md")} == known


def test_help_of_a_prompt_names_the_marks_that_the_page_takes_out(schemas) -> None:
    """A text input with dynamic_prompts loses braces and comments before it is sent."""
    changed = {s["node_id"] for s in schemas if any(i.get("dynamic_prompts") for i in s["inputs"])}
    assert changed == {"MultiImageCompose"}
    for page in ("MultiImageCompose.md", "MultiImageCompose/zh.md"):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        assert all(mark in text for mark in ("`{...}`", "`//`", "`/* */`")), page


def test_english_repeats_the_schemas(schemas) -> None:
    """After a change of a schema: python tests/nodes/schemas.py --write"""
    assert json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8")) == english(schemas)


def test_chinese_is_complete(schemas) -> None:
    def keys(tree: Any) -> Any:
        return {name: keys(value) for name, value in tree.items()} if isinstance(tree, dict) else None

    def texts(tree: dict[str, Any]) -> list[str]:
        return [t for value in tree.values() for t in (texts(value) if isinstance(value, dict) else [value])]

    chinese = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    assert keys(chinese) == keys(english(schemas))
    assert all(texts(chinese))
    for node in chinese.values():
        assert all(CHINESE.search(part["tooltip"]) for part in (*node["inputs"].values(), *node["outputs"].values()))


SEARCHED = (
    *("nano banana", "combine images", "merge", "fusion", "inpaint", "sampler", "few step"),
    *("参考", "组合", "合成", "多图"),
)


@pytest.mark.parametrize("words", SEARCHED)
def test_a_search_finds_the_pack(schemas, words) -> None:
    """By names and aliases of the nodes and of the subgraphs, as ComfyUI's page searches."""
    named = [[schema["display_name"], *schema.get("search_aliases", [])] for schema in schemas]
    named += [[one.name, *one.aliases] for one in (make() for make in build.BLUEPRINTS)]
    assert any(words in text.lower() for names in named for text in names)


def strings(file: Path) -> list[str]:
    """Of a Python file, without docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_texts_name_nodes_as_the_canvas_does(schemas) -> None:
    """People know "Load UniPic", not the id that it has in a file; so tooltips, messages and help pages."""
    ids = re.compile("|".join(rf"\b{schema['node_id']}\b" for schema in schemas))
    texts = {file: strings(file) for file in (ROOT / "nodes").glob("*.py")}
    texts |= {file: [file.read_text(encoding="utf-8")] for file in (ROOT / "web" / "docs").rglob("*.md")}
    for file, words in texts.items():
        assert not [text for text in words if ids.search(text) and not ids.fullmatch(text)], file


def test_the_error_of_the_approximate_cache(schemas) -> None:
    """The tooltip's limit and error are those that the benchmark measured, in both languages."""
    results = json.loads((ROOT / "tests/benchmarks/results/approximate-cpu-2cores.json").read_text(encoding="utf-8"))
    error = {row["limit"]: row["psnr_db"] for row in results["rows"]}[REUSE_WITHIN]
    for language in ("en", "zh"):
        names = json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))
        tooltip = names["FewStepSampler"]["inputs"]["condition_cache"]["tooltip"]
        assert re.findall(r"\d+(?:\.\d+)?", tooltip) == [f"{REUSE_WITHIN:g}", f"{error:.0f}"]


def test_the_error_of_int8_storage(schemas) -> None:
    """The tooltip's PSNR is the one that the benchmark measured, in both languages."""
    results = json.loads((ROOT / "tests/benchmarks/results/cache-storage-cpu-2cores.json").read_text(encoding="utf-8"))
    for language in ("en", "zh"):
        names = json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))
        for node in ("FewStepSampler", "UniPicCompare"):
            tooltip = names[node]["inputs"]["cache_dtype"]["tooltip"]
            assert re.findall(r"(\d+) dB PSNR", tooltip) == [f"{results['psnr_db']:.0f}"]


# --- workflows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_the_file_is_in_step_with_its_description(make) -> None:
    """After a change: python -m workflows.build"""
    workflow = make()
    assert (build.FOLDER / f"{workflow.name}.json").read_text(encoding="utf-8") == build.text_of(workflow)


@pytest.mark.parametrize("make", build.BLUEPRINTS, ids=lambda make: make.__name__)
def test_the_subgraph_is_in_step_with_its_description(make) -> None:
    """After a change: python -m workflows.build"""
    subgraph = make()
    assert (build.SUBGRAPHS / f"{subgraph.name}.json").read_text(encoding="utf-8") == build.text_of(subgraph)


def test_the_page_of_the_workflows_is_in_step() -> None:
    """After a change: python -m workflows.build"""
    assert build.PAGE.read_text(encoding="utf-8") == build.page()


def test_no_other_files() -> None:
    assert {path.stem for path in build.FOLDER.glob("*.json")} == {make().name for make in build.ALL}
    assert {path.stem for path in build.SUBGRAPHS.glob("*.json")} == {make().name for make in build.BLUEPRINTS}
    notes = {path.stem.removesuffix(".zh") for path in (build.FOLDER / "notes").glob("*.md")}
    assert notes == {"own-model", "own-pictures", *(make().name for make in build.ALL)}


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_title_description_and_notes_in_both_languages(make) -> None:
    workflow = make()
    graph = workflow.ui()
    info = graph["extra"]["info"]
    assert 8 < len(info["name"]) < 60
    assert 20 < len(info["description"]) < 400
    english_note, chinese_note = workflow.note().split("\n\n---\n\n")
    assert not CHINESE.search(english_note)
    assert CHINESE.search(chinese_note)
    assert english_note.count("\n\n") == chinese_note.count("\n\n"), "a paragraph has no translation"
    for node in graph["nodes"]:
        if node["type"] in KINDS:
            pack = "comfyui-unipic" if KINDS[node["type"]].ours else "comfy-core"
            assert (node["properties"]["cnr_id"], bool(node["properties"]["ver"])) == (pack, True)


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_the_thumbnail(make) -> None:
    """After a change of the weights: see tests/nodes/inside/graphs/test_page.py"""
    with Image.open(build.FOLDER / f"{make().name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 128
        assert len({picture.getpixel((x, x)) for x in range(0, min(picture.size), 8)}) > 8, "nothing is on it"


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_readable_at_first_sight(make) -> None:
    graph = make().ui()
    boxes = [(n["pos"][0], n["pos"][1] - 30, n["size"][0], n["size"][1] + 30) for n in graph["nodes"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a[0] >= b[0] + b[2] or b[0] >= a[0] + a[2] or a[1] >= b[1] + b[3] or b[1] >= a[1] + a[3]
            assert apart, f"nodes overlap: {a}, {b}"
    for node, (x, y, width, height) in zip(graph["nodes"], boxes, strict=True):
        if node["type"] != "MarkdownNote":
            assert any(
                left <= x and top <= y and x + width <= left + w and y + height <= top + h
                for left, top, w, h in (group["bounding"] for group in graph["groups"])
            ), f"{node['type']} is in no group"
    assert [n["type"] for n in graph["nodes"]].count("MarkdownNote") == 1
    assert len(graph["nodes"]) <= 15
    assert graph["nodes"][-2]["type"] == "SaveImage"


def test_comfyui_serves_this_folder() -> None:
    """ComfyUI serves templates from the first of these folders that exists, and lists those of all."""
    for earlier in ("example_workflows", "example", "examples", "workflow"):
        assert not (ROOT / earlier).exists(), f"{earlier}/ hides workflows/ from ComfyUI's template browser: rename it"
