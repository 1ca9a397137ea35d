"""Reports from scores: means with intervals, margins over the controls, and judges that are not reported.

Scores are float [n, MAX_ITEMS] per judge, NaN if there is nothing to score.
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
TITLE, MODEL = 36, 26  # widths of the table's first columns


def empty(n: int, judges: Sequence[Judge] = JUDGES) -> ByJudge:
    """Scores of n samples, all NaN."""
    return {judge.name: np.full((n, MAX_ITEMS), np.nan) for judge in judges}


@dataclass
class Scores:
    """Scores of n samples: their tasks, each system (in order) and each control.

    ``spreads``: float [n, 1] per system, with several pictures per sample. ``hidden_spread``: [n, 1], the same measure
    between the truth and the truth drawn again, in open scenes between any two answers. ``reached``: float [n, 1] per
    system, number of answers that its pictures of a scene are nearest to; ``reachable``: [n, 1], the same of the truth
    drawn as often.
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
    """One report per system: ``model``, ``judges`` and ``by_task``; without systems one report of the controls.

    All but the first have the quality ``retained`` of the first; with several seeds each has its ``spread``.
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
    """Spread of a system over seeds, and in open scenes the answers it reaches.

    first: label of the system that its spread is compared with.
    """
    spread = spread_entry(scores.spreads[label], scores.spreads[first] if first else None, bootstrap)
    if scores.reachable is None or scores.hidden_spread is None:
        return {"spread": spread}
    reached = spread_entry(scores.reached[label], None, bootstrap)
    return {
        "spread": spread | of_truth(scores.spreads[label], scores.hidden_spread, bootstrap),
        "answers_reached": reached | of_truth(scores.reached[label], scores.reachable, bootstrap),
    }


def of_truth(system: np.ndarray, truth: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Ratio of the means of two columns [n, 1], a system's and the truth's."""
    ratio = bootstrap.ratio(system, truth)
    return {"of_truth": rounded(ratio), "of_truth_ci95": interval(ratio)}


def entry(
    judge: Judge, measured: ByJudge | None, controls: Mapping[str, ByJudge], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Report of one judge: the model's mean, the controls' means on their judged items, and paired margins.

    ``beats``: the 95% interval of the difference is on the better side of zero.
    """
    values = {name: scores[judge.name] for name, scores in controls.items()}
    note = reason_not_reported(judge, values, bootstrap)
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
    model_scores = measured[judge.name]
    estimate = bootstrap.mean(model_scores)
    if estimate:
        result |= {
            "model": rounded(estimate),
            "ci95": interval(estimate),
            "items": int(np.isfinite(model_scores).sum()),
        }
    result["margins"] = {}
    for name, array in values.items():
        against = margin(model_scores, array, bootstrap)
        if against:
            low, high = against["ci95"]
            against["beats"] = low > 0 if judge.higher_is_better else high < 0
            result["margins"][name] = against
    return result


def reason_not_reported(judge: Judge, controls: Mapping[str, np.ndarray], bootstrap: Bootstrap) -> str:
    """Reason why a judge is not reported, or "": it must score the truth above each control in ``separates``."""
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
    """Difference and ratio of two systems, paired on items that both score; None without such items."""
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
    """Means of the model per task, for valid judges."""
    result: dict[str, dict[str, Any]] = {}
    for task in sorted(set(tasks)):
        rows = np.array([one == task for one in tasks])
        result[task] = {"n": int(rows.sum())}
        for name, values in measured.items():
            scored = values[rows][np.isfinite(values[rows])]
            if judges[name]["valid"] and len(scored):
                result[task][name] = round(float(scored.mean()), 5)
    return result


def format_value(judge: Judge, value: float | None) -> str:
    """Format a score in the judge's unit; "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if judge.share else f"{value:.{judge.digits}f}"


def with_interval(judge: Judge, value: float | None, bounds: Sequence[float] | None) -> str:
    """Format a score with its interval in brackets."""
    low, high = bounds or (None, None)
    return f"{format_value(judge, value)} [{format_value(judge, low)}, {format_value(judge, high)}]"


def table(report: Report) -> str:
    """Text table of the judges: model with interval, then controls; * marks a control that the model does not beat.

    Further systems also have their difference from the first. Controls: truth; redrawn with other hidden scale, flip
    and offset (the fair ceiling); empty background; shuffled positions; last item swapped for another; first two items
    exchanged. Of open scenes: truth; another answer, redrawn; the mean of all answers; the empty
    background; the last item swapped. Below them what only pictures of several seeds show.
    """
    label = report["model"]["label"] if report["model"] else ""
    against_first = any("versus_first" in scores for scores in report["judges"].values())
    head = f"{'':{TITLE}}" + (f"{label[: MODEL - 2]:>{MODEL}}" if label else "")
    head += f"{'minus the first':>{MODEL}}" if against_first else ""
    judges = reported(report["judges"])
    controls = list(report["judges"][judges[0].name]["controls"])
    head += "".join(f"{SHORT[name]:>10} " for name in controls)
    full_label = [label] if len(label) > MODEL - 2 else []
    lines = [*full_label, head.rstrip(), "-" * len(head)]
    for judge in judges:
        scores = report["judges"][judge.name]
        line = f"{judge.title:{TITLE}}"
        if not scores["valid"]:
            lines.append(f"{line}  {scores['note']}")
            continue
        if label:
            line += f"{with_interval(judge, scores['model'], scores['ci95']):>{MODEL}}"
        if against_first:
            gap = scores["versus_first"] or {"difference": None, "ci95": None}
            line += f"{with_interval(judge, gap['difference'], gap['ci95']):>{MODEL}}"
        lines.append((line + "".join(_control_cell(judge, scores, name) for name in controls)).rstrip())
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
            lines.append(f"{title:{TITLE}}{text:>{MODEL}}")
    return lines


def _control_cell(judge: Judge, scores: Report, name: str) -> str:
    against = scores.get("margins", {}).get(name)
    unbeaten = against and name in judge.separates and not against["beats"]
    return f"{format_value(judge, scores['controls'].get(name)):>10}{'*' if unbeaten else ' '}"
