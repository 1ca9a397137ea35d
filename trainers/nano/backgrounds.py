"""Drawn backgrounds: smooth, bright places with a known ground line, at any size.

A place is a function ``(canvas, rng) -> None`` drawing in unit coordinates (x to the right, y down, both 0 to 1).
Pictures are drawn at twice the size and averaged down for anti-aliasing.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Background:
    """A place and the seed of its details. Equal specs draw equal pictures.

    ``mood`` is "day", "sunset" or "night"; it changes the light of the places that have a sky.
    """

    kind: str
    seed: int
    mood: str = "day"

    @property
    def place(self) -> Place:
        return PLACES[self.kind]


@dataclass(frozen=True)
class Place:
    """Kind of background. ground: fraction of the height where feet stand; preposition: before its name."""

    name: str
    preposition: str
    ground: float
    draw: Callable[[Canvas, np.random.Generator], None]


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in turns; the result in 0..255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return int(red * 255), int(green * 255), int(blue * 255)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """``a`` with ``share`` of ``b``."""
    return (
        int(a[0] + (b[0] - a[0]) * share),
        int(a[1] + (b[1] - a[1]) * share),
        int(a[2] + (b[2] - a[2]) * share),
    )


@cache
def soft_disc() -> Image.Image:
    """A soft disc, L mode 64 x 64: 255 in the middle, 0 at the rim; stretched for glows and shadows."""
    axis = (np.arange(64) + 0.5) / 32 - 1
    radius = np.hypot(axis[:, None], axis[None, :])
    falloff = np.clip(1 - radius, 0, 1)
    return Image.fromarray((255 * falloff * falloff * (3 - 2 * falloff)).astype(np.uint8))


class Canvas:
    """A picture being drawn in unit coordinates."""

    def __init__(self, width: int, height: int, mood: str) -> None:
        self.image = Image.new("RGB", (width, height))
        self.pen = ImageDraw.Draw(self.image)
        self.mood = mood

    def _x(self, x: float) -> int:
        return round(x * self.image.width)

    def _y(self, y: float) -> int:
        return round(y * self.image.height)

    def gradient(self, top: float, bottom: float, stops: Sequence[Colour]) -> None:
        """A vertical blend through evenly spaced colours, over the full width."""
        strip = Image.fromarray(np.array(stops, np.uint8)[:, None])
        band = (self.image.width, max(1, self._y(bottom) - self._y(top)))
        # Sampling between the centres of the outer stops makes the band begin and end in exactly these colours.
        blend = strip.resize(band, Image.Resampling.BILINEAR, box=(0, 0.5, 1, len(stops) - 0.5))
        self.image.paste(blend, (0, self._y(top)))

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.pen.rectangle((self._x(left), self._y(top), self._x(right) - 1, self._y(bottom) - 1), fill=fill)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        self.pen.polygon([(self._x(x), self._y(y)) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        """Draw an ellipse by its centre and full width and height, as fractions of the picture."""
        box = (self._x(x - width / 2), self._y(y - height / 2), self._x(x + width / 2), self._y(y + height / 2))
        self.pen.ellipse(box, fill=fill)

    def disc(self, x: float, y: float, diameter: float, fill: Colour) -> None:
        """A circle in pictures of any shape; the diameter is a fraction of the width."""
        self.ellipse(x, y, diameter, diameter * self.image.width / self.image.height, fill)

    def glow(self, x: float, y: float, width: float, height: float, colour: Colour, strength: float) -> None:
        """A soft spot of light (or, with a dark colour, of shade)."""
        size = (max(2, self._x(width)), max(2, self._y(height)))
        spot = soft_disc().resize(size, Image.Resampling.BILINEAR).point(lambda value: value * strength)
        self.image.paste(colour, (self._x(x) - size[0] // 2, self._y(y) - size[1] // 2), spot)

    def ridge(self, base: float, height: float, phases: Iterable[float], fill: Colour) -> None:
        """Rolling hills: a sum of sines, filled down to the bottom edge."""
        x = np.linspace(0, 1, 33)
        waves = sum(np.sin(2 * np.pi * ((i + 1) * 0.8 * x + phase)) / (i + 1) for i, phase in enumerate(phases))
        y = base - height * (0.5 + 0.33 * np.asarray(waves))
        self.polygon([*zip(x.tolist(), y.tolist(), strict=True), (1, 1), (0, 1)], fill)

    def cloud(self, x: float, y: float, width: float, fill: Colour) -> None:
        for dx, dy, size in ((-0.3, 0.02, 0.5), (0.0, -0.05, 0.62), (0.3, 0.01, 0.5)):
            self.ellipse(x + dx * width, y + dy * width, size * width, size * width * 0.55, fill)


SKIES: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((70, 150, 235), (140, 200, 250), (215, 238, 253)),
    "sunset": ((88, 62, 140), (235, 112, 96), (255, 200, 120)),
    "night": ((12, 16, 52), (26, 36, 92), (58, 68, 130)),
}
SHADE = {"day": 0.0, "sunset": 0.22, "night": 0.6}
SHADE_COLOUR = {"day": (255, 255, 255), "sunset": (190, 80, 70), "night": (14, 20, 62)}


def _lit(canvas: Canvas, colour: Colour) -> Colour:
    """A surface's colour under the canvas's mood."""
    return mix(colour, SHADE_COLOUR[canvas.mood], SHADE[canvas.mood])


def _sky(canvas: Canvas, rng: np.random.Generator, horizon: float, *, clouds: bool = True) -> None:
    """The upper part: a blend, a sun or moon on one side, clouds or stars."""
    top, middle, low = SKIES[canvas.mood]
    tint = hsv(rng.uniform(0.5, 0.66), 0.5, 0.95)
    canvas.gradient(0, horizon, [mix(top, tint, rng.uniform(0, 0.3)), middle, low])
    canvas.rectangle(0, horizon, 1, 1, low)
    x = rng.choice([0.18, 0.82]) + rng.uniform(-0.06, 0.06)
    y = horizon - rng.uniform(0.08, 0.14) if canvas.mood == "sunset" else rng.uniform(0.12, 0.2)
    light = {"day": (255, 246, 190), "sunset": (255, 236, 150), "night": (232, 236, 250)}[canvas.mood]
    canvas.glow(x, y, 0.5, 0.5, light, 0.6)
    canvas.disc(x, y, rng.uniform(0.11, 0.16), light)
    if canvas.mood == "night":
        for star_x, star_y in rng.uniform(0.03, 0.97, (7, 2)):
            canvas.disc(star_x, star_y * horizon * 0.8, 0.014, (240, 240, 255))
    elif clouds:
        white = mix((255, 255, 255), low, 0.25)
        for cloud_x in rng.uniform(0.1, 0.9, rng.integers(1, 4)):
            canvas.cloud(cloud_x, rng.uniform(0.1, horizon * 0.6), rng.uniform(0.2, 0.34), white)


def _floor(canvas: Canvas, top: float, near: Colour) -> None:
    """The ground: lighter far away, darker at the picture's lower edge."""
    canvas.gradient(top, 1, [mix(near, (255, 255, 255), 0.2), near, mix(near, (0, 0, 0), 0.12)])


