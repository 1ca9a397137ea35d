"""The shipped workflows over HTTP and websocket on a real server: progress, previews, interruption, queueing, files."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from running import PACK_FOLDER, Events, Server, node_of, queue, saved_pictures, server
from unipic_pack.workflows import build
from unipic_pack.workflows.kinds import KINDS

PICTURE = "SaveImage"


@pytest.fixture(scope="module")
def comfy() -> Server:
    return server()


def run(on: Server, *graphs: Any, **more: Any) -> list[Events]:
    return asyncio.run(queue(on, list(graphs), **more))


def saved(on: Server, events: Events) -> list[Image.Image]:
    """Pictures that a finished prompt saved, fetched as a page would."""
    entries = saved_pictures(events.outputs)
    paths = [f"/view?filename={quote(e['filename'])}&subfolder={quote(e['subfolder'])}&type=output" for e in entries]
    return [Image.open(io.BytesIO(on.get(path))) for path in paths]


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_workflow(comfy: Server, make: Any) -> None:
    workflow = make()
    if not workflow.runs_here:
        pytest.skip("needs the released weights")
    graph = workflow.api()
    for node in graph.values():  # seeds of its own, so that nothing comes out of ComfyUI's cache or Compare's store
        if node["inputs"].get("x_axis") == "seed":
            node["inputs"]["x_values"] = "100, 101, 102"
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = 100 + build.ALL.index(make)
    [events] = run(comfy, graph)
    assert events.ended == "execution_success", events.detail
    assert events.progress, "no progress was reported"
    assert events.progress[-1][0] == events.progress[-1][1] >= 4
    assert events.previews >= events.progress[-1][1] - 1, "a preview for every step"
    pictures = saved(comfy, events)
    assert pictures
    assert all(min(picture.size) >= 64 for picture in pictures)


def test_the_sampler_says_what_it_does(comfy: Server) -> None:
    graph = build.two_references().api()
    node_of(graph, "FewStepSampler").update(seed=11, steps=2)
    [events] = run(comfy, graph)
    assert any("2 steps" in text for text in events.texts), events.texts


def test_interruption_and_the_next_run(comfy: Server) -> None:
    graph = build.two_references().api()
    node_of(graph, "FewStepSampler").update(seed=12, steps=60)

    async def interrupt(http: Any, step: int) -> None:
        if step == 2:
            await http.post("/interrupt")

    [events] = run(comfy, graph, on_progress=interrupt)
    assert events.ended == "execution_interrupted"
    assert events.progress[-1][0] < 30, "it went on long after the interruption"
    node_of(graph, "FewStepSampler").update(steps=3)
    [events] = run(comfy, graph)
    assert events.ended == "execution_success", events.detail
    assert len(saved(comfy, events)) == 1


def test_two_prompts_at_once(comfy: Server) -> None:
    graphs = [build.two_references().api() for _ in range(2)]
    for seed, graph in enumerate(graphs):
        node_of(graph, "FewStepSampler").update(seed=20 + seed, steps=3)
    both = run(comfy, *graphs)
    assert [events.ended for events in both] == ["execution_success"] * 2
    one, other = (saved(comfy, events)[0].convert("RGB").tobytes() for events in both)
    assert one != other


def test_seven_pictures_are_an_error_that_says_so(comfy: Server) -> None:
    graph = build.six_references().api()
    compose = node_of(graph, "MultiImageCompose")
    compose["images.image_7"] = compose["images.image_1"]
    [events] = run(comfy, graph)
    assert events.ended == "execution_error"
    assert "at most 6" in events.detail["exception_message"]
    assert events.detail["node_type"] == "MultiImageCompose"
    good = build.two_references().api()
    node_of(good, "FewStepSampler").update(seed=30, steps=2)
    [events] = run(comfy, good)
    assert events.ended == "execution_success", events.detail


def test_template_browser(comfy: Server) -> None:
    listed = json.loads(comfy.get("/workflow_templates"))
    names = {make().name for make in build.ALL}
    assert set(listed[PACK_FOLDER]) == names
    for name in names:
        served = json.loads(comfy.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json"))
        assert served == json.loads((build.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert comfy.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.jpg")[:2] == b"\xff\xd8"


def test_help_and_translations(comfy: Server) -> None:
    translations = json.loads(comfy.get("/i18n"))
    known = json.loads(comfy.get("/object_info"))
    ours = {name for name, node in known.items() if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"}
    described = json.loads((Path(build.__file__).parents[1] / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    assert ours == set(described)
    assert ours <= set(KINDS)
    for name in ours:
        assert name in translations["en"]["nodeDefs"]
        assert name in translations["zh"]["nodeDefs"]
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert len(comfy.get(f"/extensions/{PACK_FOLDER}/docs/{page}")) > 200


def test_nothing_is_written_into_the_input_folder(comfy: Server) -> None:
    inputs = Path(comfy.base) / "input"
    written = {path.name for path in inputs.rglob("*.png")} - {"example.png"}
    assert not written
