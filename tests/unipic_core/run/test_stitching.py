"""Crop and stitch: outside the mask a picture stays as it was, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unipic_core.errors import UniPicError
from unipic_core.run.stitching import Box, crop_around, crop_box, faded, grown, stitched


def picture(height: int, width: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height + width))


def mask_of(height: int, width: int, *boxes: tuple[int, int, int, int], batch: int = 1) -> Tensor:
    """Boxes (left, top, right, bottom) of ones."""
    mask = torch.zeros(batch, height, width)
    for left, top, right, bottom in boxes:
        mask[:, top:bottom, left:right] = 1
    return mask


def roundtrip(image: Tensor, mask: Tensor, budget: int = 256, parts: int | None = None, **more: float) -> Tensor:
    """The picture with the masked part made black."""
    crop = crop_around(image, mask, budget, **more)  # type: ignore[arg-type]
    new = torch.zeros_like(crop.image if parts is None else crop.image[:1].expand(parts, -1, -1, -1))
    return stitched(crop.stitch, new)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((200, 300), (100, 50, 180, 120)),
        ((201, 333), (0, 0, 40, 40)),  # in a corner
        ((199, 333), (280, 150, 333, 199)),  # in the other corner
        ((97, 61), (0, 0, 61, 97)),  # everything
        ((64, 400), (10, 30, 390, 33)),  # thin
        ((300, 200), (77, 200, 78, 201)),  # one pixel
        ((20, 10), (2, 2, 5, 5)),  # smaller than the model's least side
    ],
)
@pytest.mark.parametrize("edge", [0, 1, 16])
def test_outside_the_mask_nothing_changes_and_inside_everything_does(
    size: tuple[int, int], box: tuple[int, int, int, int], edge: int
) -> None:
    image, mask = picture(*size), mask_of(*size, box)
    result = roundtrip(image, mask, edge=edge)
    outside = mask[0] == 0
    assert torch.equal(result[0][outside], image[0][outside])
    assert bool((result[0][~outside] != image[0][~outside]).any(-1).all())
    assert float(result[0][~outside].min()) == 0, "nowhere is the new part alone"
    if edge <= 1:
        assert not result[0][~outside].any()


def test_a_photograph_of_4k() -> None:
    image, mask = picture(2160, 3840), mask_of(2160, 3840, (3000, 1500, 3400, 1900))
    crop = crop_around(image, mask, 1024)
    assert crop.image.shape[1:] == (1024, 1024, 3)
    assert crop.mask.shape == (1, 1024, 1024)
    result = stitched(crop.stitch, torch.zeros_like(crop.image))
    outside = mask[0] == 0
    assert torch.equal(result[0][outside], image[0][outside])
    assert not result[0, 1520:1880, 3020:3380].any()


def test_a_batch_has_one_box_and_each_picture_its_mask() -> None:
    image = picture(150, 220, batch=3)
    mask = torch.cat([mask_of(150, 220, (10, 10, 60, 60)), mask_of(150, 220, (100, 80, 160, 140)), mask_of(150, 220)])
    crop = crop_around(image, mask, 256)
    assert len(crop.image) == len(crop.mask) == 3
    result = stitched(crop.stitch, torch.zeros_like(crop.image))
    for i in range(3):
        changed = (result[i] != image[i]).any(-1)
        assert torch.equal(changed, mask[i] > 0)
    one_mask = roundtrip(image, mask[:1])
    assert torch.equal((one_mask != image).any(-1), (mask[:1] > 0).expand(3, -1, -1))


def test_several_new_parts_of_one_picture() -> None:
    image, mask = picture(80, 80), mask_of(80, 80, (20, 20, 60, 60))
    assert roundtrip(image, mask, parts=4).shape == (4, 80, 80, 3)
    crop = crop_around(picture(80, 80, batch=2), mask, 256)
    with pytest.raises(UniPicError, match="one new part for each of 2 cropped pictures, got 3"):
        stitched(crop.stitch, torch.zeros(3, 8, 8, 3))
    with pytest.raises(UniPicError, match=r"must be \[batch, height, width, 3\], got \[1, 8, 8, 1\]"):
        stitched(crop.stitch, torch.zeros(1, 8, 8, 1))


def test_the_alpha_channel_of_the_picture_stays() -> None:
    image, mask = picture(80, 80, channels=4), mask_of(80, 80, (20, 20, 60, 60))
    result = roundtrip(image, mask)
    assert torch.equal(result[..., 3], image[..., 3])
    assert not result[0, 40, 40, :3].any()


def test_an_unchanged_crop_at_its_size_gives_the_picture_back() -> None:
    image, mask = picture(256, 256), mask_of(256, 256, (0, 0, 256, 256))
    crop = crop_around(image, mask, 256)
    assert torch.equal(crop.image, image)
    assert torch.equal(stitched(crop.stitch, crop.image), image)


def test_an_empty_mask() -> None:
    with pytest.raises(UniPicError, match="the mask is empty; paint the part to change"):
        crop_around(picture(64, 64), torch.zeros(1, 64, 64), 256)


def test_a_grown_mask_changes_more() -> None:
    image, mask = picture(100, 100), mask_of(100, 100, (40, 40, 60, 60))
    changed = (roundtrip(image, mask, grow=8, edge=0) != image).any(-1)
    assert torch.equal(changed, grown(mask, 8) > 0)
    assert bool(changed[0, 32, 50])
    assert not changed[0, 31, 50]
    assert not changed[0, 33, 33], "it grows round"


def test_the_edge_rises_inside_the_mask() -> None:
    alpha = faded(mask_of(60, 60, (10, 10, 50, 50)), 8)[0]
    row = alpha[30]
    assert not row[:10].any()
    assert not row[50:].any()
    assert bool((row[10:18].diff() > 0).all())
    assert bool((row[17:43] == 1).all())


def test_thin_parts_reach_the_new_part_on_their_middle_line() -> None:
    alpha = faded(mask_of(60, 60, (5, 5, 55, 8), (20, 20, 55, 55)), 16)[0]
    assert float(alpha[6, 10]) == 1
    assert float(alpha[37, 37]) == 1


def test_there_is_no_edge_at_the_border_of_the_picture() -> None:
    """Beyond the border there is nothing to blend with; a box that ends inside the picture fades."""
    mask = torch.ones(1, 20, 20)
    assert bool((faded(mask, 8) == 1).all())
    assert float(faded(mask, 8, (1, 0, 0, 0))[0, 10, 0]) < 0.1
    result = roundtrip(picture(128, 128), mask_of(128, 128, (0, 40, 60, 90)))
    assert not result[0, 60, 0].any()


def test_a_soft_mask_is_the_most_that_is_blended() -> None:
    mask = mask_of(64, 64, (16, 16, 48, 48)) * 0.5
    assert float(faded(mask, 4).max()) == 0.5


@pytest.mark.parametrize(
    ("inner", "picture_size", "context"),
    [
        (Box(10, 10, 30, 30), (1000, 1000), 1.5),
        (Box(900, 5, 90, 300), (1000, 700), 3.0),
        (Box(0, 0, 1000, 4), (1000, 700), 1.0),
        (Box(3, 3, 1, 1), (10, 7), 1.0),
        (Box(0, 0, 640, 2), (640, 4), 2.0),
    ],
)
def test_the_box_holds_the_mask_and_lies_in_the_picture(
    inner: Box, picture_size: tuple[int, int], context: float
) -> None:
    box, size = crop_box(inner, picture_size, 512, context)
    assert 0 <= box.left <= inner.left
    assert 0 <= box.top <= inner.top
    assert inner.left + inner.width <= box.left + box.width <= picture_size[0]
    assert inner.top + inner.height <= box.top + box.height <= picture_size[1]
    assert size[0] % 32 == size[1] % 32 == 0
    if picture_size[0] >= 1000:
        assert box.width / box.height == pytest.approx(size[0] / size[1], rel=0.05)
