"""Crop to Mask and Stitch: pixels outside the mask are the picture's, also after a composition between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from compose_tools import image
from PIL import Image
from running import Executor, Graph, node_of, saved_pictures
from unipic_pack.nodes.crop_and_stitch import UniPicCrop, UniPicStitch
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.workflows import build

CHOICES = {"context": 1.5, "budget": 0, "grow": 0, "edge": 8}


def crop(picture: Any, mask: Any, **more: Any) -> tuple[Any, ...]:
    return UniPicCrop.execute(picture, mask, **{**CHOICES, **more}).args


def hole(height: int, width: int, batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, height, width)
    mask[:, height // 3 : height // 2, width // 4 : width // 2] = 1
    return mask


def test_the_budget_is_the_model_s(nano_model: Any) -> None:
    picture, mask = image(0, 400, 300), hole(300, 400)
    assert crop(picture, mask, model=nano_model)[1].shape[1:3] == (192, 352)
    assert crop(picture, mask)[3:] == (1440, 736)
    assert crop(picture, mask, model=nano_model, budget=128)[3:] == (192, 96)


def test_masks_of_any_shape_and_size() -> None:
    picture = image(0, 400, 300)
    whole = crop(picture, hole(300, 400), budget=256)
    for mask in (hole(300, 400)[0], hole(300, 400)[:, None]):
        other = crop(picture, mask, budget=256)
        assert torch.equal(other[1], whole[1])
        assert torch.equal(other[2], whole[2])
    assert crop(picture, hole(30, 40), budget=256)[2].any()
    assert crop(torch.cat([picture] * 3), hole(300, 400), budget=256)[1].shape[0] == 3


def test_grey_and_empty_pictures_and_other_wires_are_one_sentence() -> None:
    with pytest.raises(UniPicError, match="the mask is empty; paint the part to change"):
        crop(image(), torch.zeros(1, 64, 64))
    with pytest.raises(UniPicError, match=r"3 or 4\], got \[1, 50, 70, 1\]"):
        crop(image()[..., :1], hole(50, 70))
    with pytest.raises(UniPicError, match="one for each of 1 pictures"):
        crop(image(), hole(50, 70, batch=2))
    with pytest.raises(UniPicError, match="mask must be an IMAGE or a MASK, got str"):
        crop(image(), "mask")
    with pytest.raises(UniPicError, match=r"stitch must come from Crop to Mask \(UniPic\), got int"):
        UniPicStitch.execute(3, image())


def photograph() -> tuple[Path, np.ndarray[Any, Any]]:
    """A picture of 1000x700 with a transparent part, as Load Image takes a mask from it; and its RGB."""
    pixels = (image(3, 1000, 700)[0].numpy() * 255).round().astype(np.uint8)
    alpha = 255 - (hole(700, 1000)[0].numpy() * 255).astype(np.uint8)
    path = Path(folder_paths.get_input_directory(), "photograph.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack([pixels, alpha])).save(path)
    return path, pixels


def graph(name: str, masked_latent: bool) -> Graph:
    """The edit workflow between Crop to Mask and Stitch."""
    made = build.single_edit().api()
    compose = node_of(made, "MultiImageCompose")
    crop = {"image": ["photo", 0], "mask": ["photo", 1], "model": ["1", 0], **CHOICES}
    made["photo"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    made["crop"] = {"class_type": "UniPicCrop", "inputs": crop}
    compose |= {"images.image_1": ["crop", 1], "width": ["crop", 3], "height": ["crop", 4], "prompt": "Remove it."}
    sampler = node_of(made, "FewStepSampler")
    sampler.update(steps=2)
    if masked_latent:
        made["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["crop", 1], "vae": ["1", 2]}}
        made["kept"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["encoded", 0], "mask": ["crop", 2]}}
        sampler["latent"] = ["kept", 0]
    saver = node_of(made, "SaveImage")
    made["stitch"] = {"class_type": "UniPicStitch", "inputs": {"stitch": ["crop", 0], "image": saver["images"]}}
    saver["images"] = ["stitch", 0]
    return made


@pytest.mark.parametrize("masked_latent", [False, True])
def test_in_a_graph_the_file_equals_the_photograph_outside_the_mask(masked_latent: bool) -> None:
    path, pixels = photograph()
    done = Executor().run(graph(path.name, masked_latent))
    assert done.success, done.error.get("exception_message")
    [entry] = saved_pictures(done.outputs)
    result = np.asarray(Image.open(Path(folder_paths.get_output_directory(), entry["subfolder"], entry["filename"])))
    inside = hole(700, 1000)[0].numpy() > 0
    assert np.array_equal(result[~inside], pixels[~inside])
    assert (result[inside] != pixels[inside]).any(-1).mean() > 0.9
    assert {"crop", "stitch"} <= set(done.outputs), "both show their picture"