def room(canvas: Canvas, rng: np.random.Generator) -> None:
    """Wall, floor with skirting, and a window, a picture or a lamp."""
    hue, floor_y = rng.random(), rng.uniform(0.68, 0.74)
    wall = hsv(hue, rng.uniform(0.15, 0.45), rng.uniform(0.8, 0.97))
    canvas.gradient(0, floor_y, [mix(wall, (255, 255, 255), 0.15), mix(wall, (0, 0, 0), 0.1)])
    _floor(canvas, floor_y, hsv(rng.uniform(0.05, 0.11), rng.uniform(0.35, 0.6), rng.uniform(0.5, 0.8)))
    canvas.rectangle(0, floor_y - 0.03, 1, floor_y, mix(wall, (255, 255, 255), 0.6))
    left, detail = rng.choice([0.08, 0.6]), rng.integers(3)
    if detail == 0:
        canvas.rectangle(left, 0.12, left + 0.32, 0.5, (250, 248, 242))
        canvas.rectangle(left + 0.02, 0.14, left + 0.3, 0.48, (150, 208, 246))
        canvas.rectangle(left + 0.15, 0.12, left + 0.17, 0.5, (250, 248, 242))
    elif detail == 1:
        canvas.rectangle(left, 0.14, left + 0.3, 0.42, (120, 84, 56))
        canvas.rectangle(left + 0.03, 0.17, left + 0.27, 0.39, hsv(hue + rng.uniform(0.3, 0.7), 0.55, 0.9))
    else:
        canvas.glow(left + 0.15, 0.25, 0.7, 0.7, (255, 240, 190), 0.8)
        shade = [(left + 0.09, 0.1), (left + 0.21, 0.1), (left + 0.27, 0.25), (left + 0.03, 0.25)]
        canvas.polygon(shade, (255, 226, 150))


