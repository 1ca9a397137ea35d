"""Comparison of systems with the first one (the reference): scores, quality retained, and time.

``comparison`` returns the block of the JSON report; the text table, the foot of the sheet and the plot show it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .kinds import TRUTH, Judge, reported
from .retention import Report, valid_judges
from .summary import format_value

LABEL = 28  # width of the table's first column
Cell = tuple[str, str]  # two lines
Wrap = Callable[[str], list[str]]
SYSTEM_KEYS = ("label", "series", "steps", "cfg", "sampler", "seconds_per_picture")


def comparison(reports: Sequence[Report], truth_spread: float | None = None) -> dict[str, Any]:
    """Comparison block of the reports of ``summarise`` (reference first): one row per system, with valid judges.

    ``kinds``: "ratio" or "difference_db", the meaning of ``retained``, which the reference itself has not. ``truth``:
    scores of the truth; ``truth_spread``: added to it if the spread between seeds was measured.
    """
    judges = valid_judges(reports[0]["judges"])
    truth = {judge.name: reports[0]["judges"][judge.name]["controls"][TRUTH] for judge in judges}
    if truth_spread is not None:
        truth["spread"] = truth_spread
    return {
        "reference": reports[0]["model"]["label"],
        "kinds": {judge.name: "difference_db" if judge.decibels else "ratio" for judge in judges},
        "truth": truth,
        "systems": [_row(report, judges) for report in reports],
    }


def _row(report: Report, judges: Sequence[Judge]) -> dict[str, Any]:
    row = {key: report["model"][key] for key in SYSTEM_KEYS if key in report["model"]}
    if "spread" in report:
        row["spread"] = report["spread"]
    row["judges"] = {}
    for judge in judges:
        scores = report["judges"][judge.name]
        row["judges"][judge.name] = {"value": scores["model"], "ci95": scores["ci95"]}
        if "retained" in report:
            quality = report["retained"][judge.name]
            row["judges"][judge.name] |= {"retained": quality["value"], "retained_ci95": quality["ci95"]}
    return row


def retained_text(kind: str, value: float | None, bounds: Sequence[float] | None) -> str:
    """Format as '0.98 (0.95)' or '-0.2 (-0.4)'; the lower bound is rounded down."""
    if value is None or bounds is None:
        return "-"
    if kind == "difference_db":
        return f"{round(value, 1) + 0.0:+.1f} ({math.floor(10 * bounds[0]) / 10 + 0.0:+.1f})"
    return f"{value:.2f} ({math.floor(100 * bounds[0]) / 100:.2f})"


def judge_lines(judge: Judge, block: Report, row: Report) -> Cell:
    """Cell of one judge: the system's value and the part of the reference's quality that it retains."""
    scores = row["judges"][judge.name]
    value = format_value(judge, scores["value"])
    if "retained" not in scores:
        return value, ""
    return value, retained_text(block["kinds"][judge.name], scores["retained"], scores["retained_ci95"])


def spread_lines(row: Report) -> Cell:
    """Cell of the spread between seeds."""
    spread = row["spread"]
    ratio = retained_text("ratio", spread["ratio"], spread["ratio_ci95"]) if "ratio" in spread else ""
    return f"{spread['value']:.4f}", ratio


def time_lines(block: Report, row: Report) -> Cell:
    """Cell of the time: seconds per picture, and speed relative to the reference."""
    seconds, first = row["seconds_per_picture"], block["systems"][0]
    if row is first or not seconds:
        return f"{seconds:.3f}", ""
    return f"{seconds:.3f}", f"{first['seconds_per_picture'] / seconds:.1f}x speed"


def reported_judges(block: Report) -> list[Judge]:
    """Judges of a comparison block, in the order of ``JUDGES``."""
    return reported(block["kinds"])


def comparison_table(block: Report) -> str:
    """Text table with a row per system and a column per judge; below each value the retained quality."""
    judges, spreads = reported_judges(block), "spread" in block["systems"][0]
    truth: list[Cell] = [(format_value(judge, block["truth"][judge.name]), "") for judge in judges]
    truth.append(("", ""))  # the truth has no time
    if spreads:
        truth.append((f"{block['truth']['spread']:.4f}", ""))
    lines = [([TRUTH], truth)]
    for row in block["systems"]:
        cells = [judge_lines(judge, block, row) for judge in judges] + [time_lines(block, row)]
        if spreads:
            cells.append(spread_lines(row))
        lines.append((label_lines(row["label"]), cells))
    return _table([judge.short for judge in judges] + ["s/picture"] + ["spread"] * spreads, lines)


def gains_table(pairs: Sequence[Report]) -> str:
    """Text table of the pairs of ``equal_steps``; * marks a difference whose 95% interval excludes zero."""
    judges = reported(pairs[0]["judges"])
    lines = []
    for pair in pairs:
        labels = label_lines(pair["system"]) + label_lines(f"minus {pair['against']}")
        lines.append((labels, [(_gain_text(judge, pair["judges"][judge.name]), "") for judge in judges]))
    return _table([judge.short for judge in judges], lines)


def _gain_text(judge: Judge, gain: Report) -> str:
    if gain["gain"] is None:
        return "- "
    sign = "+" if gain["gain"] >= 0 else ""
    return f"{sign}{format_value(judge, gain['gain'])}{'*' if gain['better'] or gain['worse'] else ' '}"


def label_lines(label: str, wrap: Wrap = lambda text: textwrap.wrap(text, LABEL)) -> list[str]:
    """Split a label that is too long for one line: the name, then the settings after its first comma."""
    if len(wrap(label)) < 2:
        return [label]
    name, _, settings = label.partition(", ")
    return wrap(name) + wrap(settings)


def _table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]) -> str:
    """Format rows of a wrapped label and two-line cells; a column is as wide as its widest cell."""
    widths = [len(head) for head in heads]
    for _, cells in rows:
        widths = [max(width, *map(len, cell)) for width, cell in zip(widths, cells, strict=True)]
    lines = [" " * LABEL + "".join(f"  {head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    lines += ["-" * len(lines[0])]
    for labels, cells in rows:
        for index in range(max(len(labels), 2)):
            left = labels[index] if index < len(labels) else ""
            right = [cell[index] if index < 2 else "" for cell in cells]
            text = f"{left:{LABEL}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(right, widths, strict=True))
            lines += [text.rstrip()] if text.strip() else []
    return "\n".join(lines)
