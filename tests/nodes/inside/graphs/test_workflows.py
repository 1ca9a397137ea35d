"""Every shipped workflow in this process: the nodes are those it names, and it runs to a saved picture.

UNIPIC_UPDATE_PICTURES=1 also writes the thumbnails, from the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from running import UPDATE, Executor, node_classes
from unipic_pack.workflows import build
from unipic_pack.workflows.graph import CONTROL
from unipic_pack.workflows.kinds import KINDS
from unipic_pack.workflows.thumbnails import thumbnail

torch.set_num_threads(1)

PLAIN = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor()


def inputs_of(node: Any) -> dict[str, tuple[Any, ...]]:
    inputs = node.INPUT_TYPES()
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_the_nodes(name: str) -> None:
    """What workflows/kinds.py says of a node is what the node says: sockets, widgets in their order, outputs."""
    node, kind = node_classes()[name], KINDS[name]
    widgets, sockets, growing = [], {}, set()
    for field, spec in inputs_of(node).items():
        options = spec[1] if len(spec) > 1 else {}
        if str(spec[0]).startswith("COMFY_AUTOGROW"):
            template = options["template"]
            names = template.get("names") or [f"{template['prefix']}{i}" for i in range(template["max"])]
            growing |= {f"{field}.{name}" for name in names}
        elif isinstance(spec[0], list) or spec[0].partition(",")[0] in PLAIN:
            widgets += [field, CONTROL] if options.get("control_after_generate") else [field]
        else:
            sockets[field] = spec[0]
    assert list(kind.widgets) == widgets
    assert dict(kind.sockets) == sockets
    numbers = {prefix: range(kind.first, kind.first + most) for prefix, (_, most) in kind.growing.items()}
    assert {f"{prefix}{i}" for prefix, each in numbers.items() for i in each} == growing
    assert not getattr(node, "DEPRECATED", False)
    assert set(kind.optional) == {f for f in node.INPUT_TYPES().get("optional", {}) if f in sockets}
    names = getattr(node, "RETURN_NAMES", None) or node.RETURN_TYPES
    assert dict(kind.outputs) == dict(zip(names, node.RETURN_TYPES, strict=True))


@pytest.mark.parametrize("make", build.ALL, ids=lambda make: make.__name__)
def test_runs_to_a_saved_picture(executor: Executor, make: Any) -> None:
    workflow = make()
    if not workflow.runs_here:
        target = build.FOLDER / f"{workflow.name}.jpg"
        if UPDATE:
            thumbnail(workflow, None).save(target, quality=88)
        pytest.skip("needs the released weights")
    done = executor.run(workflow.api())
    assert done.success, done.error.get("exception_message")
    graph = workflow.api()
    [end] = [number for number, node in graph.items() if node["class_type"] == "SaveImage"]
    saved = done.outputs[end]["images"]
    compose = [node["inputs"] for node in graph.values() if node["class_type"] == "MultiImageCompose"]
    frames = 2 if any(node["class_type"] == "RebatchImages" for node in graph.values()) else 1
    assert len(saved) == frames * (compose[0]["batch_size"] if compose else 1)
    for entry in saved:
        path = Path(folder_paths.get_output_directory()) / entry["subfolder"] / entry["filename"]
        with Image.open(path) as picture:
            assert min(picture.size) >= 64
            pixels = np.asarray(picture.convert("RGB"), dtype=float)
            assert pixels.std() > 5, "the picture is blank"
            if UPDATE and entry is saved[0]:
                target = build.FOLDER / f"{workflow.name}.jpg"
                thumbnail(workflow, picture).save(target, quality=88)


def test_the_few_step_side_took_the_loras_recipe(executor: Executor) -> None:
    """What the LoRA's node shows is what its file says."""
    graph = build.base_beside_few_step().api()
    [lora] = [number for number, node in graph.items() if node["class_type"] == "DistillLoRA"]
    graph[lora]["inputs"]["strength"] = 0.5  # a node that is in the cache shows nothing again
    done = executor.run(graph)
    assert done.success, done.error.get("exception_message")
    assert "8 steps, consistency" in str(done.outputs[lora])
