"""Apply a function to a large picture in overlapping tiles, cross-faded."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: Fraction = Fraction(1)
) -> Tensor:
    """Apply `function` to equal, overlapping tiles of x [..., H, W], cross-faded in float32: [..., scale H, scale W].

    function: tiles [..., h, w] -> [..., scale h, scale w], with any leading dimensions. tile: longest side of a tile,
    overlap: least overlap of neighbours, both in pixels of x. One tile is in memory at a time beside the result. Where
    tiles do not overlap the result equals the function's output. Raises ValueError if a side of x, `tile` or `overlap`
    is not a multiple of the denominator of `scale`, or if not 0 <= overlap < tile.
    """
    height, width = x.shape[-2:]
    high, tops = spans(height, tile, overlap, scale.denominator)
    wide, lefts = spans(width, tile, overlap, scale.denominator)
    rows = [int(top * scale) for top in tops]
    columns = [int(left * scale) for left in lefts]
    down, across = fades(rows, int(high * scale)), fades(columns, int(wide * scale))
    result: Tensor | None = None
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = function(x[..., top : top + high, left : left + wide]).float()
            if result is None:
                result = part.new_zeros(*part.shape[:-2], int(height * scale), int(width * scale))
            place = result[..., rows[i] : rows[i] + part.shape[-2], columns[j] : columns[j] + part.shape[-1]]
            place += part * (down[i][:, None] * across[j]).to(part.device)
    assert result is not None  # there is always a first tile
    return result


def spans(length: int, tile: int, overlap: int, unit: int = 1) -> tuple[int, list[int]]:
    """Divide `length` into equal tiles: (side, starts), all multiples of `unit`.

    The number of tiles is the least for which sides of at most `tile` overlap by at least `overlap`; the side is the
    least for that number. Raises ValueError like `tiled`.
    """
    if any(n % unit for n in (length, tile, overlap)) or not 0 <= overlap < tile:
        raise ValueError(
            f"expected a length, a tile and an overlap that are multiples of {unit}, the overlap smaller than the "
            f"tile, got {length}, {tile} and {overlap}"
        )
    if length <= tile:
        return length, [0]
    count = ceil((length - overlap) / (tile - overlap))
    side = ceil((length + (count - 1) * overlap) / count / unit) * unit
    room = (length - side) // unit
    return side, [room * i // (count - 1) * unit for i in range(count)]


def fades(begins: list[int], side: int) -> list[Tensor]:
    """Cross-fade weights [side] of each tile along one axis; they sum to 1 at every position.

    In the overlap of two tiles, the quarter next to a tile's edge has weight 0, since a network is least accurate at
    the edge of its input; over the half between the quarters the weights are linear.
    """
    weights = torch.zeros(len(begins), begins[-1] + side)
    at = torch.arange(side) + 0.5
    for i, begin in enumerate(begins):
        shared_before = begins[i - 1] + side - begin if i else 0
        shared_after = begin + side - begins[i + 1] if i + 1 < len(begins) else 0
        weights[i, begin : begin + side] = _rise(at, shared_before) * _rise(side - at, shared_after)
    weights /= weights.sum(0)  # where three tiles overlap the sum is above 1
    return [weights[i, begin : begin + side] for i, begin in enumerate(begins)]


def _rise(from_edge: Tensor, shared: int) -> Tensor:
    """Ramp over an overlap of `shared` pixels: 0 in its first quarter, 1 in its last, linear between."""
    return ((from_edge - shared / 4) / (shared / 2)).clamp(0, 1) if shared else torch.ones_like(from_edge)
