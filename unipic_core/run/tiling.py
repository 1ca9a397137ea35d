"""A function of large pictures, tile by tile, with tiles that fade into each other."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: Fraction = Fraction(1)
) -> Tensor:
    """`function` over equal, overlapping tiles of x [..., H, W], cross-faded in float32: [..., scale H, scale W].

    function: tiles [..., h, w] -> [..., scale h, scale w], with any leading dimensions. tile, overlap: the longest side
    of a tile and the least that neighbours share, in pixels of x. Beside the result one tile is in memory at a time.
    Where a tile lies alone the result is the function's own. Raises ValueError if a side of x, `tile` or `overlap` is
    not a multiple of the denominator of `scale`, or if not 0 <= overlap < tile.
    """
    height, width = x.shape[-2:]
    high, tops = spans(height, tile, overlap, scale.denominator)
    wide, lefts = spans(width, tile, overlap, scale.denominator)
    rows = [int(top * scale) for top in tops]
    columns = [int(left * scale) for left in lefts]
    down, across = fades(rows, int(high * scale)), fades(columns, int(wide * scale))
    made: Tensor | None = None
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = function(x[..., top : top + high, left : left + wide]).float()
            if made is None:
                made = part.new_zeros(*part.shape[:-2], int(height * scale), int(width * scale))
            place = made[..., rows[i] : rows[i] + part.shape[-2], columns[j] : columns[j] + part.shape[-1]]
            place += part * (down[i][:, None] * across[j]).to(part.device)
    assert made is not None  # there is always a first tile
    return made


def spans(length: int, tile: int, overlap: int, unit: int = 1) -> tuple[int, list[int]]:
    """The side of equal tiles over `length`, and where each begins: all multiples of `unit`.

    As many tiles as sides of at most `tile` need to share at least `overlap` with their neighbours, then no longer than
    that many need. ValueError as `tiled`.
    """
    if any(n % unit for n in (length, tile, overlap)) or not 0 <= overlap < tile:
        raise ValueError(
            f"expected a length, a tile and an overlap that are multiples of {unit}, the overlap the smaller, "
            f"got {length}, {tile} and {overlap}"
        )
    if length <= tile:
        return length, [0]
    count = ceil((length - overlap) / (tile - overlap))
    side = ceil((length + (count - 1) * overlap) / count / unit) * unit
    room = (length - side) // unit
    return side, [room * i // (count - 1) * unit for i in range(count)]


def fades(begins: list[int], side: int) -> list[Tensor]:
    """Weights [side] of the tiles of one axis: 1 in sum at every place.

    Of what two tiles share, each leaves the quarter at its own edge to the other, since a network is least right where
    it sees nothing beyond; over the half between the weights are linear.
    """
    weights = torch.zeros(len(begins), begins[-1] + side)
    at = torch.arange(side) + 0.5
    for i, begin in enumerate(begins):
        shared_before = begins[i - 1] + side - begin if i else 0
        shared_after = begin + side - begins[i + 1] if i + 1 < len(begins) else 0
        weights[i, begin : begin + side] = _rise(at, shared_before) * _rise(side - at, shared_after)
    weights /= weights.sum(0)  # three tiles can meet, and have more than 1 in sum
    return [weights[i, begin : begin + side] for i, begin in enumerate(begins)]


def _rise(from_edge: Tensor, shared: int) -> Tensor:
    """0 up to a quarter of what is shared, 1 from three quarters on."""
    return ((from_edge - shared / 4) / (shared / 2)).clamp(0, 1) if shared else torch.ones_like(from_edge)
