"""Quality retained of a reference, gains between two systems, and spread of a scene's pictures over seeds.

Scores are float [n, k] per judge, NaN if there is nothing to score; all comparisons are paired (``statistics``).
Results are oriented so that higher is better for every judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from .arrays import to_array
from .kinds import Judge, reported
from .statistics import Bootstrap, interval, rounded

Report = Mapping[str, Any]
"""Part of an evaluation's JSON report."""

SPREAD_MEASURE = (
    "root mean square difference of two pictures of a scene that differ by their noise seed, over pixels and channels "
    "in 0..1; mean over the pairs of a scene, then over scenes"
)


def valid_judges(judges: Report) -> list[Judge]:
    """Judges that are reported; validity depends on the controls only, so it is the same for all systems."""
    return [judge for judge in reported(judges) if judges[judge.name]["valid"]]


def retained(
    scores: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    judges: Mapping[str, object],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Quality retained of the reference per valid judge, with 95% intervals."""
    return {
        judge.name: retained_quality(judge, scores[judge.name], reference[judge.name], bootstrap)
        for judge in valid_judges(judges)
    }


def retained_quality(judge: Judge, scores: np.ndarray, reference: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """mean(scores) / mean(reference); for errors the inverse; for decibels mean(scores - reference).

    "value" and "ci95" are None if the denominator may be zero or negative.
    """
    if judge.decibels:
        estimate = bootstrap.difference(scores, reference)
    elif judge.higher_is_better:
        estimate = bootstrap.ratio(scores, reference)
    else:
        estimate = bootstrap.ratio(reference, scores)
    kind = "difference_db" if judge.decibels else "ratio"
    return {"kind": kind, "value": rounded(estimate), "ci95": interval(estimate)}


def gains(
    scores: Mapping[str, np.ndarray],
    against: Mapping[str, np.ndarray],
    judges: Mapping[str, object],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Mean of scores - against per valid judge, in the judge's unit; negated for error metrics.

    ``better``: the 95% interval is above zero; ``worse``: below it; neither: no significant difference.
    """
    result: dict[str, Any] = {}
    for judge in valid_judges(judges):
        sign = 1 if judge.higher_is_better else -1
        gain = bootstrap.difference(sign * scores[judge.name], sign * against[judge.name])
        result[judge.name] = {
            "gain": rounded(gain),
            "ci95": interval(gain),
            "better": gain is not None and gain.low > 0,
            "worse": gain is not None and gain.high < 0,
        }
    return result


def equal_steps(
    steps: Mapping[str, int | None],
    systems: Mapping[str, Mapping[str, np.ndarray]],
    judges: Mapping[str, object],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Gains of the later over the earlier of every two systems with equal steps (None: unknown, not paired)."""
    return [
        {
            "steps": steps[later],
            "system": later,
            "against": earlier,
            "judges": gains(systems[later], systems[earlier], judges, bootstrap),
        }
        for earlier, later in combinations(systems, 2)
        if steps.get(earlier) is not None and steps.get(earlier) == steps.get(later)
    ]


def pairwise_rms(pictures: Sequence[Image.Image]) -> float:
    """``SPREAD_MEASURE`` of one scene; at least two pictures of one size."""
    arrays = [to_array(picture) for picture in pictures]
    return float(np.mean([np.sqrt(((one - other) ** 2).mean()) for one, other in combinations(arrays, 2)]))


def spread_entry(spreads: np.ndarray, reference: np.ndarray | None, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean of spreads [n, 1], and its ratio to the reference's (None if the reference has no spread)."""
    mean = bootstrap.mean(spreads)
    entry = {"value": rounded(mean), "ci95": interval(mean)}
    if reference is not None:
        ratio = bootstrap.ratio(spreads, reference)
        entry |= {"ratio": rounded(ratio), "ratio_ci95": interval(ratio)}
    return entry
