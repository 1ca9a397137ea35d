"""Aggregate scores as each benchmark defines them; missing scores are excluded and counted, never filled in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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


def mean(values: Sequence[float]) -> float | None:
    """Mean; None without values."""
    return sum(values) / len(values) if values else None


def aggregate(bench: str, scored: Sequence[Scored]) -> Aggregate:
    """Aggregate the cases of one system.

    The value is the mean of groups (GEdit-Bench, ImgEdit-Bench), halves (MultiCom-Bench) or dimensions (OmniRef-Bench),
    otherwise of cases.
    """
    known = [one for one in scored if one.score is not None]
    groups = group_means(known, lambda one: one.score, halves if bench == "multicom" else by_task)
    parts = gedit_parts(known) if bench == "gedit" else {}
    if bench == "multicom":
        value = mean(list(groups.values())) if len(groups) == 2 else None
    elif bench in MACRO:
        value = mean(list(groups.values()))
    elif bench == "omniref":
        dimensions = dimension_means(known)
        value = mean(list(dimensions.values())) if len(dimensions) == len(OMNIREF_DIMENSIONS) else None
        parts = {"dimensions": dimensions} if known else {}
    else:
        value = mean([one.score for one in known if one.score is not None])
    return Aggregate(NAMES[bench], value, groups, len(known), len(scored), parts)


def by_task(one: Scored) -> str:
    """Task, the group of most benchmarks."""
    return one.task


def halves(one: Scored) -> str:
    """Half of MultiCom-Bench."""
    return "2-3 sources" if one.sources <= 3 else "4-6 sources"


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


def dimension_means(scored: Sequence[Scored]) -> dict[str, float]:
    """OmniRef-Bench's mean of each dimension over the cases that have it."""
    found = {name: [one.values.get(name) for one in scored] for name in OMNIREF_DIMENSIONS}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


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