def field(canvas: Canvas, rng: np.random.Generator) -> None:
    """Hills under the sky and a meadow before them."""
    horizon = rng.uniform(0.58, 0.64)
    _sky(canvas, rng, horizon)
    green = hsv(rng.uniform(0.22, 0.36), rng.uniform(0.45, 0.7), rng.uniform(0.6, 0.82))
    canvas.ridge(horizon + 0.04, 0.18, rng.random(2), _lit(canvas, mix(green, (120, 160, 190), 0.4)))
    _floor(canvas, horizon + 0.04, _lit(canvas, green))


def beach(canvas: Canvas, rng: np.random.Generator) -> None:
    """Sky, a strip of sea, sand."""
    horizon = rng.uniform(0.48, 0.54)
    _sky(canvas, rng, horizon)
    sea = _lit(canvas, hsv(rng.uniform(0.5, 0.58), 0.65, rng.uniform(0.7, 0.85)))
    canvas.gradient(horizon, 0.72, [sea, mix(sea, (255, 255, 255), 0.3)])
    sand = _lit(canvas, hsv(rng.uniform(0.09, 0.13), rng.uniform(0.28, 0.42), 0.95))
    _floor(canvas, 0.7, sand)
    canvas.ellipse(0.5, 0.71, 1.5, 0.05, mix(sand, (255, 255, 255), 0.55))


def sea(canvas: Canvas, rng: np.random.Generator) -> None:
    """Open water to a far horizon, with a few broad waves."""
    horizon = rng.uniform(0.42, 0.5)
    _sky(canvas, rng, horizon)
    water = _lit(canvas, hsv(rng.uniform(0.52, 0.62), 0.7, rng.uniform(0.6, 0.8)))
    _floor(canvas, horizon, water)
    for y in np.linspace(horizon + 0.1, 0.95, 4):
        canvas.ellipse(rng.uniform(0.1, 0.9), y, rng.uniform(0.3, 0.5), 0.02, mix(water, (255, 255, 255), 0.3))


def sky(canvas: Canvas, rng: np.random.Generator) -> None:
    """Above the clouds, standing on a bank of them."""
    _sky(canvas, rng, 0.9)
    white = _lit(canvas, (250, 252, 255))
    for x in np.linspace(0, 1, 5):
        canvas.ellipse(x + rng.uniform(-0.05, 0.05), 0.86, 0.36, 0.2, mix(white, (150, 190, 235), 0.25))
    canvas.gradient(0.86, 1, [white, mix(white, (150, 190, 235), 0.2)])
    for x in np.linspace(0.1, 0.9, 4):
        canvas.ellipse(x + rng.uniform(-0.05, 0.05), 0.88, 0.34, 0.14, white)


def table(canvas: Canvas, rng: np.random.Generator) -> None:
    """A table top before a plain, softly lit wall."""
    edge = rng.uniform(0.62, 0.68)
    wall = hsv(rng.random(), rng.uniform(0.2, 0.5), rng.uniform(0.65, 0.92))
    canvas.gradient(0, edge, [wall, mix(wall, (0, 0, 0), 0.15)])
    canvas.glow(rng.choice([0.2, 0.8]), 0.15, 0.9, 0.9, (255, 250, 230), 0.55)
    wood = hsv(rng.uniform(0.04, 0.11), rng.uniform(0.3, 0.65), rng.uniform(0.45, 0.9))
    _floor(canvas, edge, wood)
    canvas.rectangle(0, 0.95, 1, 1, mix(wood, (0, 0, 0), 0.35))


def city(canvas: Canvas, rng: np.random.Generator) -> None:
    """A row of houses with windows behind a street."""
    street = 0.76
    _sky(canvas, rng, street, clouds=False)
    window = {"day": (196, 226, 246), "sunset": (255, 214, 130), "night": (255, 222, 120)}[canvas.mood]
    hue = rng.random()
    edges = np.linspace(0, 1, 6)
    for left, right in pairwise(edges.tolist()):
        top = rng.uniform(0.24, 0.5)
        wall = hsv(hue + rng.uniform(-0.1, 0.1), 0.35, rng.uniform(0.5, 0.8))
        canvas.rectangle(left, top, right, street, _lit(canvas, wall))
        for y in np.arange(top + 0.05, street - 0.1, 0.12):
            canvas.rectangle(left + 0.04, y, left + 0.08, y + 0.05, window)
            canvas.rectangle(right - 0.08, y, right - 0.04, y + 0.05, window)
    _floor(canvas, street, _lit(canvas, hsv(0.62, 0.08, rng.uniform(0.5, 0.65))))


