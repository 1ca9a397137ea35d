"""The shipped workflows in ComfyUI's own page: opened, converted, queued and looked at, in headless Chromium.

UNIPIC_UPDATE_PICTURES=1 also writes the screenshots to docs/workflows. Needs node and npm; the two packages for the
browser are installed once into a temporary folder (UNIPIC_PAGE_TOOLS names another).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import comfyui
import pytest
from PIL import Image
from running import UPDATE, server
from unipic_pack.workflows import build, parts, photos
from unipic_pack.workflows.graph import Group, Workflow
from unipic_pack.workflows.kinds import KINDS

PACKAGES = ("puppeteer-core@24", "@sparticuz/chromium@147")
SCREENSHOTS = comfyui.ROOT / "docs" / "workflows"
MAX_BYTES = 150_000
OLD, MUTED = "an-old-workflow", "a-muted-reference"
MUTE = 2
"""LiteGraph's mode of a muted node."""
INSTALL_SECONDS, PAGE_SECONDS = 900, 1800


@functools.cache
def tools() -> Path | str:
    """A folder with the packages, or why there is none."""
    if not shutil.which("node") or not shutil.which("npm"):
        return "no node and npm: the page test needs them"
    folder = Path(os.environ.get("UNIPIC_PAGE_TOOLS", Path(tempfile.gettempdir()) / "unipic-page-tools"))
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / "node_modules" / package.rpartition("@")[0]).is_dir() for package in PACKAGES):
        return folder
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return "npm did not install the browser in time"
    return folder if done.returncode == 0 else f"npm has no {' and '.join(PACKAGES)} here"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report and a screenshot of every workflow."""
    folder = tools()
    if isinstance(folder, str):
        pytest.skip(folder)
    shutil.copy(comfyui.ROOT / "tests" / "nodes" / "page.mjs", folder)
    out = tmp_path_factory.mktemp("pages")
    shipped = [make() for make in build.ALL]
    files = [str(build.FOLDER / f"{one.name}.json") for one in shipped if one.runs_here]
    opened = [str(build.FOLDER / f"{one.name}.json") for one in shipped if not one.runs_here]
    opened += [str(build.SUBGRAPHS / f"{make().name}.json") for make in build.BLUEPRINTS]
    for name, ui in ((OLD, old()), (MUTED, muted())):
        (out / f"{name}.workflow").mkdir()
        path = out / f"{name}.workflow" / f"{name}.json"
        path.write_text(json.dumps(ui), encoding="utf-8")
        files.append(str(path))
    command = ["node", str(folder / "page.mjs"), server().url, str(out), "--run", *files, "--open", *opened]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PAGE_SECONDS * len(files + opened))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def old() -> dict[str, Any]:
    """A workflow that was saved before the last widgets and sockets were added."""
    folder = comfyui.ROOT / "tests" / "compat" / "fixtures" / "workflows"
    return json.loads((folder / "01-compose-two-references.json").read_text(encoding="utf-8"))


def muted() -> dict[str, Any]:
    """Three Reference nodes, the second of which is muted."""
    w = Workflow(MUTED, KINDS)
    model = parts.load(w)
    pictures = parts.sample_pictures(w, ("panda", "beach", "crown"))
    wires = [w.add("UniPicReference", {"image": picture["image"]}, photos.reference()) for picture in pictures]
    made = parts.compose(w, model, [], "Image 1.", references=[wire["reference"] for wire in wires])
    decoded = w.add("VAEDecode", {"samples": made["latent"], "vae": model["VAE"]})
    saved = w.add("SaveImage", {"images": decoded["IMAGE"]}, {"filename_prefix": MUTED})
    w.column(Group("all", [model, *pictures, *wires, made, decoded, saved]))
    ui = w.ui()
    next(node for node in ui["nodes"] if node["id"] == wires[1].id)["mode"] = MUTE
    return ui


def test_an_old_workflow_runs_with_the_new_inputs_at_their_defaults(pages: Path) -> None:
    report = report_of(pages, OLD)
    assert report["missing"] == report["red"] == report["errors"] == []
    assert report["run"] == {"ok": True}
    given = {node["class_type"]: node["inputs"] for node in report["api"].values()}
    compose, sampler = given["MultiImageCompose"], given["FewStepSampler"]
    assert (compose["batches"], compose["share"], compose["size"]) == ("first", "release", "custom")
    assert (sampler["condition_cache"], sampler["schedule"], sampler["shift"]) == ("auto", "auto", 0)
    assert {name for name in compose if "." in name} == {"images.image_1", "images.image_2"}


def test_a_muted_reference_leaves_a_gap_that_the_node_can_tell(pages: Path) -> None:
    report = report_of(pages, MUTED)
    assert report["missing"] == report["red"] == report["errors"] == []
    assert report["run"] == {"ok": True}
    given = {node["class_type"]: node["inputs"] for node in report["api"].values()}
    sockets = {name for name in given["MultiImageCompose"] if "." in name}
    assert sockets == {"references.reference_1", "references.reference_3"}


def report_of(pages: Path, name: str) -> dict[str, Any]:
    return json.loads((pages / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_opens_without_a_red_node_and_runs(pages: Path, make: Any) -> None:
    workflow = make()
    report = report_of(pages, workflow.name)
    assert report["missing"] == report["errors"] == []
    loaders = (
        [] if workflow.runs_here else ["Load Diffusion Model", "Load CLIP", "Load VAE"]
    )  # their files are not here
    assert report["red"] == loaders
    assert report.get("run") == ({"ok": True} if workflow.runs_here else None)


@pytest.mark.parametrize("make", build.BLUEPRINTS, ids=lambda make: make.__name__)
def test_a_subgraph_opens_as_one_node(pages: Path, make: Any) -> None:
    report = report_of(pages, make().name)
    assert report["missing"] == report["red"] == report["errors"] == []
    assert [node["title"] for node in report["before"]["nodes"]] == [make().name]


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_the_page_converts_it_as_the_description_says(pages: Path, make: Any) -> None:
    """So what the tests without a page run is what a person's click runs."""
    workflow = make()
    api = report_of(pages, workflow.name)["api"]
    for node in api.values():
        node.pop("_meta", None)
    assert api == workflow.api()


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["before", "after", "vue"])
def test_nothing_overlaps(pages: Path, make: Any, when: str) -> None:
    """As the page draws it: when opened, with previews and pictures when it has run, and then as Nodes 2.0."""
    seen = report_of(pages, make().name).get(when)
    if seen is None:
        pytest.skip("an app, or not run")
    boxes = {node["title"] + node["id"]: node["box"] for node in seen["nodes"]}
    for name, a in boxes.items():
        for other, b in boxes.items():
            apart = a[0] >= b[0] + b[2] or b[0] >= a[0] + a[2] or a[1] >= b[1] + b[3] or b[1] >= a[1] + a[3]
            assert name == other or apart, f"{name} lies on {other}"
    for node in seen["nodes"]:
        x, y, width, height = node["box"]
        inside = any(
            left <= x and top <= y and x + width <= left + w and y + height <= top + h
            for left, top, w, h in (group["box"] for group in seen["groups"])
        )
        assert inside or node["title"] == "Read me", f"{node['title']} stands out of its group"


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_screenshot(pages: Path, make: Any) -> None:
    """There is something to see, and it is small enough for the repository."""
    name = make().name
    with Image.open(pages / f"{name}.png") as shot:
        assert shot.width > 1000
        small = shot.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)  # links keep their colours
    path = pages / f"{name}.small.png"
    small.save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES
    if UPDATE:
        SCREENSHOTS.mkdir(exist_ok=True)
        shutil.copy(path, SCREENSHOTS / f"{name}.png")
