"""Tiles: where they lie, that their weights sum to one, and that they leave no seams in the VAE's pictures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.pipeline.vae import OVERLAP, TILE, VAE
from unipic_core.run.tiling import fades, spans, tiled

SIZES = st.tuples(st.integers(1, 60), st.integers(2, 20), st.integers(0, 19), st.sampled_from([1, 8])).filter(
    lambda s: s[2] < s[1]
)


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_tiles_cover_everything_and_share_enough(sizes: tuple[int, int, int, int]) -> None:
    length, tile, overlap, unit = (*(n * sizes[3] for n in sizes[:3]), sizes[3])
    side, begins = spans(length, tile, overlap, unit)
    assert begins[0] == 0
    assert begins[-1] + side == length
    assert side <= tile
    assert all(n % unit == 0 for n in (side, *begins))
    assert all(a < b <= a + side - overlap for a, b in pairwise(begins))
    total = torch.zeros(length)
    for begin, weight in zip(begins, fades(begins, side), strict=True):
        assert weight.min() >= 0
        total[begin : begin + side] += weight
    torch.testing.assert_close(total, torch.ones(length), rtol=0, atol=1e-6)


def test_tiles_are_no_longer_than_their_number_needs() -> None:
    assert spans(100, 100, 10) == (100, [0])
    assert spans(110, 100, 10) == (60, [0, 50])
    assert spans(190, 100, 10) == (100, [0, 90])
    assert spans(191, 100, 10) == (71, [0, 60, 120])
    assert spans(2048, TILE, OVERLAP, 8) == (1120, [0, 928])


def test_a_fade_is_linear_over_the_middle_half() -> None:
    left, right = fades([0, 12], 20)  # 8 are shared: 2 to the left alone, 4 between, 2 to the right alone
    expected = torch.tensor([1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8, 0, 0])
    torch.testing.assert_close(left, torch.cat([torch.ones(12), expected]))
    torch.testing.assert_close(right, torch.cat([1 - expected, torch.ones(12)]))


@pytest.mark.parametrize("sizes", [(100, 64, 8, 8), (96, 60, 8, 8), (96, 64, 4, 8), (96, 64, 64, 8), (96, 64, -8, 8)])
def test_sizes_that_cannot_be(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, the overlap smaller than the tile, got"):
        spans(*sizes)


def doubled(x: Tensor) -> Tensor:
    return x[:, :1, 0].repeat_interleave(2, -1).repeat_interleave(2, -2)


def averaged(x: Tensor) -> Tensor:
    return F.avg_pool2d(x[:, :, 0], 8)


@pytest.mark.parametrize("overlap", [0, 16, 40])
def test_a_local_function_is_the_same_in_tiles(overlap: int) -> None:
    """Pixel by pixel, with another size and other leading dimensions of what comes out."""
    x = torch.randn(2, 3, 1, 72, 104, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    same = tiled(lambda part: part, x, 48, overlap)
    torch.testing.assert_close(same, x)
    for scale, change in ((Fraction(2), doubled), (Fraction(1, 8), averaged)):
        torch.testing.assert_close(tiled(change, x, 48, overlap, scale), change(x))
    assert torch.equal(x, before)


def test_one_tile_at_a_time() -> None:
    seen: list[tuple[int, int]] = []

    def note(part: Tensor) -> Tensor:
        seen.append((part.shape[-2], part.shape[-1]))
        return part

    tiled(note, torch.zeros(1, 100, 50), 40, 8)
    assert seen == [(39, 29)] * 6
    assert max(max(side) for side in seen) <= 40


# --- the VAE ---

SIDE, SHARED = 192, 96


def pictures(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.rand(1, 3, 256, 320, generator=generator) * 2 - 1
    colours = torch.rand(1, 3, 4, 5, generator=generator) * 2 - 1
    return F.interpolate(colours, (256, 320), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE.from_pretrained(DEFAULT_MODEL / "vae", torch.float32)


def in_tiles(vae: VAE, overlap: int) -> VAE:
    small = VAE(vae.model)
    small.tile_above, small.tile, small.overlap = 0, SIDE, overlap
    return small


@dataclass
class Tiled:
    """What tiles change (`error`), of what (`whole`); unit: pixels of the picture in one element."""

    whole: Tensor
    error: Tensor
    overlap: int
    unit: int

    def begins_and_ends(self, axis: int) -> list[tuple[int, int]]:
        """Of what two tiles share, in elements."""
        side, begins = spans(self.whole.shape[axis] * self.unit, SIDE, self.overlap, 8)
        return [(begin // self.unit, (before + side) // self.unit) for before, begin in pairwise(begins)]

    def shared(self) -> Tensor:
        """[H, W], True where tiles lie over each other."""
        places = torch.zeros(self.whole.shape[-2:], dtype=torch.bool)
        for begin, end in self.begins_and_ends(-2):
            places[begin:end] = True
        for begin, end in self.begins_and_ends(-1):
            places[:, begin:end] = True
        return places

    def jump(self) -> float:
        """The largest mean step of the error across the edge of a tile, in steps of the picture itself."""
        steps, own = (x.diff(dim=-1).abs().mean((0, 1, 2)) for x in (self.error, self.whole))
        edges = [at - 1 for both in self.begins_and_ends(-1) for at in both]
        return float(steps[edges].max() / own.mean())


@torch.no_grad()
def compared(vae: VAE, picture: Tensor, overlap: int) -> dict[str, Tiled]:
    small, latents = in_tiles(vae, overlap), vae.encode(picture)
    decoded, errors = vae.decode(latents), small.encode(picture) - latents
    return {
        "encode": Tiled(latents[:, :, 0], errors[:, :, 0], overlap, 8),
        "decode": Tiled(decoded, small.decode(latents) - decoded, overlap, 1),
    }


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "way", "factor", "most"),
    [
        ("smooth", "encode", 1.2, 0.006),
        ("smooth", "decode", 1.6, 0.002),
        ("noise", "encode", 1.2, 0.002),
        ("noise", "decode", 4.5, 0.03),  # latents of noise are like nothing that the decoder was trained on
    ],
)
def test_no_seams(vae: VAE, kind: str, way: str, factor: float, most: float) -> None:
    """The error where tiles meet is at most `factor` of that elsewhere, and all of it `most` of the deviation.

    A hard cut between the same tiles steps at their edges, twenty times as high as a fade does.
    """
    made, cut = (compared(vae, pictures(kind), overlap)[way] for overlap in (SHARED, 0))
    places = made.shared()
    assert 0.2 < places.float().mean() < 0.8
    assert rms(made.error[..., places]) < factor * rms(made.error[..., ~places])
    assert rms(made.error) < most * float(made.whole.std())
    assert made.jump() < cut.jump() / 20


@torch.no_grad()
def test_what_fits_is_not_tiled(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are encoded together as far as `tile_above` pixels allow, and only larger ones in tiles."""
    rows, small = pictures("noise")[..., :64, :192].reshape(3, 3, 64, 64), VAE(vae.model)
    seen: list[tuple[int, ...]] = []
    for name in ("encode", "decode"):
        method = getattr(vae.model, name)
        monkeypatch.setattr(vae.model, name, lambda x, m=method: (seen.append(tuple(x.shape)), m(x))[1])
    latents = vae.encode(rows)
    assert seen.pop() == (3, 3, 64, 64)
    small.tile_above = 2 * 64 * 64
    torch.testing.assert_close(small.encode(rows), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(small.decode(latents), vae.decode(latents), rtol=0, atol=1e-5)
    assert [shape[0] for shape in seen] == [2, 1, 2, 1, 3]
    seen.clear()
    small.tile_above, small.tile, small.overlap = 64 * 64 - 1, 48, 16
    small.decode(small.encode(rows))
    assert seen == [(1, 3, 40, 40)] * 12 + [(1, 16, 1, 5, 5)] * 12
