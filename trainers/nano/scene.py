"""A scene before it is drawn: its things, how each looks, where it stands, what an edit changes, the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .backgrounds import Background, Colour
from .catalogue import Asset
from .layout import Anchor


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
    """One asset in a scene. ``paper`` and ``fill``: colour behind it in its reference and the share it fills there."""

    asset: Asset
    look: Look
    relation: str
    anchor: Anchor
    paper: Colour = (255, 255, 255)
    fill: float = 0.93


@dataclass(frozen=True)
class Edit:
    """What a single-image edit changes: the item (by index; None for the background), and the value it gets."""

    kind: Literal["move", "remove", "recolour", "replace_background"]
    item: int | None = None
    anchor: Anchor | None = None
    colour: str | None = None
    background: Background | None = None


@dataclass(frozen=True)
class Scene:
    """A sample before it is drawn.

    ``order[k]`` is the source shown in reference k: the index of an item, or ``len(items)`` for the background.
    Edits have one reference, the picture before the edit, and an empty order. ``background_shape``: width and height
    of the background's reference as a ratio; its longer side is ``size``.
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

    def reference_of(self, source: int) -> int:
        """The reference (from 0) that shows this source."""
        return 0 if self.edit else self.order.index(source)
