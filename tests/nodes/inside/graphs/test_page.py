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
from unipic_pack.workflows import build

PACKAGES = ("puppeteer-core@24", "@sparticuz/chromium@147")
SCREENSHOTS = comfyui.ROOT / "docs" / "workflows"
MAX_BYTES = 150_000
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
    files = [str(build.FOLDER / f"{make().name}.json") for make in build.ALL]
    command = ["node", str(folder / "page.mjs"), server().url, str(out), "--run", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PAGE_SECONDS * len(files))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def report_of(pages: Path, name: str) -> dict[str, Any]:
    return json.loads((pages / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_opens_without_a_red_node_and_runs(pages: Path, make: Any) -> None:
    report = report_of(pages, make().name)
    assert report["missing"] == report["red"] == report["errors"] == []
    assert report["run"] == {"ok": True}


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_the_page_converts_it_as_the_description_says(pages: Path, make: Any) -> None:
    """So what the tests without a page run is what a person's click runs."""
    workflow = make()
    api = report_of(pages, workflow.name)["api"]
    for node in api.values():
        node.pop("_meta", None)
    assert api == workflow.api()


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_overlaps(pages: Path, make: Any, when: str) -> None:
    """As the page draws it: when opened, and with previews and pictures in the nodes when it has run."""
    seen = report_of(pages, make().name)[when]
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
