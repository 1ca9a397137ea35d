"""Previews: the nodes of pictures show them in the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from compose_tools import WISHES, image
from PIL import Image
from running import Executor
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host.pictures.previews import PREVIEW_PICTURES, PREVIEW_SIDE, preview
from unipic_pack.nodes.reference import UniPicReference
from unipic_pack.unipic_core.conditioning.images import resize_references
from unipic_pack.unipic_core.conditioning.reference_sheet import Seen, reference_sheet
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.workflows import build


def files(ui: Any) -> list[Path]:
    shown = ui if isinstance(ui, dict) else ui.as_dict()
    return [Path(folder_paths.get_temp_directory(), i["subfolder"], i["filename"]) for i in shown["images"]]


def test_a_large_batch_is_shrunk_and_cut() -> None:
    paths = files(preview(torch.rand(PREVIEW_PICTURES + 3, 8, PREVIEW_SIDE * 2, 3)))
    assert len(paths) == PREVIEW_PICTURES
    assert Image.open(paths[0]).size == (PREVIEW_SIDE, 4)
    assert Image.open(files(preview(image(0, 70, 50)))[0]).size == (70, 50)


def test_reference_shows_its_picture_with_its_mask() -> None:
    mask = torch.zeros(1, 50, 70)
    mask[:, :, :35] = 1
    [path] = files(UniPicReference.execute(image(1), mask).ui)
    shown, given = np.asarray(Image.open(path)), image(1)[0].numpy() * 255
    assert np.abs(shown[:, 36:] - given[:, 36:]).max() <= 1
    assert np.abs(shown[:, :34] - given[:, :34]).mean() > 20
    with pytest.raises(UniPicError, match="image must be an IMAGE or a MASK, got str"):
        UniPicReference.execute("a.png")


@pytest.mark.usefixtures("fresh")
@torch.inference_mode()
def test_compose_shows_the_references_as_the_model_sees_them(tiny: Any) -> None:
    mask = torch.zeros(1, 50, 70)
    mask[:, :25] = 1
    images, masks = {"image_1": image(0, 300, 200), "image_2": image(1)}, {"mask_2": mask}
    done = MultiImageCompose.execute(*tiny, "Blend them.", images=images, masks=masks, **WISHES)
    sheet = Image.fromarray((done.args[3][0] * 255).round().to(torch.uint8).numpy())
    hole = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
    pictures = [Image.fromarray((i[0] * 255).round().to(torch.uint8).numpy()) for i in images.values()]
    white = pictures[1].copy()
    white.paste((255, 255, 255), (0, 0, 70, 25))
    seen = resize_references([pictures[0], white], 96)
    given = [Seen(seen[0], (300, 200)), Seen(seen[1], (70, 50), hole)]
    expected = reference_sheet(given, (32, 32))
    assert sheet.size == expected.size
    assert np.abs(np.asarray(sheet, int) - np.asarray(expected, int)).max() <= 1
    [path] = files(done.ui)
    assert Image.open(path).size == sheet.size


@torch.inference_mode()
def test_size_presets(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    def size(**more: Any) -> tuple[int, int]:
        latent = MultiImageCompose.execute(
            *tiny, "Blend them.", images={"image_1": image()}, reference_budget=96, **more
        ).args[2]
        height, width = latent["samples"].shape[-2:]
        return width * 8, height * 8

    caplog.set_level("INFO")
    assert size(size="16:9") == (1376, 768)
    assert "new picture 1376x768" in caplog.text
    assert size(size="16:9", width=256) == (256, 144)
    assert size(size="first picture") == size() == size(size="custom")
    assert size(size="custom", width=64, height=48) == (64, 48)
    with pytest.raises(UniPicError, match="size is 1:1, but width and height are 64x48"):
        size(size="1:1", width=64, height=48)
    with pytest.raises(UniPicError, match="size must be one of custom"):
        size(size="5:4")


def test_the_page_gets_the_previews() -> None:
    graph = build.two_references().api()
    next(n["inputs"] for n in graph.values() if n["class_type"] == "FewStepSampler").update(steps=1)
    done = Executor().run(graph)
    assert done.success
    shown = {graph[node]["class_type"] for node, output in done.outputs.items() if "images" in output}
    assert shown == {"UniPicSampleImages", "MultiImageCompose", "SaveImage"}
