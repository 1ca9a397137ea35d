"""A graph with Compare, and ComfyUI's own comparer for two of its pictures, run by ComfyUI's executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import pytest
from PIL import Image
from running import Executor, node_of


def graph(seeds: str) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    settings = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler": "auto", "denoise": 1.0}
    axes = {"x_axis": "seed", "x_values": seeds, "y_axis": "reference_budget", "y_values": "64, 96"}
    return {
        "load": node("LoadUniPic", model="unipic-nano (bundled)", text_encoder="auto", vae="auto", weight_dtype="bf16"),
        "a": node("UniPicSampleImages", picture="astronaut"),
        "b": node("UniPicSampleImages", picture="guitar"),
        "compose": node(
            "MultiImageCompose",
            clip=["load", 1],
            vae=["load", 2],
            prompt="Put the guitar from image 2 in the hands of the astronaut from image 1.",
            negative_prompt=" ",
            width=64,
            height=64,
            batch_size=1,
            reference_budget=0,
            **{"images.image_1": ["a", 0], "images.image_2": ["b", 0]},
        ),
        "compare": node(
            "UniPicCompare",
            model=["load", 0],
            positive=["compose", 0],
            negative=["compose", 1],
            latent=["compose", 2],
            vae=["load", 2],
            **settings,
            **axes,
        ),
        "before": node("ImageFromBatch", image=["compare", 1], batch_index=0, length=1),
        "after": node("ImageFromBatch", image=["compare", 1], batch_index=1, length=1),
        "slider": node("ImageCompare", image_a=["before", 0], image_b=["after", 0], compare_view=None),
    }


def test_a_grid_and_the_slider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    executor = Executor()
    done = executor.run(graph("1, 2"))
    assert done.success, done.error
    [shown] = done.outputs["compare"]["images"]
    with Image.open(Path(folder_paths.get_temp_directory()) / shown["subfolder"] / shown["filename"]) as grid:
        assert grid.width > 2 * 64
        assert grid.height > 2 * 64
    assert [len(done.outputs["slider"][key]) for key in ("a_images", "b_images")] == [1, 1]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    changed = graph("1")
    assert node_of(changed, "UniPicCompare")["x_values"] == "1"
    assert executor.run({k: v for k, v in changed.items() if k not in ("before", "after", "slider")}).success
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4, "the shorter axis is there already"
