"""Where things stand: the anchored list of relations, and which persons and objects each of them fits.

Positions and sizes are fractions of the target's side. Items are large on purpose: a small model has few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .catalogue import Asset


@dataclass(frozen=True)
class Anchor:
    """Where an item's centre (``align="centre"``) or foot (``"foot"``) stands and how large it is.

    ``size`` is the longer side of an object and the height of a person. An item with a ``host`` (the index of another
    item of the scene) follows it: as a hat on its head, as a held thing at its chest, or standing on top of it.
    ``z``: larger is nearer to the viewer.
    """

    x: float = 0.5
    y: float = 0.97
    size: float = 0.45
    align: Literal["foot", "centre", "head", "chest", "top"] = "foot"
    host: int | None = None
    z: int = 1


# A bust is a portrait cut at the chest: it leaves through the lower edge, wherever the hidden offset puts it.
BUST_FOOT = 1.045

# Objects around a person in the middle of the picture.
AROUND: dict[str, Anchor] = {
    "left": Anchor(0.22),
    "right": Anchor(0.78),
    "front": Anchor(0.64, 0.98, z=3),
    "behind-left": Anchor(0.2, 0.78, z=-1),
    "behind-right": Anchor(0.8, 0.78, z=-1),
    "hold": Anchor(align="chest", host=0, z=4),
    "wear": Anchor(align="head", host=0, z=5),
}
# One thing alone in the picture.
ALONE: dict[str, Anchor] = {"left": Anchor(0.3), "centre": Anchor(0.5), "right": Anchor(0.7)}
# The second of two things, and the first.
PAIRS: dict[str, tuple[Anchor, Anchor]] = {
    "left": (Anchor(0.75), Anchor(0.26)),
    "right": (Anchor(0.25), Anchor(0.74)),
    "front": (Anchor(0.62, 0.84, z=0), Anchor(0.36, 0.98, z=2)),
    "behind": (Anchor(0.38, 0.98, z=2), Anchor(0.64, 0.8, z=0)),
    "top": (Anchor(0.5), Anchor(align="top", host=0, z=2)),
}
# Things without a person, in two rows.
ROWS: dict[int, dict[str, Anchor]] = {
    4: {
        "back-left": Anchor(0.28, 0.62, 0.38, z=0),
        "back-right": Anchor(0.72, 0.62, 0.38, z=0),
        "front-left": Anchor(0.26, 0.98, 0.4),
        "front-right": Anchor(0.74, 0.98, 0.4),
    },
    5: {
        "back-left": Anchor(0.3, 0.62, 0.34, z=0),
        "back-right": Anchor(0.7, 0.62, 0.34, z=0),
        "front-left": Anchor(0.18, 0.98, 0.33),
        "front-centre": Anchor(0.5, 0.98, 0.33),
        "front-right": Anchor(0.82, 0.98, 0.33),
    },
}

# Beginnings of the categories whose things fit into two hands.
HAND_SIZED = (
    "food", "dishware", "drink", "sport", "game", "music", "phone", "computer", "light", "book", "money", "mail",
    "writing", "office", "lock", "tool", "science", "medical", "plant-flower", "event", "time", "arts", "heart",
    "award", "animal-bug", "animal-amphibian",
)  # fmt: skip
TOO_LARGE_TO_HOLD = {"1f3a1", "1fa9c", "1f5a5", "1f3b0", "1f5c4", "1f6cd", "1f384", "1f38b", "1f3af", "1f941", "1fa98"}


def person_anchor(person: Asset, height: float, x: float = 0.5) -> Anchor:
    """Busts stand behind the lower edge, the others on the ground near it; heads and the seated are smaller."""
    if person.pose == "bust":
        return Anchor(x, BUST_FOOT, height, z=1)
    smaller = 0.88 if person.pose in ("head", "seated") else 1.0
    return Anchor(x, 0.95, height * smaller, z=1)


def around(relation: str, size: float) -> Anchor:
    """The anchor of an object beside, before, behind, on or in the hands of item 0."""
    anchor = AROUND[relation]
    larger = 1.12 if relation.startswith("behind") else 1.0  # half of it will be hidden
    return replace(anchor, size=size * larger)


def portable(asset: Asset) -> bool:
    """Whether a person could hold it at the chest."""
    return asset.category.startswith(HAND_SIZED) and asset.key not in TOO_LARGE_TO_HOLD


def composable(asset: Asset) -> bool:
    """Persons whose picture brings scenery of its own are left out of scenes."""
    return asset.pose != "scenery"
