"""Sizes of the references in the model: one pixel budget, divided by area as in the release, or equally."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..checks import finite
from ..errors import UniPicError
from .sequence import PIXELS_PER_TOKEN, nearest_multiple
from .vision import vision_tokens

Size = tuple[int, int]
"""(width, height) in pixels, in Pillow's order."""

MAX_REFERENCES = 6
"""Most references, as in the release."""

REFERENCE_MULTIPLE = 32
"""Divisor of the sides of resized references and of the default output, in pixels."""

DEFAULT_BUDGET = 1024
"""Side in pixels of the square that all references together may fill."""

RELEASE, EQUAL = "release", "equal"
SHARES = (RELEASE, EQUAL)
"""Division of the budget: one scale for all references, preserving their relative areas, as in the release; or equal
areas."""

WEIGHT_LIMITS = (0.01, 100.0)
"""Least and greatest weight of a reference, a factor on its share of the budget."""

STRIP = 8 * REFERENCE_MULTIPLE**2
"""Pixels that a thin reference may fill whatever its share and the budget: at its least height, one of 8:1."""

SMALL_PART = 4
"""A reference is small if it has fewer pixels than a square of a quarter of the budget's side."""


def reference_sizes(
    sizes: Sequence[Size],
    budget: int = DEFAULT_BUDGET,
    share: str = RELEASE,
    weights: Sequence[float] | None = None,
) -> list[Size]:
    """Sizes (w, h) of the references for the VAE: multiples of 32, at least 32, with about budget^2 pixels in all.

    share, weights (one per picture, None = 1 for all): see `scaled_sizes`. Raises UniPicError like it.
    """
    return [to_multiple(size) for size in scaled_sizes(sizes, budget, share, weights)]


def scaled_sizes(
    sizes: Sequence[Size],
    budget: int = DEFAULT_BUDGET,
    share: str = RELEASE,
    weights: Sequence[float] | None = None,
) -> list[Size]:
    """Sizes (w, h) of the first of the two resizes, before sides are rounded to multiples of 32.

    Picture i of area A_i and weight g_i is scaled by r_i, so that its pixels are
      release: r_i^2 A_i = budget^2 g_i A_i / sum_j g_j A_j (QwenImageEditPipeline of the release, with g = 1),
      equal:   r_i^2 A_i = budget^2 g_i / sum_j g_j.

    Raises UniPicError for wrong arguments, and for a picture so thin that at least 32 pixels of height (or width) take
    it far over its share.
    """
    _check(sizes, budget, share)
    gains = checked_weights(weights, len(sizes))
    scaled = _scaled(sizes, budget, share, gains)
    for index, size in enumerate(scaled):
        if not _fits(size, budget):
            width, height = to_multiple(size)
            raise UniPicError(
                f"image {index + 1} ({sizes[index][0]}x{sizes[index][1]}) is too thin: it would be seen at "
                f"{width}x{height}, far over its share of {budget}x{budget} pixels; crop it to at most "
                f"{_widest_that_fits(sizes, index, budget, share, gains)}"
            )
    return scaled


def _scaled(sizes: Sequence[Size], budget: int, share: str, gains: Sequence[float]) -> list[Size]:
    if not sizes:
        return []
    areas = [w * h for w, h in sizes]
    if share == RELEASE:
        r = budget / math.sqrt(sum(g * area for g, area in zip(gains, areas, strict=True)))
        scales = [r * math.sqrt(g) for g in gains]
    else:
        scales = [budget * math.sqrt(g / sum(gains) / area) for g, area in zip(gains, areas, strict=True)]
    return [(round(w * s), round(h * s)) for (w, h), s in zip(sizes, scales, strict=True)]


