"""Strengths, regions and time ranges of references: in a conditioning, and as the network's attention bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....unipic_core.conditioning.influence import Influence
from ....unipic_core.conditioning.sequence import SampleShapes
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.reference_bias import Interval, reference_bias

INFLUENCES = "unipic_influences"
"""Key of a conditioning: a tuple with an Influence for each of its references; and the network's argument."""

TimedInfluences = Sequence[tuple[Influence, Interval]]
"""Influences with the sigmas between which they count."""


def timed_influences(influences: Sequence[Influence] | None, sampling: Any) -> TimedInfluences:
    """Influences with their sigmas, by the percents of a MODEL's `model_sampling`, as for ComfyUI's time ranges."""
    percent = sampling.percent_to_sigma
    return tuple((p, (float(percent(p.start)), float(percent(p.end)))) for p in influences or ())


def bias_at(influences: TimedInfluences, shapes: SampleShapes, sigma: Tensor) -> Tensor | None:
    """Log strengths [N_O, K] of a sample's references at sigma [B], one value for the whole batch; None if none counts.

    References that a later node added have none. UniPicError for fewer references than influences.
    """
    if not influences:
        return None
    count = len(shapes) - 1
    if len(influences) > count:
        raise UniPicError(
            f"strengths and boxes are of {len(influences)} pictures, and the conditioning has {count} references; "
            "connect the conditioning of Multi-Image Compose directly"
        )
    added = [(Influence(), (1.0, 0.0))] * (count - len(influences))
    each, intervals = zip(*influences, *added, strict=True)
    return reference_bias(each, intervals, shapes[0], float(sigma[0]))
