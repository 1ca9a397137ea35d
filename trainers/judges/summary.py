"""From scores to what is reported: means with intervals, margins over the controls, what is left out and why.

Scores are float [n, MAX_ITEMS] per judge, NaN where there is nothing to score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .kinds import JUDGES, MAX_ITEMS, TRUTH, Judge, reported
from .retention import Report, retained, spread_entry
from .statistics import Bootstrap, interval, rounded

ByJudge = dict[str, np.ndarray]
SHORT = {
    TRUTH: "truth",
    "recomposed": "redrawn",
    "background_alone": "empty",
    "positions_shuffled": "shuffled",
    "object_swapped": "swapped",
    "references_swapped": "exchanged",
    "other_answer": "other",
    "mean_answer": "mean",
}
TITLE, OWN = 36, 26  # widths of the table's first columns


def empty(n: int, judges: Sequence[Judge] = JUDGES) -> ByJudge:
    return {judge.name: np.full((n, MAX_ITEMS), np.nan) for judge in judges}


@dataclass
class Scores:
    """All that was measured on n samples: their tasks, each system (in order) and each control.

    ``spreads``: of each system, float [n, 1], when it made several pictures per sample. ``hidden_spread`` [n, 1]: the
    same measure between the truth and the truth drawn again, of open scenes between any two answers.
    ``reached``: of each system, float [n, 1], how many answers its pictures of a scene are nearest to;
    ``reachable`` [n, 1]: of the truth drawn as often.
    """

    tasks: list[str]
    systems: dict[str, ByJudge] = field(default_factory=dict)
    controls: dict[str, ByJudge] = field(default_factory=dict)
    spreads: dict[str, np.ndarray] = field(default_factory=dict)
    hidden_spread: np.ndarray | None = None
    judges: Sequence[Judge] = JUDGES
    reached: dict[str, np.ndarray] = field(default_factory=dict)
    reachable: np.ndarray | None = None


def summarise(scores: Scores, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """One report per system: ``model``, ``judges`` and ``by_task``. Without systems one, of the controls alone.

    Those of the others have what they keep of the first (``retained``); where seeds vary, each has its ``spread``.
    """
    if not scores.systems:
        return [
            {
                "model": None,
                "judges": {judge.name: entry(judge, None, scores.controls, bootstrap) for judge in scores.judges},
            }
        ]
    first = next(iter(scores.systems))
    reports = []
    for label, measured in scores.systems.items():
        judges = {judge.name: entry(judge, measured, scores.controls, bootstrap) for judge in scores.judges}
        if label != first:
            for name, values in judges.items():
                values["versus_first"] = margin(measured[name], scores.systems[first][name], bootstrap)
        report = {"model": {"label": label}, "judges": judges, "by_task": by_task(scores.tasks, measured, judges)}
        if label != first:
            report["retained"] = retained(measured, scores.systems[first], judges, bootstrap)
        if scores.spreads:
            report |= seeds_report(scores, label, None if label == first else first, bootstrap)
        reports.append(report)
    return reports


def seeds_report(scores: Scores, label: str, first: str | None, bootstrap: Bootstrap) -> dict[str, Any]:
    """What several pictures of a scene show of a system: its spread, and of open scenes the answers it reaches.

    first: the system that its spread is compared with.
    """
    spread = spread_entry(scores.spreads[label], scores.spreads[first] if first else None, bootstrap)
    if scores.reachable is None or scores.hidden_spread is None:
        return {"spread": spread}
    reached = spread_entry(scores.reached[label], None, bootstrap)
    return {
        "spread": spread | of_truth(scores.spreads[label], scores.hidden_spread, bootstrap),
        "answers_reached": reached | of_truth(scores.reached[label], scores.reachable, bootstrap),
    }


def of_truth(own: np.ndarray, truth: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """The ratio of two means [n, 1], a system's and the truth's."""
    found = bootstrap.ratio(own, truth)
    return {"of_truth": rounded(found), "of_truth_ci95": interval(found)}


def entry(
    judge: Judge, measured: ByJudge | None, controls: Mapping[str, ByJudge], bootstrap: Bootstrap
) -> dict[str, Any]:
    """One judge: the model's mean, the controls' means on the items they are judged on, and the paired margins.

    ``beats`` of a margin: the 95% interval of the difference lies on the better side of zero.
    """
    values = {name: scores[judge.name] for name, scores in controls.items()}
    note = why_not(judge, values, bootstrap)
    result: dict[str, Any] = {
        "title": judge.title,
        "better": "higher" if judge.higher_is_better else "lower",
        "valid": not note,
        "model": None,
        "ci95": None,
        "controls": {name: rounded(bootstrap.mean(array)) for name, array in values.items()},
    }
    if note:
        result["note"] = note
    if measured is None or note:
        return result
    own = measured[judge.name]
    estimate = bootstrap.mean(own)
    if estimate:
        result |= {"model": rounded(estimate), "ci95": interval(estimate), "items": int(np.isfinite(own).sum())}
    result["margins"] = {}
    for name, array in values.items():
        against = margin(own, array, bootstrap)
        if against:
            low, high = against["ci95"]
            against["beats"] = low > 0 if judge.higher_is_better else high < 0
            result["margins"][name] = against
    return result


def why_not(judge: Judge, controls: Mapping[str, np.ndarray], bootstrap: Bootstrap) -> str:
    """Empty, or why the judge is not reported: it must score the truth better than each control it has to separate."""
    sign = 1 if judge.higher_is_better else -1
    compared = False
    for name in judge.separates:
        gap = bootstrap.difference(sign * controls[TRUTH], sign * controls[name])
        if gap is None:
            continue
        compared = True
        if gap.low <= 0:
            return f"not reported: cannot separate the truth from {name}"
    return "" if compared else "not reported: nothing to judge"


def margin(first: np.ndarray, second: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """first - second, paired on the items that both score, and the ratio of their means; None without such items."""
    difference, ratio = bootstrap.difference(first, second), bootstrap.ratio(first, second)
    if difference is None:
        return None
    return {
        "difference": rounded(difference),
        "ci95": interval(difference),
        "ratio": rounded(ratio),
        "ratio_ci95": interval(ratio),
    }


def by_task(tasks: Sequence[str], measured: ByJudge, judges: Report) -> dict[str, dict[str, Any]]:
    """The model's means of each task, for the judges that are reported."""
    result: dict[str, dict[str, Any]] = {}
    for task in sorted(set(tasks)):
        rows = np.array([one == task for one in tasks])
        result[task] = {"n": int(rows.sum())}
        for name, values in measured.items():
            scored = values[rows][np.isfinite(values[rows])]
            if judges[name]["valid"] and len(scored):
                result[task][name] = round(float(scored.mean()), 5)
    return result


