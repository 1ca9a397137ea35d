"""Judges of open scenes: the nearest of the allowed answers, sharpness, and how many answers several seeds reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..nano.controls import background_alone, object_swapped
from ..nano.emoji import Bank
from ..nano.open_scenes.answers import answers
from ..nano.render import render
from ..nano.scene import Scene
from .appearance import LUMA
from .arrays import psnr, to_array
from .kinds import LEAST_VISIBLE, MAX_ITEMS, OPEN_JUDGES, SWAPS, TRUTH
from .panel import Case, Panel, replaced_items
from .placement import union

REDRAWN = 3
"""Drawings of each answer that the control "mean_answer" averages: what is hidden blurs it as what is open does."""

Control = tuple[Image.Image, np.ndarray]
"""Picture, and which items [MAX_ITEMS] it is judged on."""


@dataclass(frozen=True)
class OpenCase:
    """All answers of a scene; ``scene`` is the one that was drawn."""

    scene: Scene
    answers: tuple[Case, ...]

    @classmethod
    def of(cls, bank: Bank, scene: Scene) -> OpenCase:
        return cls(scene, tuple(Case.of(bank, one) for one in answers(scene)))

    def nearest(self, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Per picture: the answer of the least mean squared error, and its PSNR in dB."""
        targets = np.stack([to_array(case.sample.target) for case in self.answers])
        errors = np.array([((targets - to_array(picture)) ** 2).mean(axis=(1, 2, 3)) for picture in pictures])
        return errors.argmin(axis=1), np.array([psnr(float(error)) for error in errors.min(axis=1)])

    def reached(self, pictures: Sequence[Image.Image]) -> int:
        """Different answers that the pictures are nearest to."""
        return len(set(self.nearest(pictures)[0].tolist()))

    def reachable(self, draws: int) -> float:
        """Different answers that so many independent draws of the truth show in the mean: m (1 - (1 - 1/m)^draws)."""
        count = len(self.answers)
        return count * (1 - (1 - 1 / count) ** draws)

    def spread(self, bank: Bank) -> float:
        """Root mean square difference of two independent draws of the truth: any two answers, drawn anew."""
        first = [to_array(case.sample.target) for case in self.answers]
        again = [to_array(render(bank, case.scene, hidden_seed=1).target) for case in self.answers]
        return float(np.mean([np.sqrt(((one - other) ** 2).mean()) for one in first for other in again]))


def gradient(picture: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the length of the luma's forward differences, 0 at the last row and column."""
    luma = picture @ LUMA
    down, right = np.zeros_like(luma), np.zeros_like(luma)
    down[:-1], right[:, :-1] = np.diff(luma, axis=0), np.diff(luma, axis=1)
    return np.hypot(down, right)


def sharpness(picture: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Mean gradient inside the mask relative to the target's, or its inverse where the picture has more: at most 1.

    Blur and noise both score less. NaN where the mask is empty or the target is even.
    """
    own, truth = (float((gradient(one) * mask).sum()) for one in (picture, target))
    if mask.sum() <= 0 or truth <= 1e-6:
        return float("nan")
    return min(own, truth) / max(own, truth, 1e-12)


def parts(case: OpenCase, answer: Case) -> list[tuple[int, np.ndarray]]:
    """Regions in which sharpness is judged, one column each: visible items, and the background if it is open."""
    masks = [item.mask for item in answer.sample.placements]
    found = [(index, mask) for index, mask in enumerate(masks) if mask.mean() >= LEAST_VISIBLE]
    if case.scene.task == "open_background":
        found.append((len(masks), 1 - union(masks)))
    return found


def mean_answer(bank: Bank, case: OpenCase) -> Image.Image:
    """Mean of all answers, each drawn REDRAWN times: the guess of the least squared error, blurred."""
    drawn = [
        to_array(render(bank, answer.scene, hidden_seed=seed).target)
        for answer in case.answers
        for seed in range(1, 1 + REDRAWN)
    ]
    return Image.fromarray((255 * np.mean(drawn, axis=0)).round().astype(np.uint8))


def open_controls(bank: Bank, case: OpenCase) -> dict[str, Control]:
    """Pictures of the truth and of each control; the swapped one is judged on the items that it replaces alone."""
    everything = np.ones(MAX_ITEMS, bool)
    truth = render(bank, case.scene)
    others = [answer.scene for answer in case.answers if answer.scene != case.scene]
    other = others[case.scene.seed % len(others)]
    swapped = object_swapped(bank, case.scene)
    return {
        TRUTH: (truth.target, everything),
        "other_answer": (render(bank, other, hidden_seed=1).target, everything),
        "mean_answer": (mean_answer(bank, case), everything),
        "background_alone": (background_alone(bank, case.scene).target, everything),
        SWAPS[0]: (swapped.target, replaced_items(truth, swapped)),
    }


def judge_open(panel: Panel, case: OpenCase, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """Scores [V, MAX_ITEMS] by open judge of V pictures, each against the answer that is nearest to it."""
    scores = {judge.name: np.full((len(pictures), MAX_ITEMS), np.nan) for judge in OPEN_JUDGES}
    nearest, scores["match_psnr"][:, 0] = case.nearest(pictures)
    for which in np.unique(nearest):
        answer, rows = case.answers[which], np.flatnonzero(nearest == which)
        judged = panel.judge(answer, [pictures[row] for row in rows])
        scores["match_iou"][rows] = judged["placement_iou"]
        scores["match_object"][rows] = judged["object_retrieval_top1"]
        scores["match_person"][rows] = judged["person_retrieval_top1"]
        target = to_array(answer.sample.target)
        for row in rows:
            for column, mask in parts(case, answer):
                scores["sharpness"][row, column] = sharpness(to_array(pictures[row]), target, mask)
    return scores
