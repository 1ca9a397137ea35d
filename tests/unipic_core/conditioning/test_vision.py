"""The vision patches against transformers' image processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from unipic_core.conditioning.vision import grid_thw, vision_patches, vision_tokens
from unipic_core.pipeline.text_encoder import image_processor_class


@pytest.mark.parametrize("size", [(28, 28), (84, 56), (112, 140)])
def test_equals_the_image_processor(size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    features = image_processor_class()()(images=[Image.fromarray(pixels)], do_resize=False, return_tensors="pt")
    ours = vision_patches(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
    assert torch.allclose(features["pixel_values"], ours, atol=1e-5)
    assert features["image_grid_thw"].tolist() == [list(grid_thw(size[1], size[0]))]
    assert vision_tokens(size[1], size[0]) * 4 == len(ours)


def test_refuses_other_sizes():
    with pytest.raises(ValueError, match="multiples of 28"):
        vision_patches(torch.zeros(1, 3, 30, 28))
