"""All judges of closed scenes, applied to the pictures made for one scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..nano.catalogue import Asset
from ..nano.controls import CONTROLS, can_swap_references, references_swapped
from ..nano.emoji import Bank
from ..nano.render import Sample, edited, hidden_of, light_of, look_matrix, place, render
from ..nano.scene import Scene
from . import appearance, identity, placement
from .arrays import to_array
from .kinds import JUDGES, LEAST_VISIBLE, MAX_ITEMS, SWAPS, TRUTH


@dataclass(frozen=True)
class Case:
    """Scene of one right answer with the judges' inputs.

    ``boxes``: not clipped to the picture. ``tints``: light on each item. ``exchanged``: of a pair, the truth with its
    two things in each other's place.
    """

    scene: Scene
    sample: Sample
    boxes: tuple[identity.Rect, ...]
    tints: tuple[np.ndarray, ...]
    exchanged: Image.Image | None = None

    @classmethod
    def of(cls, bank: Bank, scene: Scene) -> Case:
        """Draw the truth of a scene. For edits, items are those after the edit."""
        sample, hidden = render(bank, scene), hidden_of(scene, None)
        looks = [look_matrix(item.look) for item in scene.items]
        remaining = list(range(len(scene.items)))
        if scene.edit:
            scene, _, looks, remaining = edited(scene, sample.background, looks)
        exchanged = references_swapped(bank, scene).target if scene.task == "pair" else None
        light = light_of(sample.background)
        boxes = tuple(place(bank, scene, [hidden[index] for index in remaining]))
        return cls(scene, sample, boxes, tuple(light @ look for look in looks), exchanged)

    @property
    def assets(self) -> tuple[Asset, ...]:
        """Assets of the items, as the truth shows them."""
        return tuple(item.asset for item in self.sample.placements)


def control_pictures(bank: Bank, scene: Scene, truth: Sample) -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Pictures of the truth and of the scene's controls, each with the judged items, bool [MAX_ITEMS].

    Swaps are judged on the replaced items, all other controls on all items.
    """
    everything = np.ones(MAX_ITEMS, bool)
    pictures = {TRUTH: (truth.target, everything)}
    for name, control in CONTROLS.items():
        if name == "references_swapped" and not can_swap_references(scene):
            continue
        sample = control(bank, scene)
        pictures[name] = (sample.target, replaced_items(truth, sample) if name in SWAPS else everything)
    return pictures


def replaced_items(truth: Sample, control: Sample) -> np.ndarray:
    """Items that show another asset than the truth, bool [MAX_ITEMS]."""
    replaced = np.zeros(MAX_ITEMS, bool)
    for index, (old, new) in enumerate(zip(truth.placements, control.placements, strict=True)):
        replaced[index] = old.asset != new.asset
    return replaced


class Panel:
    """All judges of one bank; identity descriptors are computed once."""

    def __init__(self, bank: Bank) -> None:
        self.assets = {"object": bank.objects("all"), "person": bank.persons("all")}
        self.indices = {
            kind: identity.IdentityIndex([bank.image(asset) for asset in assets])
            for kind, assets in self.assets.items()
        }

    def judge(self, case: Case, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
        """Score V pictures of the target's size: judge -> [V, MAX_ITEMS], NaN if there is nothing to score.

        Judges of the whole picture use the first column, judges of items one column per item.
        """
        scores = {judge.name: np.full((len(pictures), MAX_ITEMS), np.nan) for judge in JUDGES}
        target, background = to_array(case.sample.target), to_array(case.sample.background)
        masks = [item.mask for item in case.sample.placements]
        visible = [index for index, mask in enumerate(masks) if mask.mean() >= LEAST_VISIBLE]
        arrays = np.stack([to_array(picture) for picture in pictures])
        exchanged = None if case.exchanged is None else to_array(case.exchanged)
        for v, picture in enumerate(arrays):
            changed = placement.changed(picture, background)
            scores["placement_iou"][v, 0] = placement.placement_iou(changed, masks)
            scores["background_psnr"][v, 0] = placement.background_psnr(picture, target, masks)
            if exchanged is not None:
                scores["binding"][v, 0] = placement.not_exchanged(picture, target, exchanged)
            errors = placement.centre_errors(changed, masks)
            for index in visible:
                scores["placement_centre_error"][v, index] = errors[index]
                looks = appearance.appearance(picture, target, masks[index])
                scores["masked_psnr"][v, index] = looks.psnr
                scores["masked_ssim"][v, index] = looks.ssim
                scores["colour_difference"][v, index] = looks.colour
        for index in visible:
            others = placement.union([mask for other, mask in enumerate(masks) if other != index] or [0 * masks[0]])
            self._identify(case, index, arrays, background, 1 - others, scores)
        return scores

    def _identify(
        self,
        case: Case,
        index: int,
        arrays: np.ndarray,
        background: np.ndarray,
        weight: np.ndarray,
        scores: dict[str, np.ndarray],
    ) -> None:
        """Fill the identity scores of one item: 1 if the nearest asset is the right one, else 0."""
        asset = case.assets[index]
        nearest = self.indices[asset.kind].nearest(arrays, background, weight, case.boxes[index], case.tints[index])
        assets = [self.assets[asset.kind][one] for one in nearest]
        exact = [one.key == asset.key for one in assets]
        if asset.kind == "object":
            scores["object_retrieval_top1"][:, index] = exact
            return
        scores["person_retrieval_top1"][:, index] = exact
        scores["person_design_top1"][:, index] = [one.design == asset.design for one in assets]
        scores["person_tone_top1"][:, index] = [one.tone == asset.tone for one in assets]
        if asset.gender is not None:
            scores["person_gender_top1"][:, index] = [one.gender == asset.gender for one in assets]
