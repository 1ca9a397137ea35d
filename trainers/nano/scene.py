"""Description of a scene: items with looks and positions, an edit, and the instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unipic_core.conditioning.images import output_size

from .backgrounds import Background, Colour
from .catalogue import Asset
from .layout import OTHER_SHAPE_UNIT, Anchor

Shape = tuple[int, int]
"""Width and height as a ratio."""

SQUARE: Shape = (1, 1)

LIGHTS: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "evening": (1.05, 0.78, 0.55),
    "night": (0.42, 0.48, 0.75),
}
"""Factors of red, green and blue."""


@dataclass(frozen=True)
class Look:
    """Augmentation of one asset, equal in its reference and in its target.

    ``hue``: rotation in turns; ``saturation`` and ``brightness``: factors; ``stretch``: width over height, relative.
    """

    hue: float = 0.0
    saturation: float = 1.0
    brightness: float = 1.0
    stretch: float = 1.0


@dataclass(frozen=True)
class Item:
    """One asset in a scene. ``paper`` and ``fill``: colour behind it in its reference and the share it fills there.

    ``mirror``: it faces the other way than its reference.
    """

    asset: Asset
    look: Look
    relation: str
    anchor: Anchor
    paper: Colour = (255, 255, 255)
    fill: float = 0.93
    mirror: bool = False


@dataclass(frozen=True)
class Edit:
    """Single-image edit: the changed item (index; None: the background) and its new value."""

    kind: Literal["move", "remove", "recolour", "replace_background"]
    item: int | None = None
    anchor: Anchor | None = None
    colour: str | None = None
    background: Background | None = None


@dataclass(frozen=True)
class Scene:
    """A sample before it is drawn.

    ``order[k]`` is the source shown in reference k: the index of an item, or ``len(items)`` for the background, or
    above it those of the ``spares``, items with references that neither the words nor the target show. A background
    that an open scene names in words alone has none. Edits have one reference, the picture before the edit, and an
    empty order. ``background_shape``: width and height of the background's reference as a ratio; its
    longer side is ``size``. ``light``: of LIGHTS, on the background's picture; empty: as its reference shows it.
    ``shape``: width and height of the target as a ratio; its pixels are about those of a square of side ``size``.
    """

    items: tuple[Item, ...]
    background: Background
    order: tuple[int, ...]
    instruction: str
    task: str
    size: int
    seed: int
    background_shape: tuple[int, int] = (1, 1)
    edit: Edit | None = None
    light: str = ""
    shape: Shape = SQUARE
    spares: tuple[Item, ...] = ()

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the target in pixels: as the pipeline gives this aspect at a budget of ``size``."""
        return (self.size, self.size) if self.shape == SQUARE else output_size(self.shape, self.size)

    @property
    def unit(self) -> float:
        """Pixels of an item of size 1."""
        return self.size if self.shape == SQUARE else self.size * OTHER_SHAPE_UNIT

    def reference_of(self, source: int) -> int:
        """The reference (from 0) that shows this source."""
        return 0 if self.edit else self.order.index(source)
