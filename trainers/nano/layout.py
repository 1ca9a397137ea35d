"""Layout: anchors of the relations between items, and which persons and objects fit them.

Positions are fractions of the target's width and height, sizes of the side of a square target. Items are large on
purpose: a small model has few tokens. For the same reason every item's square stands on a lattice of whole tokens
(``lattice_step``), at sizes that are simple multiples of its reference's: then a token of the reference becomes a token
of the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .catalogue import Asset


@dataclass(frozen=True)
class Anchor:
    """Position and size of an item's square, the one that its reference shows, by its foot.

    An item with a ``host`` (the index of another item of the scene) follows it: as a hat on its head, as a held thing
    at its chest, or standing on top of it. ``z``: larger is nearer to the viewer.
    """

    x: float = 0.5
    y: float = 1.0
    size: float = 0.5
    align: Literal["foot", "head", "chest", "top"] = "foot"
    host: int | None = None
    z: int = 1


GRID = 8
"""Steps of the lattice to the side of a picture of 128 pixels, one token each."""

TOKEN = 16  # pixels
OTHER_SHAPE_UNIT = 2 / 3
"""Items of pictures that are not square are so much smaller: two stand side by side where it is narrow, and hats fit
where it is low. A person becomes as large as their reference, when there are three or more."""

PERSON, OBJECT, SMALL = 0.75, 0.5, 0.375  # 3/2, 1 and 3/4 of a reference's side, when there are three or more

# Objects around a person in the middle of the picture.
AROUND: dict[str, Anchor] = {
    "left": Anchor(0.22),
    "right": Anchor(0.78),
    "front": Anchor(0.64, z=3),
    "behind-left": Anchor(0.2, 0.75, z=-1),
    "behind-right": Anchor(0.8, 0.75, z=-1),
    "hold": Anchor(align="chest", host=0, z=4),
    "wear": Anchor(align="head", host=0, z=5),
}
# One thing alone in the picture.
ALONE: dict[str, Anchor] = {"left": Anchor(0.3), "centre": Anchor(0.5), "right": Anchor(0.7)}
# The second of two things, and the first.
PAIRS: dict[str, tuple[Anchor, Anchor]] = {
    "left": (Anchor(0.75), Anchor(0.26)),
    "right": (Anchor(0.25), Anchor(0.74)),
    "front": (Anchor(0.63, 0.875, z=0), Anchor(0.37, z=2)),
    "behind": (Anchor(0.37, z=2), Anchor(0.63, 0.75, z=0)),
    "top": (Anchor(0.5), Anchor(align="top", host=0, z=2)),
}
# Things without a person, in two rows.
ROWS: dict[int, dict[str, Anchor]] = {
    4: {
        "back-left": Anchor(0.28, 0.625, SMALL, z=0),
        "back-right": Anchor(0.72, 0.625, SMALL, z=0),
        "front-left": Anchor(0.26, 1.0, SMALL),
        "front-right": Anchor(0.74, 1.0, SMALL),
    },
    5: {
        "back-left": Anchor(0.3, 0.625, SMALL, z=0),
        "back-right": Anchor(0.7, 0.625, SMALL, z=0),
        "front-left": Anchor(0.18, 1.0, SMALL),
        "front-centre": Anchor(0.52, 1.0, SMALL),
        "front-right": Anchor(0.82, 1.0, SMALL),
    },
}

# Beginnings of the categories whose things fit into two hands.
HAND_SIZED = (
    "food", "dishware", "drink", "sport", "game", "music", "phone", "computer", "light", "book", "money", "mail",
    "writing", "office", "lock", "tool", "science", "medical", "plant-flower", "event", "time", "arts", "heart",
    "award", "animal-bug", "animal-amphibian",
)  # fmt: skip
TOO_LARGE_TO_HOLD = {"1f3a1", "1fa9c", "1f5a5", "1f3b0", "1f5c4", "1f6cd", "1f384", "1f38b", "1f3af", "1f941", "1fa98"}


def lattice_step(size: int) -> float:
    """Pixels between places at which items of a picture of this size stand: whole tokens from 128 pixels on."""
    step = size / GRID
    return step if step < TOKEN else step // TOKEN * TOKEN


def person_anchor(size: float = PERSON, x: float = 0.5) -> Anchor:
    """Anchor of a person at the lower edge, where busts (portraits cut at the chest) leave the picture."""
    return Anchor(x, size=size, z=1)


def around(relation: str, size: float = OBJECT) -> Anchor:
    """Anchor of an object beside, before, behind, on or in the hands of item 0."""
    return replace(AROUND[relation], size=size)


def portable(asset: Asset) -> bool:
    """True for objects that a person can hold at the chest."""
    return asset.category.startswith(HAND_SIZED) and asset.key not in TOO_LARGE_TO_HOLD


def composable(asset: Asset) -> bool:
    """False for persons whose picture contains scenery."""
    return asset.pose != "scenery"
