"""Catalogue of assets: content of each picture, and its side of the train / held-out split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

TONES = {"light": "1f3fb", "medium-light": "1f3fc", "medium": "1f3fd", "medium-dark": "1f3fe", "dark": "1f3ff"}
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Asset:
    """One picture.

    ``key`` is the file's code points without fe0f. ``design`` is the key without skin tone, ``family`` the design
    without gender (and the common name of near-twins such as ram and ewe): the split is drawn by family, so neither
    another skin tone nor another gender of a held-out person is ever trained on.
    """

    key: str
    name: str
    kind: Literal["person", "object"]
    category: str
    design: str
    family: str
    split: Literal["train", "heldout"]
    tone: str | None = None
    gender: Literal["man", "woman"] | None = None
    pose: Literal["head", "bust", "full", "seated", "scenery"] | None = None
    holds_prop: bool = False
    can_hold: bool = False
    can_wear: bool = False

    @property
    def is_hat(self) -> bool:
        return self.category == "hat"


def with_tone(design: str, tone: str) -> str:
    """Key of a design in a skin tone: the modifier follows the first code point."""
    first, _, rest = design.partition("-")
    return "-".join(part for part in (first, TONES[tone], rest) if part)


def in_split(asset: Asset, split: Split) -> bool:
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    return split == "all" or asset.split == split


@cache
def load() -> tuple[Asset, ...]:
    """Load all assets, persons expanded to their skin tones, in the committed order."""
    rows = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    assets: list[Asset] = []
    for row in rows:
        tones = row.pop("tones", False)
        base = Asset(design=row["key"], **row)
        assets.append(base)
        if tones:
            toned = {tone: {**row, "key": with_tone(base.design, tone)} for tone in TONES}
            assets.extend(Asset(design=base.design, tone=tone, **fields) for tone, fields in toned.items())
    return tuple(assets)