def shown(judge: Judge, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if judge.share else f"{value:.{judge.digits}f}"


def with_interval(judge: Judge, value: float | None, bounds: Sequence[float] | None) -> str:
    low, high = bounds or (None, None)
    return f"{shown(judge, value)} [{shown(judge, low)}, {shown(judge, high)}]"


def table(report: Report) -> str:
    """The judges as lines of text: the model with its interval, then the controls; * marks one that it does not beat.

    A later system also has its difference from the first. The controls: truth; redrawn with other hidden scale, flip
    and offset (the fair ceiling); the empty background; positions shuffled; the last item swapped for another; the
    first two items exchanged. Of open scenes: truth; another answer, redrawn; the mean of all answers; the empty
    background; the last item swapped. Below them what only pictures of several seeds show.
    """
    label = report["model"]["label"] if report["model"] else ""
    against_first = any("versus_first" in found for found in report["judges"].values())
    head = f"{'':{TITLE}}" + (f"{label[: OWN - 2]:>{OWN}}" if label else "")
    head += f"{'minus the first':>{OWN}}" if against_first else ""
    judges = reported(report["judges"])
    controls = list(report["judges"][judges[0].name]["controls"])
    head += "".join(f"{SHORT[name]:>10} " for name in controls)
    cut = [label] if len(label) > OWN - 2 else []
    lines = [*cut, head.rstrip(), "-" * len(head)]
    for judge in judges:
        found = report["judges"][judge.name]
        line = f"{judge.title:{TITLE}}"
        if not found["valid"]:
            lines.append(f"{line}  {found['note']}")
            continue
        if label:
            line += f"{with_interval(judge, found['model'], found['ci95']):>{OWN}}"
        if against_first:
            gap = found["versus_first"] or {"difference": None, "ci95": None}
            line += f"{with_interval(judge, gap['difference'], gap['ci95']):>{OWN}}"
        lines.append((line + "".join(_control_cell(judge, found, name) for name in controls)).rstrip())
    return "\n".join(lines + _seed_lines(report))


def _seed_lines(report: Report) -> list[str]:
    """Of open scenes: how much of the truth's spread and of its answers the pictures of several seeds have."""
    titles = {"spread": "spread between seeds, of the truth's", "answers_reached": "answers reached, of the truth's"}
    lines = []
    for name, title in titles.items():
        found = report.get(name, {})
        if found.get("of_truth") is not None:
            low, high = found["of_truth_ci95"]
            text = f"{found['of_truth']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"{title:{TITLE}}{text:>{OWN}}")
    return lines


def _control_cell(judge: Judge, found: Report, name: str) -> str:
    against = found.get("margins", {}).get(name)
    unbeaten = against and name in judge.separates and not against["beats"]
    return f"{shown(judge, found['controls'].get(name)):>10}{'*' if unbeaten else ' '}"
