"""Attention bias of the target's queries on the references' keys: strengths and regions of references.

The logarithm of a reference's strength is added to the scores of the target's tokens on its keys, so that before the
softmax is normalised its weights are multiplied by the strength. Text and references attend as before, so keys and
values that no step changes do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..conditioning.influence import GRID, Influence
from ..conditioning.sequence import LatentShape

OUTSIDE = 0.0
"""Strength of a reference outside its region, chosen by tests/benchmarks/placement.py."""

Interval = tuple[float, float]
"""Latest and earliest t at which an influence counts, both included: the run goes from t = 1 to 0."""

_TOLERANCE = 1e-6


def reference_bias(
    influences: Sequence[Influence], intervals: Sequence[Interval], shape: LatentShape, t: float
) -> Tensor | None:
    """Log strengths [N_O, K] float32 of K references for each token of the target at time t; None if all are 0.

    shape: of the target.
    """
    counting = [
        influence if latest - _TOLERANCE <= t <= first + _TOLERANCE else Influence()
        for influence, (first, latest) in zip(influences, intervals, strict=True)
    ]
    if all(influence.neutral for influence in counting):
        return None
    return torch.stack([_strengths(influence, shape) for influence in counting], dim=1).log()


def _strengths(influence: Influence, shape: LatentShape) -> Tensor:
    """Strength [N_O] of a reference in each token: multiplied by the share of the token that its region covers."""
    strengths = torch.full((shape.height, shape.width), influence.strength)
    if influence.region is None:
        return strengths.flatten()
    region = influence.region
    rows = _cover(region.top, region.bottom, shape.height)
    columns = _cover(region.left, region.right, shape.width)
    return (strengths * (rows[:, None] * columns).clamp_min(OUTSIDE)).flatten()


def _cover(start: float, stop: float, cells: int) -> Tensor:
    """Share of each of `cells` cells between two places of the grid, relative to the most covered one."""
    edges = torch.linspace(0, GRID, cells + 1)
    cover = (edges[1:].clamp_max(stop) - edges[:-1].clamp_min(start)).clamp_min(0)
    return cover / cover.max()


def attention_bias(
    bias: Tensor, reference_tokens: Sequence[int], queries: int, first_query: int, keys: int, first_key: int
) -> Tensor:
    """Attention bias [queries, keys] from log strengths [N_O, K], 0 for all other tokens.

    reference_tokens: number of tokens of each reference; first_query, first_key: index of the first target token among
    the queries, and of the first reference token among the keys.
    """
    per_key = bias.repeat_interleave(torch.tensor(reference_tokens, device=bias.device), dim=1)
    scores = bias.new_zeros(queries, keys)
    scores[first_query : first_query + len(bias), first_key : first_key + per_key.shape[1]] = per_key
    return scores


def joined_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Bias [1 or B, 1, queries, keys] from a bias [queries, keys] and a mask [B, 1, 1, keys], True = attend."""
    whole = bias[None, None]
    return whole if mask is None else whole.masked_fill(~mask, -math.inf)