def snow(canvas: Canvas, rng: np.random.Generator) -> None:
    """White hills, pale peaks and a few firs."""
    _sky(canvas, rng, 0.62, clouds=False)
    blue = _lit(canvas, hsv(0.6, rng.uniform(0.15, 0.3), 0.88))
    for x in rng.uniform(0.0, 1.0, 3):
        canvas.polygon([(x - 0.35, 0.66), (x, rng.uniform(0.28, 0.42)), (x + 0.35, 0.66)], blue)
    white = _lit(canvas, (244, 248, 254))
    canvas.ridge(0.68, 0.1, rng.random(2), mix(white, blue, 0.3))
    for x in (rng.uniform(0.04, 0.2), rng.uniform(0.8, 0.96)):
        _fir(canvas, x, 0.7, rng.uniform(0.2, 0.3), _lit(canvas, (60, 120, 100)))
    _floor(canvas, 0.7, white)


def desert(canvas: Canvas, rng: np.random.Generator) -> None:
    """Dunes and, on one side, a cactus."""
    _sky(canvas, rng, 0.6, clouds=False)
    sand = _lit(canvas, hsv(rng.uniform(0.06, 0.11), rng.uniform(0.45, 0.6), rng.uniform(0.85, 0.95)))
    canvas.ridge(0.64, 0.16, rng.random(2), mix(sand, (150, 80, 60), 0.25))
    canvas.ridge(0.72, 0.1, rng.random(2), mix(sand, (150, 80, 60), 0.1))
    _floor(canvas, 0.72, sand)
    x, green = rng.choice([0.1, 0.9]), _lit(canvas, (80, 140, 90))
    canvas.rectangle(x - 0.025, 0.42, x + 0.025, 0.76, green)
    canvas.rectangle(x - 0.09, 0.5, x - 0.055, 0.6, green)
    canvas.rectangle(x - 0.09, 0.58, x, 0.61, green)


def _fir(canvas: Canvas, x: float, foot: float, height: float, colour: Colour) -> None:
    canvas.rectangle(x - 0.015, foot - 0.05, x + 0.015, foot + 0.02, (96, 70, 56))
    for step in range(3):
        top = foot - height + step * height * 0.25
        half = height * (0.2 + 0.08 * step)
        canvas.polygon([(x - half, top + height * 0.42), (x, top), (x + half, top + height * 0.42)], colour)


def forest(canvas: Canvas, rng: np.random.Generator) -> None:
    """Firs in two rows with light between them."""
    green = hsv(rng.uniform(0.27, 0.42), rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.7))
    canvas.gradient(0, 0.78, [_lit(canvas, mix(green, (235, 250, 215), share)) for share in (0.55, 0.8, 0.7)])
    canvas.glow(rng.choice([0.25, 0.75]), 0.2, 0.9, 0.9, _lit(canvas, (255, 252, 215)), 0.7)
    for share, foot, height in ((0.45, 0.74, 0.5), (0.0, 0.8, 0.62)):
        for x in np.linspace(0.0, 1.0, 5) + rng.uniform(-0.07, 0.07, 5):
            colour = mix(green, (225, 240, 200), share)
            _fir(canvas, x, foot, height * rng.uniform(0.85, 1.1), _lit(canvas, mix(colour, (0, 30, 20), 0.25)))
    _floor(canvas, 0.76, _lit(canvas, mix(green, (120, 90, 50), 0.3)))


