"""Judges of closed and of open scenes, and the controls that each must tell from the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..nano.controls import CONTROLS

MAX_ITEMS = 5
LEAST_VISIBLE = 0.005  # share of the picture that an item must show to be judged alone
TRUTH = "truth"
PLACES = ("background_alone", "positions_shuffled")
SWAPS = ("object_swapped", "references_swapped")
CONTROL_NAMES = (TRUTH, *CONTROLS)


@dataclass(frozen=True)
class Judge:
    """One number per sample or item. ``separates``: the controls that it must tell from the truth to be reported.

    ``short``: the title where there is little room. ``whole``: of the whole picture, in the first column of its
    scores. ``share``: 0 or 1, shown in percent. ``decibels``: already a logarithm, so systems differ and have no ratio.
    """

    name: str
    title: str
    short: str
    separates: tuple[str, ...]
    higher_is_better: bool = True
    whole: bool = False
    share: bool = False
    decibels: bool = False
    digits: int = 3


JUDGES: tuple[Judge, ...] = (
    Judge("placement_iou", "placement: IoU with the items' mask", "IoU", PLACES, whole=True),
    Judge("placement_centre_error", "placement: centre error, sides", "centre err", PLACES, higher_is_better=False),
    Judge(
        "background_psnr",
        "background: PSNR outside, dB",
        "dB outside",
        ("positions_shuffled",),
        whole=True,
        decibels=True,
        digits=2,
    ),
    Judge(
        "binding",
        "binding: pair not exchanged",
        "binding",
        ("references_swapped",),
        whole=True,
        share=True,
    ),
    Judge("masked_psnr", "appearance: PSNR inside, dB", "dB inside", SWAPS, decibels=True, digits=2),
    Judge("masked_ssim", "appearance: SSIM inside", "SSIM", SWAPS),
    Judge(
        "colour_difference", "appearance: colour error, 0-255", "colour err", SWAPS, higher_is_better=False, digits=1
    ),
    Judge("object_retrieval_top1", "identity: object found", "object", SWAPS, share=True),
    Judge("person_retrieval_top1", "identity: person found (exact)", "person", SWAPS, share=True),
    Judge("person_design_top1", "identity: person's design", "design", SWAPS, share=True),
    Judge("person_tone_top1", "identity: skin tone", "skin tone", SWAPS, share=True),
    Judge("person_gender_top1", "identity: man or woman", "gender", SWAPS, share=True),
)

OPEN_CONTROL_NAMES = (TRUTH, "other_answer", "mean_answer", "background_alone", "object_swapped")
MEAN = ("mean_answer",)

OPEN_JUDGES: tuple[Judge, ...] = (
    Judge(
        "match_psnr",
        "best match: PSNR, dB",
        "dB matched",
        ("mean_answer", "background_alone", "object_swapped"),
        whole=True,
        decibels=True,
        digits=2,
    ),
    Judge("match_iou", "best match: IoU with its masks", "IoU", ("background_alone",), whole=True),
    Judge("match_object", "best match: object found", "object", ("object_swapped",), share=True),
    Judge("match_person", "best match: person found (exact)", "person", ("background_alone",), share=True),
    Judge("sharpness", "sharpness: as the truth's (1)", "sharpness", MEAN),
)

BY_NAME = {judge.name: judge for judge in (*JUDGES, *OPEN_JUDGES)}


def reported(judges: Mapping[str, object]) -> list[Judge]:
    """Judges that a report names, in the order of ``JUDGES`` and ``OPEN_JUDGES``."""
    return [judge for name, judge in BY_NAME.items() if name in judges]
