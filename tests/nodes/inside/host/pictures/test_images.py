"""IMAGE and MASK to the pictures that the core takes, and the pictures of the pack."""

import numpy as np
import pytest
import torch
from PIL import Image
from unipic_pack.nodes.host.pictures.images import to_image, to_pictures
from unipic_pack.nodes.sample_images import FOLDER, UniPicSampleImages, example_names
from unipic_pack.unipic_core.conditioning.images import load_image
from unipic_pack.unipic_core.errors import UniPicError


def noise(*shape):
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return pixels.numpy()


def test_there_and_back_exactly():
    picture = Image.fromarray(noise(13, 7, 3))
    [again] = to_pictures(to_image(picture))
    assert again.mode == "RGB"
    assert again.tobytes() == picture.tobytes()


def test_rgba_and_mask_are_what_the_file_is(tmp_path):
    """A transparent file through ComfyUI (RGB and MASK = 1 - alpha, or RGBA) is what the pipeline makes of the file."""
    rgba = noise(9, 11, 4)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    want = load_image(tmp_path / "a.png").tobytes()
    values = torch.from_numpy(rgba)[None].float() / 255
    [whole] = to_pictures(values)
    [masked] = to_pictures(values[..., :3], 1 - values[..., 3])
    assert whole.tobytes() == masked.tobytes() == want


def test_grey_and_grey_with_alpha():
    grey = torch.full((1, 4, 6, 1), 0.25)
    [picture] = to_pictures(grey)
    assert picture.mode == "RGB"
    assert picture.size == (6, 4)
    assert picture.getpixel((0, 0)) == (64, 64, 64)
    [clear] = to_pictures(torch.cat([grey, torch.zeros_like(grey)], dim=-1))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_every_picture_of_a_batch():
    batch = torch.stack([torch.full((3, 5, 3), v) for v in (0.0, 0.5, 1.0)])
    assert [p.getpixel((0, 0))[0] for p in to_pictures(batch)] == [0, 128, 255]
    masks = torch.stack([torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3, 5)])
    assert [p.getpixel((0, 0))[0] for p in to_pictures(batch, masks)] == [0, 255, 255]


def test_mask_of_another_size_is_stretched():
    black = torch.zeros(1, 40, 60, 3)
    [untouched] = to_pictures(black, torch.zeros(1, 64, 64))  # what LoadImage gives for an opaque file
    assert not np.asarray(untouched).any()
    half = torch.zeros(8, 8)
    half[:, 4:] = 1
    [right] = to_pictures(black, half)
    pixels = np.asarray(right)[..., 0]
    assert not pixels[:, :25].any()
    assert (pixels[:, 35:] == 255).all()


def test_mask_on_rgba_multiplies():
    clear = torch.zeros(1, 2, 2, 4)
    clear[..., 3] = 0.5
    [picture] = to_pictures(clear, torch.full((1, 2, 2), 0.5))
    assert abs(picture.getpixel((0, 0))[0] - 255 * 0.75) <= 1


def test_strange_values_and_one_pixel():
    [picture] = to_pictures(torch.tensor([[[[float("nan"), -3.0, 7.0]]]]))
    assert picture.size == (1, 1)
    assert picture.getpixel((0, 0)) == (0, 0, 255)
    assert to_pictures(torch.rand(4, 5, 3))[0].size == (5, 4)


def test_what_is_no_picture():
    for shape in ((1, 4, 4, 5), (4, 4), (1, 0, 4, 3)):
        with pytest.raises(UniPicError, match="an image must be"):
            to_pictures(torch.zeros(shape))
    with pytest.raises(UniPicError, match="one for each of 2 pictures"):
        to_pictures(torch.zeros(2, 4, 4, 3), torch.zeros(3, 4, 4))


# --- the pack's pictures -------------------------------------------------------------------------------------------


def test_sample_images():
    [combo] = UniPicSampleImages.define_schema().inputs
    assert combo.options == example_names()
    assert combo.default in combo.options
    assert len(combo.options) == 17
    for name in example_names():
        [image] = UniPicSampleImages.execute(name).args
        height, width = image.shape[1:3]
        assert image.shape[0] == 1
        assert image.shape[3] == 3
        assert (width, height) == Image.open(FOLDER / f"{name}.png").size
        assert image.std() > 0.05  # no picture is nearly blank
    with pytest.raises(UniPicError, match="no sample picture '../secret'"):
        UniPicSampleImages.execute("../secret")
