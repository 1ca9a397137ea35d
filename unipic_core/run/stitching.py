"""In-painting a part of a large picture: crop around a mask, and paste the new part back with a soft edge.

Pictures are [B, H, W, C] float in [0, 1], masks [B or 1, H, W] with 1 = part to change. Outside the mask the result
equals the picture to the bit, since the soft edge lies inside the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning.images import output_size
from ..conditioning.reference_sizes import Size
from ..errors import UniPicError

Sides = tuple[int, int, int, int]
"""A 0 or 1 for left, top, right and bottom."""

LONGEST = 2.0
"""Greatest aspect of a crop, where the picture has room."""


@dataclass(frozen=True)
class Box:
    """Part of a picture, in whole pixels from its left and top."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Stitch:
    """A picture and the place of its crop. image: [B, H, W, C]; alpha: weight of the new part, [B or 1, h, w] of the
    box's size, 0 outside the mask."""

    image: Tensor
    box: Box
    alpha: Tensor


@dataclass(frozen=True)
class Crop:
    """A crop at the model's size. image [B, h, w, C], mask [B or 1, h, w]: resized; stitch: for `stitched`."""

    image: Tensor
    mask: Tensor
    stitch: Stitch


def crop_around(image: Tensor, mask: Tensor, budget: int, context: float = 1.5, grow: int = 0, edge: int = 16) -> Crop:
    """Crop a batch around its masks, and resize the crop to about budget^2 pixels in multiples of 32.

    mask: of the pictures' size; a batch has one box around all its masks. context: side of the crop, in sides of the
    mask's box. grow: pixels to enlarge the mask by. edge: width of the soft edge in pixels of the picture, less where
    the mask is thinner. Raises UniPicError for an empty mask.
    """
    height, width = image.shape[1:3]
    inner = _bounds(mask, grow)
    rows, columns = inner.slices
    larger = torch.zeros_like(mask)
    larger[:, rows, columns] = grown(mask[:, rows, columns], grow)
    box, size = crop_box(inner, (width, height), budget, context)
    rows, columns = box.slices
    part = larger[:, rows, columns]
    stitch = Stitch(image, box, faded(part, edge, _sides_inside(box, (width, height))))
    resized_mask = _resized(part[..., None], size, "bilinear")[..., 0]
    return Crop(_resized(image[:, rows, columns], size), resized_mask, stitch)


def stitched(stitch: Stitch, part: Tensor) -> Tensor:
    """Paste new parts [N, h, w, 3 or 4] of any size into the pictures: [max(B, N), H, W, C].

    One picture takes several parts, and several pictures take one part each or one for all; a picture's own alpha
    channel stays. Raises UniPicError for other counts and channels.
    """
    originals, count = len(stitch.image), max(len(stitch.image), len(part))
    if len(part) not in (1, count) or originals not in (1, count) or 0 in part.shape:
        raise UniPicError(
            f"expected one new part for each of {originals} cropped pictures, got {len(part)}; stitch the batch that "
            "was made from this crop"
        )
    if part.ndim != 4 or part.shape[-1] not in (3, 4):
        raise UniPicError(f"the new part must be [batch, height, width, 3], got {list(part.shape)}; connect an IMAGE")
    rows, columns = stitch.box.slices
    result = stitch.image.expand(count, -1, -1, -1).clone()
    colours = result[:, rows, columns, :3]
    new = _resized(part[..., :3].to(colours), (stitch.box.width, stitch.box.height))
    alpha = stitch.alpha[..., None].to(colours)
    blended = torch.where(alpha >= 1, new.expand_as(colours), torch.lerp(colours, new.expand_as(colours), alpha))
    result[:, rows, columns, :3] = torch.where(alpha > 0, blended, colours)
    return result