def _fits(scaled: Size, budget: int) -> bool:
    """True if a picture's rounded sides keep to its share, up to rounding to the nearest multiple, or to half of the
    whole budget, which pictures of usual aspects never exceed however small their share."""
    rounded, nearest = to_multiple(scaled), REFERENCE_MULTIPLE // 2
    most = max((scaled[0] + nearest) * (scaled[1] + nearest), budget**2 // 2, STRIP)
    return rounded[0] * rounded[1] <= most


def _widest_that_fits(sizes: Sequence[Size], index: int, budget: int, share: str, gains: Sequence[float]) -> str:
    """Size WxH to which a picture that is too thin can be cropped along its longer side."""
    width, height = sizes[index]

    def cropped(length: int) -> Size:
        return (length, height) if width > height else (width, length)

    fits, too_long = min(width, height), max(width, height)
    while too_long - fits > 1:
        length = (fits + too_long) // 2
        others = [*sizes[:index], cropped(length), *sizes[index + 1 :]]
        if _fits(_scaled(others, budget, share, gains)[index], budget):
            fits = length
        else:
            too_long = length
    return "{}x{}".format(*cropped(fits))


def vision_size(size: Size) -> Size:
    """Size of a twice-resized picture for the vision encoder: 28/32 of each side, a multiple of 28."""
    width, height = size
    return round(28 / 32 * width), round(28 / 32 * height)


def to_multiple(size: Size) -> Size:
    """Round both sides to multiples of 32, at least 32."""
    return nearest_multiple(size[0], REFERENCE_MULTIPLE), nearest_multiple(size[1], REFERENCE_MULTIPLE)


class ReferenceTokens(NamedTuple):
    """Numbers of tokens of references: image tokens in the network, vision tokens in the prompt."""

    image: int
    vision: int


def tokens_of_budget(budget: int) -> ReferenceTokens:
    """Tokens of one square reference that fills a budget; several have about as many in all. budget: side in pixels."""
    width, height = to_multiple((budget, budget))
    image = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    return ReferenceTokens(image, vision_tokens(*vision_size((width, height))))


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one weight per picture, 1 for each by default. Raises UniPicError for a wrong number of them or value."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise UniPicError(f"expected one weight for each of {count} pictures, got {len(weights)}")
    least, most = WEIGHT_LIMITS
    gains = [finite(weight) for weight in weights]
    for given, gain in zip(weights, gains, strict=True):
        if gain is None or not least <= gain <= most:
            raise UniPicError(
                f"a picture's weight should be a number from {least:g} to {most:g}, got {given!r}; to go without a "
                "picture, leave it out"
            )
    return [float(gain) for gain in gains if gain is not None]


def _check(sizes: Sequence[Size], budget: int, share: str) -> None:
    if budget < REFERENCE_MULTIPLE:
        raise UniPicError(f"the reference budget must be at least {REFERENCE_MULTIPLE} pixels, got {budget}")
    if share not in SHARES:
        raise UniPicError(f"references share the budget by {' or '.join(SHARES)}, got {share!r}")
    if len(sizes) > MAX_REFERENCES:
        raise UniPicError(f"at most {MAX_REFERENCES} pictures can be composed, got {len(sizes)}; leave some out")
    if any(w < 1 or h < 1 for w, h in sizes):
        raise UniPicError(f"every picture must be at least 1x1 pixels, got {list(sizes)}")


# --- messages about sizes --------------------------------------------------------------------------------------------


def described_sizes(sizes: Sequence[Size], seen: Sequence[Size]) -> str:
    """List number, size and resized size of each reference: "image 1 6000x4000 seen at 1248x832, image 2 ..."."""
    rows = [
        f"image {number} {given[0]}x{given[1]} seen at {here[0]}x{here[1]}"
        for number, (given, here) in enumerate(zip(sizes, seen, strict=True), start=1)
    ]
    return ", ".join(rows)


def small_references(sizes: Sequence[Size], seen: Sequence[Size], budget: int) -> Iterator[str]:
    """Warn of each reference with fewer pixels than a square of a quarter of the budget's side."""
    least = budget / SMALL_PART
    for number, (given, here) in enumerate(zip(sizes, seen, strict=True), start=1):
        if here[0] * here[1] < least**2:
            yield (
                f"image {number} ({given[0]}x{given[1]}) is seen at {here[0]}x{here[1]}, below {least:g}x{least:g}, so "
                "its details are lost: crop or shrink the larger pictures, choose the share equal, or give it more "
                "weight"
            )
