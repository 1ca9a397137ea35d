"""Controls of the evaluation: pictures that a judge must score below the truth, and the fair ceiling.

Each takes the scene of the truth and returns a Sample with the truth's references and instruction; only the target
(with its placements) differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .emoji import Bank
from .layout import OBJECT, Anchor
from .render import Sample, render
from .scene import Item, Scene

NEAR_MIDDLE = 0.08
SIDES = (0.2, 0.8)


def recomposed(bank: Bank, scene: Scene, hidden_seed: int = 1) -> Sample:
    """The truth with another hidden scale, flip and offset: the fair ceiling. Edits hide nothing and stay the same."""
    return render(bank, scene, hidden_seed=hidden_seed)


def background_alone(bank: Bank, scene: Scene) -> Sample:
    """The background without any item."""
    truth = render(bank, scene)
    empty = tuple(replace(place, mask=np.zeros_like(place.mask)) for place in truth.placements)
    return replace(truth, target=truth.background.copy(), placements=empty)


def positions_shuffled(bank: Bank, scene: Scene) -> Sample:
    """The correct items, mirrored to the other side; central, worn and held ones move to a side."""
    items = tuple(replace(item, anchor=_elsewhere(item.anchor, index)) for index, item in enumerate(scene.items))
    edit = scene.edit
    if edit and edit.anchor and edit.item is not None:
        edit = replace(edit, anchor=_elsewhere(edit.anchor, edit.item))
    return _with_target_of(bank, scene, replace(scene, items=items, edit=edit))


def _elsewhere(anchor: Anchor, index: int) -> Anchor:
    if anchor.host is not None:
        return Anchor(SIDES[index % 2], size=min(anchor.size, OBJECT), z=anchor.z)
    mirrored = 1 - anchor.x
    return replace(anchor, x=SIDES[index % 2] if abs(mirrored - 0.5) < NEAR_MIDDLE else mirrored)


def object_swapped(bank: Bank, scene: Scene, seed: int = 1) -> Sample:
    """Replace the last item (for edits: of those left) by another asset of its kind and split, in the same place."""
    index = _last_left(scene)
    item = scene.items[index]
    candidates = bank.persons(item.asset.split) if item.asset.kind == "person" else bank.objects(item.asset.split)
    taken = {other.asset.family for other in scene.items}
    options = [
        asset
        for asset in candidates
        if asset.family not in taken and (asset.is_hat, asset.pose) == (item.asset.is_hat, item.asset.pose)
    ]
    if not options:  # the only hat of the subset's split: any object will do
        options = [asset for asset in candidates if asset.family not in taken]
    asset = options[int(np.random.default_rng([seed, scene.seed]).integers(len(options)))]
    return _with_target_of(bank, scene, _with_items(scene, {index: replace(item, asset=asset)}))


def _last_left(scene: Scene) -> int:
    """The last item that an edit does not remove."""
    removed = scene.edit.item if scene.edit and scene.edit.kind == "remove" else None
    return max(index for index in range(len(scene.items)) if index != removed)


def can_swap_references(scene: Scene) -> bool:
    """True if the scene has two items to exchange, before and after an edit."""
    return len(scene.items) >= 2 and not (scene.edit and scene.edit.kind == "remove")


def references_swapped(bank: Bank, scene: Scene) -> Sample:
    """Exchange the places of the first two items, as if their numbers had been confused.

    Raises ValueError for a scene with one item; check ``can_swap_references`` first.
    """
    if not can_swap_references(scene):
        raise ValueError(
            f"expected two items to exchange before and after the edit, got {len(scene.items)} for {scene.task}"
        )
    first, second = scene.items[:2]
    swapped = {
        0: replace(first, asset=second.asset, look=second.look),
        1: replace(second, asset=first.asset, look=first.look),
    }
    return _with_target_of(bank, scene, _with_items(scene, swapped))


def _with_items(scene: Scene, changed: dict[int, Item]) -> Scene:
    items = tuple(changed.get(index, item) for index, item in enumerate(scene.items))
    return replace(scene, items=items)


def _with_target_of(bank: Bank, scene: Scene, other: Scene) -> Sample:
    """The scene's references with the other scene's target."""
    drawn = render(bank, other)
    return replace(render(bank, scene), target=drawn.target, placements=drawn.placements)


CONTROLS: dict[str, Callable[[Bank, Scene], Sample]] = {
    "recomposed": recomposed,
    "background_alone": background_alone,
    "positions_shuffled": positions_shuffled,
    "object_swapped": object_swapped,
    "references_swapped": references_swapped,
}
