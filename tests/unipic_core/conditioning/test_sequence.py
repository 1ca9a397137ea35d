"""Packing is exactly invertible, shapes travel with tokens, errors name both numbers; RoPE positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    nearest_multiple,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_core.model.rope import image_positions, text_start


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_packing_is_exactly_invertible(b: int, c: int, h: int, w: int) -> None:
    x = torch.arange(b * c * 4 * h * w, dtype=torch.float32).reshape(b, c, 1, 2 * h, 2 * w)
    tokens = pack_latents(x)
    assert tokens.shape == (b, h * w, 4 * c)
    assert torch.equal(unpack_latents(tokens, LatentShape(1, h, w)), x)
    assert torch.equal(pack_latents(x[:, :, 0]), tokens)


def test_a_token_is_a_neighbourhood() -> None:
    x = torch.arange(2 * 4 * 4).reshape(1, 2, 1, 4, 4)
    token = pack_latents(x)[0, 1]  # row 0, column 1
    assert token.tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match="even, got 3x4"):
        pack_latents(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="one frame"):
        pack_latents(torch.zeros(1, 2, 2, 4, 4))
    with pytest.raises(ValueError, match="expected 6 tokens for 2x3, got 5"):
        unpack_latents(torch.zeros(1, 5, 8), LatentShape(1, 2, 3))


def test_sizes() -> None:
    assert LatentShape.of_pixels(96, 64) == LatentShape(1, 4, 6)
    with pytest.raises(ValueError, match="got 100x64; try 96x64"):
        LatentShape.of_pixels(100, 64)
    with pytest.raises(ValueError, match="positive"):
        LatentShape.of_pixels(-16, 64)
    assert [nearest_multiple(v, 32) for v in (0, 3, 16, 48, 49, 80)] == [32, 32, 32, 64, 64, 64]


def test_sequence_with_references() -> None:
    target, ref = LatentShape(1, 2, 3), torch.randn(1, 2, 1, 4, 8)
    packed = pack_with_references(torch.zeros(2, 6, 8), target, [[ref, ref[0]], []])
    assert packed.tokens.shape == (2, 6 + 8 + 8, 8)
    assert packed.lengths == (22, 6)
    assert packed.shapes == ((target, LatentShape(1, 2, 4), LatentShape(1, 2, 4)), (target,))
    assert packed.mask is not None
    assert packed.mask.sum(1).tolist() == [22, 6]
    assert torch.equal(packed.tokens[0, 6:14], pack_latents(ref)[0])
    moved = packed.with_target(torch.ones(2, 6, 8))
    assert bool((moved.target == 1).all())
    assert bool((packed.target == 0).all())
    assert torch.equal(moved.tokens[:, 6:], packed.tokens[:, 6:])
    with pytest.raises(ValueError, match="expected 6 target tokens, got 5"):
        packed.with_target(torch.ones(2, 5, 8))
    assert pack_with_references(torch.zeros(1, 6, 8), target).mask is None


def test_sequence_errors() -> None:
    target = LatentShape(1, 2, 3)
    with pytest.raises(ValueError, match="for 2 samples, got 1 and 2"):
        pack_with_references(torch.zeros(2, 6, 8), target, [[]])
    with pytest.raises(ValueError, match="expected target shapes of 5 tokens"):
        pack_with_references(torch.zeros(1, 5, 8), target)


def test_text_conditions() -> None:
    a, b = TextCond(torch.ones(1, 3, 4)), TextCond(torch.full((1, 5, 4), 2.0))
    both = TextCond.stack([a, b])
    assert both.mask is not None
    assert both.mask.sum(1).tolist() == [3, 5]
    assert TextCond.stack([both]).embeds.shape == (2, 5, 4)
    assert TextCond.stack([a, a]).mask is None
    assert a.expand(3).embeds.shape == (3, 3, 4)


def test_positions() -> None:
    shapes = (LatentShape(1, 2, 3), LatentShape(1, 1, 8))
    positions = image_positions(shapes)
    assert positions[:6].tolist() == [[0, y, x] for y in (-1, 0) for x in (-2, -1, 0)]
    assert positions[6:].tolist() == [[1, -1, x] for x in range(-4, 4)]
    assert text_start(shapes) == 4  # over all pictures, not the target alone
    assert image_positions(shapes, layered=True)[6:, 0].tolist() == [-1] * 8
