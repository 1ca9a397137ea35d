"""How much of one system another keeps, which of two is better, and how far pictures of one scene differ by seed.

Scores are float [n, k] per judge, NaN where there is nothing to score; everything is paired (``statistics``). Here
higher is always better, whatever the judge.
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
"""A part of an evaluation's report: a table that JSON can hold."""

SPREAD_MEASURE = (
    "root mean square difference of two pictures of a scene that differ by their noise seed, over pixels and channels "
    "in 0..1; mean over the pairs of a scene, then over scenes"
)


def valid_judges(judges: Report) -> list[Judge]:
    """Those that are reported: whether a judge is valid depends on the controls alone, so it is for all systems."""
    return [judge for judge in reported(judges) if judges[judge.name]["valid"]]


def retained(
    own: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    judges: Mapping[str, object],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """By valid judge, the quality that a system keeps of the reference's, with a 95% interval."""
    return {
        judge.name: kept(judge, own[judge.name], reference[judge.name], bootstrap) for judge in valid_judges(judges)
    }


def kept(judge: Judge, own: np.ndarray, reference: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """mean(own) / mean(reference); of an error mean(reference) / mean(own); of decibels mean(own - reference).

    None where the mean that divides may be zero or less: then there is nothing to be a part of.
    """
    if judge.decibels:
        found = bootstrap.difference(own, reference)
    elif judge.higher_is_better:
        found = bootstrap.ratio(own, reference)
    else:
        found = bootstrap.ratio(reference, own)
    return {"kind": "difference_db" if judge.decibels else "ratio", "value": rounded(found), "ci95": interval(found)}


def gains(
    own: Mapping[str, np.ndarray], against: Mapping[str, np.ndarray], judges: Mapping[str, object], bootstrap: Bootstrap
) -> dict[str, Any]:
    """By valid judge, the mean of own - against in the judge's unit, the other way round for errors.

    ``better``: the 95% interval lies above zero; ``worse``: below it. Neither: no difference was found.
    """
    result: dict[str, Any] = {}
    for judge in valid_judges(judges):
        sign = 1 if judge.higher_is_better else -1
        found = bootstrap.difference(sign * own[judge.name], sign * against[judge.name])
        result[judge.name] = {
            "gain": rounded(found),
            "ci95": interval(found),
            "better": found is not None and found.low > 0,
            "worse": found is not None and found.high < 0,
        }
    return result


def equal_steps(
    steps: Mapping[str, int | None],
    systems: Mapping[str, Mapping[str, np.ndarray]],
    judges: Mapping[str, object],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Every two systems of as many steps: what the later gains over the earlier. Steps None: not known, no pair."""
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
    """``SPREAD_MEASURE`` of one scene: at least two pictures of one size."""
    arrays = [to_array(picture) for picture in pictures]
    return float(np.mean([np.sqrt(((one - other) ** 2).mean()) for one, other in combinations(arrays, 2)]))


def spread_entry(own: np.ndarray, reference: np.ndarray | None, bootstrap: Bootstrap) -> dict[str, Any]:
    """The mean of spreads [n, 1], and its ratio to the reference's, None where that has no spread."""
    found = bootstrap.mean(own)
    entry = {"value": rounded(found), "ci95": interval(found)}
    if reference is not None:
        ratio = bootstrap.ratio(own, reference)
        entry |= {"ratio": rounded(ratio), "ratio_ci95": interval(ratio)}
    return entry