def stage(canvas: Canvas, rng: np.random.Generator) -> None:
    """A dark hall, curtains at the sides, one beam of light."""
    hue = rng.random()
    dark = hsv(hue, 0.5, rng.uniform(0.22, 0.4))
    canvas.gradient(0, 0.74, [mix(dark, (0, 0, 0), 0.4), dark])
    beam = mix(dark, (255, 246, 210), 0.3)
    x = rng.uniform(0.35, 0.65)
    canvas.polygon([(x - 0.04, 0), (x + 0.04, 0), (0.8, 0.78), (0.2, 0.78)], beam)
    curtain = hsv(rng.choice([0.0, 0.97, 0.62, 0.78, 0.45]), 0.75, 0.68)
    for left in (0.0, 0.05, 0.1, 0.84, 0.89, 0.94):
        shade = 0.0 if left in (0.0, 0.1, 0.89) else 0.2
        canvas.rectangle(left, 0, left + 0.06, 0.78, mix(curtain, (0, 0, 0), shade))
    _floor(canvas, 0.74, hsv(rng.uniform(0.05, 0.09), 0.5, rng.uniform(0.45, 0.65)))
    canvas.ellipse(0.5, 0.86, 0.72, 0.14, mix(hsv(0.08, 0.4, 0.7), (255, 246, 210), 0.5))


def garden(canvas: Canvas, rng: np.random.Generator) -> None:
    """A fence with bushes behind it and grass before it."""
    _sky(canvas, rng, 0.62)
    green = hsv(rng.uniform(0.25, 0.38), 0.55, rng.uniform(0.5, 0.7))
    for x in np.linspace(0, 1, 5):
        canvas.ellipse(x + rng.uniform(-0.06, 0.06), 0.56, 0.34, rng.uniform(0.22, 0.36), _lit(canvas, green))
    canvas.rectangle(0, 0.57, 1, 0.74, _lit(canvas, mix(green, (0, 0, 0), 0.1)))
    fence = _lit(canvas, mix(hsv(rng.random(), 0.25, 0.95), (255, 255, 255), 0.5))
    canvas.rectangle(0, 0.56, 1, 0.59, mix(fence, (0, 0, 0), 0.1))
    for left in np.linspace(0.02, 0.92, 10):
        canvas.rectangle(left, 0.5, left + 0.05, 0.74, fence)
    _floor(canvas, 0.72, _lit(canvas, mix(green, (180, 230, 90), 0.35)))


PLACES: dict[str, Place] = {
    "room": Place("room", "in", 0.93, room),
    "field": Place("field", "in", 0.93, field),
    "beach": Place("beach", "on", 0.94, beach),
    "sea": Place("sea", "on", 0.92, sea),
    "sky": Place("sky", "in", 0.95, sky),
    "table": Place("table", "on", 0.9, table),
    "city": Place("city", "in", 0.94, city),
    "snow": Place("snow", "in", 0.93, snow),
    "desert": Place("desert", "in", 0.93, desert),
    "forest": Place("forest", "in", 0.93, forest),
    "stage": Place("stage", "on", 0.92, stage),
    "garden": Place("garden", "in", 0.94, garden),
}
WITH_MOOD = ("field", "beach", "sea", "sky", "city", "snow", "desert", "forest", "garden")

# Backgrounds that an edit names in words: one fixed picture each, so that the words determine the target.
CANONICAL: dict[str, Background] = {
    "on a beach by day": Background("beach", 3),
    "on a beach at sunset": Background("beach", 3, "sunset"),
    "on a beach at night": Background("beach", 3, "night"),
    "in a green field": Background("field", 4),
    "in a city at night": Background("city", 5, "night"),
    "in a city by day": Background("city", 5),
    "in the snow": Background("snow", 6),
    "in a desert": Background("desert", 7),
    "in a forest": Background("forest", 8),
    "on a stage": Background("stage", 9),
    "in a room": Background("room", 10),
    "in a garden": Background("garden", 11),
    "on a wooden table": Background("table", 12),
    "above the clouds": Background("sky", 13),
    "on the open sea": Background("sea", 14),
}


def sample_background(rng: np.random.Generator) -> Background:
    """Draw a random place; outdoors at sunset or at night in three cases of ten."""
    kind = str(rng.choice(list(PLACES)))
    mood = str(rng.choice(["day", "sunset", "night"], p=[0.7, 0.18, 0.12])) if kind in WITH_MOOD else "day"
    return Background(kind, int(rng.integers(1 << 31)), mood)


def draw(background: Background, width: int, height: int) -> Image.Image:
    """Draw a background as an RGB picture of ``width`` x ``height``."""
    canvas = Canvas(width * SUPERSAMPLING, height * SUPERSAMPLING, background.mood)
    background.place.draw(canvas, np.random.default_rng(background.seed))
    return canvas.image.reduce(SUPERSAMPLING)