def crop_box(inner: Box, picture: Size, budget: int, context: float) -> tuple[Box, Size]:
    """Box around `inner` with its context, inside the picture, and the size (w, h) at which the model makes it.

    The box has the aspect of that size where the picture has room for it.
    """
    width, height = picture
    wide, high = min(math.ceil(inner.width * context), width), min(math.ceil(inner.height * context), height)
    wide, high = min(max(wide, math.ceil(high / LONGEST)), width), min(max(high, math.ceil(wide / LONGEST)), height)
    size = output_size((wide, high), budget)
    aspect = size[0] / size[1]
    if wide < high * aspect:
        wide = min(round(high * aspect), width)
    else:
        high = min(round(wide / aspect), height)
    left = _start(inner.left, inner.width, wide, width)
    top = _start(inner.top, inner.height, high, height)
    return Box(left, top, wide, high), output_size((wide, high), budget)


def _start(inner: int, inner_side: int, side: int, picture: int) -> int:
    """Start of a side centred on the inner box, moved into the picture."""
    return min(max(inner + (inner_side - side) // 2, 0), picture - side)


def _bounds(mask: Tensor, grow: int) -> Box:
    """Box around all masks [B, H, W], enlarged by `grow`, inside the picture."""
    height, width = mask.shape[1:]
    union = (mask > 0).any(dim=0)
    rows, columns = union.any(dim=1).nonzero(), union.any(dim=0).nonzero()
    if not len(rows):
        raise UniPicError("the mask is empty; paint the part to change, for example in Load Image's mask editor")
    top, left = max(int(rows[0]) - grow, 0), max(int(columns[0]) - grow, 0)
    bottom, right = min(int(rows[-1]) + grow + 1, height), min(int(columns[-1]) + grow + 1, width)
    return Box(left, top, right - left, bottom - top)


def grown(mask: Tensor, by: int) -> Tensor:
    """Enlarge masks [B, H, W] by a number of pixels, by an octagon."""
    mask = mask[:, None]
    for i in range(by):
        mask = _spread(mask, square=i % 2 == 0)
    return mask[:, 0]


def faded(mask: Tensor, edge: int, inside: Sides = (0, 0, 0, 0)) -> Tensor:
    """Masks [B, H, W] with a soft edge inside them: 0 where the mask is, 1 at `edge` pixels from its outline, or on the
    middle line of thinner parts.

    inside: for left, top, right, bottom, 1 where the mask ends at this side of the tensor, so that it fades there too.
    """
    support = F.pad((mask > 0).to(mask)[:, None], (inside[0], inside[2], inside[1], inside[3]))
    depth, core = support.clone(), support
    for i in range(1, edge):
        core = -_spread(-core, square=i % 2 == 0)
        depth += core
    reach = 2 * max(edge, 1) - 1
    deepest = F.max_pool2d(depth, (reach, 1), stride=1, padding=(reach // 2, 0))
    deepest = F.max_pool2d(deepest, (1, reach), stride=1, padding=(0, reach // 2))
    slope = (depth / deepest.clamp_min(1)) * support
    height, width = mask.shape[1:]
    slope = slope[:, 0, inside[1] : inside[1] + height, inside[0] : inside[0] + width]
    return torch.minimum(slope * slope * (3 - 2 * slope), mask)


def _spread(x: Tensor, square: bool) -> Tensor:
    """Largest value of each pixel [B, 1, H, W] and its 8 or 4 neighbours."""
    if square:
        return F.max_pool2d(x, 3, stride=1, padding=1)
    upright, level = F.max_pool2d(x, (3, 1), 1, (1, 0)), F.max_pool2d(x, (1, 3), 1, (0, 1))
    return torch.maximum(upright, level)


def _sides_inside(box: Box, picture: Size) -> Sides:
    """For left, top, right, bottom, 1 where this side of the box lies inside the picture."""
    right, bottom = picture[0] - box.left - box.width, picture[1] - box.top - box.height
    return min(box.left, 1), min(box.top, 1), min(right, 1), min(bottom, 1)


def _resized(image: Tensor, size: Size, mode: str = "bicubic") -> Tensor:
    """Pictures [B, H, W, C] at (width, height), clamped to [0, 1]; unchanged if they have that size."""
    if image.shape[1:3] == (size[1], size[0]):
        return image
    resized = F.interpolate(image.movedim(-1, 1), (size[1], size[0]), mode=mode, antialias=True)
    return resized.movedim(1, -1).clamp(0, 1)
