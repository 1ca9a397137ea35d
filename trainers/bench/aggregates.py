"""Scores of cases summed up as each benchmark does it; a missing score is left out and counted, never filled in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """One case of one system."""

    task: str
    sources: int
    score: float | None


@dataclass(frozen=True)
class Aggregate:
    """``value`` is None when a group that it needs has no score; judged of total: "n of m"."""

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
    return sum(values) / len(values) if values else None


def aggregate(bench: str, scored: Sequence[Scored]) -> Aggregate:
    """Macro over groups for GEdit-Bench, over halves for MultiCom-Bench; over cases for the others."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        if one.score is not None:
            half = "2-3 sources" if one.sources <= 3 else "4-6 sources"
            values[half if bench == "multicom" else one.task].append(one.score)
    groups = {name: sum(found) / len(found) for name, found in sorted(values.items())}
    everything = [score for found in values.values() for score in found]
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
    """A judge's 0..10 in the benchmark's units: MICo-Bench W x SC x PQ (0..100), MultiCom-Bench 0..1, else 0..10.

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
