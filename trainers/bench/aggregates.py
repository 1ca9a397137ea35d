"""Aggregate scores as each benchmark defines them; missing scores are excluded and counted, never filled in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scored:
    """Score of one case of one system. values: by question of the template; extra: the case's."""

    task: str
    sources: int
    score: float | None
    values: Mapping[str, float | None] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """Aggregate score; ``value`` is None if a required group has no score. judged, total: numbers of cases.

    parts: the benchmark's other numbers, row -> column -> value.
    """

    name: str
    value: float | None
    groups: Mapping[str, float]
    judged: int
    total: int
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


NAMES = {
    "own": "mean over cases",
    "nano": "mean over cases",
    "mico": "Weighted-Ref-VIEScore, mean over cases",
    "gedit": "G_O, mean of the groups' means",
    "imgedit": "mean of the edit types' means, 1-5",
    "multicom": "mean of the halves of 2-3 and 4-6 sources",
    "omniref": "mean of the six dimensions' means",
}
OMNIREF_DIMENSIONS = (
    "subject_consistency",
    "style_consistency",
    "background_consistency",
    "lighting_consistency",
    "aesthetic_quality",
    "text_adherence",
)
"""Dimensions of OmniRef-Bench's judge; a case has no value for a dimension without its kind of reference."""

MACRO = ("gedit", "imgedit")
"""Benchmarks whose groups weigh the same, whatever their sizes."""

HALVES = ("2-3 sources", "4-6 sources")
COMPLETE = ("multicom", "omniref")
"""Benchmarks whose aggregate needs a score in every column (``columns``)."""


def mean(values: Sequence[float]) -> float | None:
    """Mean; None without values."""
    return sum(values) / len(values) if values else None


def aggregate(bench: str, scored: Sequence[Scored]) -> Aggregate:
    """Aggregate the cases of one system. The value is the mean of the means of its ``columns``."""
    known = [one for one in scored if one.score is not None]
    groups = group_means(known, lambda one: one.score, half if bench == "multicom" else by_task)
    means = column_means(columns(bench, scored))
    value = None if bench in COMPLETE and None in means.values() else mean(without_none(means.values()))
    parts = gedit_parts(known) if bench == "gedit" else {}
    if bench == "omniref" and known:
        parts = {"dimensions": {name: one for name, one in means.items() if one is not None}}
    return Aggregate(NAMES[bench], value, groups, len(known), len(scored), parts)


def columns(bench: str, scored: Sequence[Scored]) -> dict[str, list[float | None]]:
    """Scores of the cases by column; None where a case is not in the column or has no score.

    Columns are groups (GEdit-Bench, ImgEdit-Bench), halves (MultiCom-Bench) or dimensions (OmniRef-Bench); the other
    benchmarks have one. They are the same for all systems.
    """
    if bench == "omniref":
        judged = [{} if one.score is None else one.values for one in scored]
        return {name: [values.get(name) for values in judged] for name in OMNIREF_DIMENSIONS}
    if bench == "multicom":
        return {name: [one.score if half(one) == name else None for one in scored] for name in HALVES}
    if bench in MACRO:
        groups = sorted({one.task for one in scored})
        return {name: [one.score if one.task == name else None for one in scored] for name in groups}
    return {"cases": [one.score for one in scored]}


def column_means(by_column: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Mean of each column over the cases that have a score in it; None without any."""
    return {name: mean(without_none(values)) for name, values in by_column.items()}


def without_none(values: Iterable[float | None]) -> list[float]:
    """Values that are there."""
    return [value for value in values if value is not None]


def by_task(one: Scored) -> str:
    """Task, the group of most benchmarks."""
    return one.task


def half(one: Scored) -> str:
    """Half of MultiCom-Bench."""
    return HALVES[one.sources > 3]


def group_means(
    scored: Sequence[Scored], value: Callable[[Scored], float | None], group: Callable[[Scored], str] = by_task
) -> dict[str, float]:
    """Mean value of each group with values, by name."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        number = value(one)
        if number is not None:
            values[group(one)].append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in sorted(values.items())}


def gedit_parts(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """GEdit-Bench's G_SC, G_PQ and G_O per language, over all rows and over the intersection.

    Each is the mean of the groups' means; G_O is sqrt(SC x PQ) of each row before any mean.
    """
    columns: dict[str, Callable[[Scored], float | None]] = {
        "G_SC": lambda one: one.values.get("semantics"),
        "G_PQ": lambda one: one.values.get("quality"),
        "G_O": lambda one: one.score,
    }
    parts = {}
    for language in sorted({str(one.extra.get("language")) for one in scored}):
        rows = [one for one in scored if str(one.extra.get("language")) == language]
        common = [one for one in rows if one.extra.get("intersection")]
        for name, some in ((language, rows), (f"{language}, intersection", common)):
            if some:
                means = {title: mean(list(group_means(some, value).values())) for title, value in columns.items()}
                parts[name] = {title: number for title, number in means.items() if number is not None}
    return parts


NO_WEIGHT = (
    "MICo-Bench needs a weight W for every case: --weights DIR, --w-judge to ask the judge, or --w-one for W = 1"
)


def case_score(
    bench: str, score: float | None, values: Mapping[str, float | None], weight: float | None
) -> float | None:
    """Convert a judge's 0..10 to a benchmark's unit.

    MICo-Bench: W x SC x PQ, 0..100; ImgEdit-Bench: 1..5; MultiCom-Bench: 0..1; else 0..10. Raises ValueError for
    MICo-Bench without a weight.
    """
    if bench == "mico":
        if weight is None:
            raise ValueError(NO_WEIGHT)
        sc, pq = values.get("sc"), values.get("pq")
        return None if sc is None or pq is None else weight * sc * pq
    unit = {"imgedit": 2, "multicom": 10}.get(bench, 1)
    return None if score is None else score / unit
