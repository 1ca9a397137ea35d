"""Aggregate scores as each benchmark defines them; missing scores are excluded and counted, never filled in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """Score of one case of one system."""

    task: str
    sources: int
    score: float | None


@dataclass(frozen=True)
class Aggregate:
    """Aggregate score; ``value`` is None if a required group has no score. judged, total: numbers of cases."""

    name: str
    value: float | None
    groups: Mapping[str, float]
    judged: int
    total: int


NAMES = {
    "own": "mean over cases",
    "nano": "mean over cases",
    "mico": "Weighted-Ref-VIEScore, mean over cases",
    "gedit": "G_O, mean of the groups' means",
    "multicom": "mean of the halves of 2-3 and 4-6 sources",
}


def mean(values: Sequence[float]) -> float | None:
    """Mean; None without values."""
    return sum(values) / len(values) if values else None


def aggregate(bench: str, scored: Sequence[Scored]) -> Aggregate:
    """Macro average over groups (GEdit-Bench), over halves (MultiCom-Bench), or mean over cases."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        if one.score is not None:
            half = "2-3 sources" if one.sources <= 3 else "4-6 sources"
            values[half if bench == "multicom" else one.task].append(one.score)
    groups = {name: sum(scores) / len(scores) for name, scores in sorted(values.items())}
    everything = [score for scores in values.values() for score in scores]
    if bench == "multicom":
        value = mean(list(groups.values())) if len(groups) == 2 else None
    elif bench == "gedit":
        value = mean(list(groups.values()))
    else:
        value = mean(everything)
    return Aggregate(NAMES[bench], value, groups, len(everything), len(scored))


def case_score(
    bench: str, score: float | None, values: Mapping[str, float | None], weight: float | None
) -> float | None:
    """Convert a judge's 0..10 to a benchmark's unit: MICo-Bench W x SC x PQ (0..100), MultiCom-Bench 0..1, else 0..10.

    Raises ValueError for MICo-Bench without a weight.
    """
    if bench == "mico":
        if weight is None:
            raise ValueError("MICo-Bench needs a weight W for every case: --weights DIR, or --w-one for W = 1")
        sc, pq = values.get("sc"), values.get("pq")
        return None if sc is None or pq is None else weight * sc * pq
    if bench == "multicom":
        return None if score is None else score / 10
    return score
