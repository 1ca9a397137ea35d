"""All filters by name: how each is measured, its threshold, and which pictures it applies to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import SUBJECTS, FilterConfig
from ..errors import CurateError
from . import arithmetic
from .picture import Decoded

Rank = Literal["numpy", "extra", "endpoint"]
SUBJECTS_WITH_OUTLINE = ("person", "object")


@dataclass(frozen=True)
class Filter:
    """One filter. rank: numpy (always there), extra (the packages of `[curate]`), endpoint (the user's judge).

    least, most: a score outside is dropped. subjects: pictures it applies to. version: of its measurement; a new one is
    measured anew. measure: of a decoded picture (rank numpy); the other ranks have their rooms. asks_by_name: its
    question holds the picture's name.
    """

    name: str
    rank: Rank
    least: float | None = None
    most: float | None = None
    subjects: tuple[str, ...] = (*SUBJECTS, "target")
    version: int = 1
    measure: Callable[[Decoded], Any] | None = None
    needs_sources: bool = False
    asks_by_name: bool = False

    @property
    def key(self) -> str:
        """Name of its measurement in the store."""
        return f"{self.name} {self.version}"

    def reason(self, score: float) -> str:
        """Reason for dropping a picture, "" if it stays."""
        if self.least is not None and score < self.least:
            return f"{self.name} {score:g} is below {self.least:g}"
        if self.most is not None and score > self.most:
            return f"{self.name} {score:g} is above {self.most:g}"
        return ""


NUMPY = (
    Filter("pixels", "numpy", least=768**2, measure=arithmetic.pixels),
    Filter("aspect", "numpy", most=3.0, measure=arithmetic.aspect),
    Filter("sharpness", "numpy", least=50.0, measure=arithmetic.sharpness),
    Filter("detail", "numpy", least=0.35, measure=arithmetic.detail),
    Filter("exposure", "numpy", least=0.08, most=0.97, measure=arithmetic.exposure),
    Filter("contrast", "numpy", least=0.15, measure=arithmetic.contrast),
    Filter("flat", "numpy", most=0.9, measure=arithmetic.flat),
    Filter("border", "numpy", most=0.1, measure=arithmetic.border),
    Filter("occupancy", "numpy", least=0.6, subjects=SUBJECTS_WITH_OUTLINE, measure=arithmetic.occupancy),
    Filter("inside", "numpy", least=0.9, subjects=SUBJECTS_WITH_OUTLINE, measure=arithmetic.inside),
    Filter("clutter", "numpy", most=0.7, measure=arithmetic.clutter),
    Filter("duplicates", "numpy", least=5.0, measure=arithmetic.fingerprint),
    Filter("likeness", "numpy", least=15.0, subjects=("target",), needs_sources=True),
)
"""clutter: the percentile within the corpus; duplicates: differing bits to the nearest picture before it (64 if its
colours differ); likeness: dB to the compositor's truth or to the photograph that was decomposed."""

EXTRA = (
    Filter("brisque", "extra", most=30.0),
    Filter("text", "extra", most=0.01),
    Filter("head", "extra", least=0.9, subjects=("person",)),
    Filter("face_identity", "extra", most=0.6, subjects=("target",), needs_sources=True),
)
ENDPOINT = (
    Filter("quality", "endpoint", least=75.0),
    Filter("head_visible", "endpoint", least=0.9, subjects=("person",)),
    Filter("visible_share", "endpoint", least=60.0, subjects=SUBJECTS_WITH_OUTLINE, asks_by_name=True),
    Filter("plain_background", "endpoint", most=0.7, subjects=SUBJECTS_WITH_OUTLINE),
    Filter("no_watermark", "endpoint", least=0.5),
    Filter("aesthetic", "endpoint", least=5.0, subjects=("background", "photograph", "target")),
    Filter("matches_category", "endpoint", least=0.5, subjects=SUBJECTS, asks_by_name=True),
    Filter("prompt_match", "endpoint", least=0.5, subjects=("target",), needs_sources=True),
    Filter("presence", "endpoint", least=0.5, subjects=("target",), needs_sources=True),
    Filter("identity", "endpoint", least=5.0, subjects=("target",), needs_sources=True),
)
FILTERS: Mapping[str, Filter] = {one.name: one for one in (*NUMPY, *EXTRA, *ENDPOINT)}


def chosen(configs: Mapping[str, FilterConfig], stage: str) -> list[Filter]:
    """Filters of a stage ("filter" or "check") with the config's thresholds. Raises CurateError for an unknown name."""
    filters = []
    for name, config in configs.items():
        known = FILTERS.get(name)
        if known is None:
            raise CurateError(f"{stage}.{name}: there is no such filter; known: {', '.join(FILTERS)}")
        if known.needs_sources and stage == "filter":
            raise CurateError(f"filter.{name} compares a target with its sources; move it to check")
        subjects = config.subjects or known.subjects
        if stage == "check" and "target" not in subjects:
            raise CurateError(f"check.{name} is for source pictures; move it to filter")
        least = known.least if config.least is None else config.least
        most = known.most if config.most is None else config.most
        filters.append(replace(known, least=least, most=most, subjects=subjects))
    return filters
