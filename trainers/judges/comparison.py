"""Systems beside the first of them in one table: what each scores, how much it keeps of the first, how long it takes.

The block that ``comparison`` makes goes into the JSON; the text, the foot of the sheet and the plot only show it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .kinds import TRUTH, Judge, reported
from .retention import Report, valid_judges
from .summary import shown

LABEL = 28  # width of the table's first column
Cell = tuple[str, str]  # two lines
Wrap = Callable[[str], list[str]]
FACTS = ("label", "series", "steps", "cfg", "sampler", "seconds_per_picture")


def comparison(reports: Sequence[Report], truth_spread: float | None = None) -> dict[str, Any]:
    """From the reports of ``summarise``, the reference first: one row per system with the judges that are reported.

    ``kinds``: whether ``retained`` is a ratio or a difference in dB. The reference itself has no ``retained``.
    ``truth``: what the truth scores; ``truth_spread`` joins it where the spread between seeds was measured.
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
    row = {fact: report["model"][fact] for fact in FACTS if fact in report["model"]}
    if "spread" in report:
        row["spread"] = report["spread"]
    row["judges"] = {}
    for judge in judges:
        found = report["judges"][judge.name]
        row["judges"][judge.name] = {"value": found["model"], "ci95": found["ci95"]}
        if "retained" in report:
            kept = report["retained"][judge.name]
            row["judges"][judge.name] |= {"retained": kept["value"], "retained_ci95": kept["ci95"]}
    return row


def kept_text(kind: str, value: float | None, bounds: Sequence[float] | None) -> str:
    """As '0.98 (0.95)' or '-0.2 (-0.4)': the lower bound is rounded down, so that it never promises more than it is."""
    if value is None or bounds is None:
        return "-"
    if kind == "difference_db":
        return f"{round(value, 1) + 0.0:+.1f} ({math.floor(10 * bounds[0]) / 10 + 0.0:+.1f})"
    return f"{value:.2f} ({math.floor(100 * bounds[0]) / 100:.2f})"


def judge_lines(judge: Judge, block: Report, row: Report) -> Cell:
    """One cell: the system's value, and what it keeps of the reference's."""
    found = row["judges"][judge.name]
    value = shown(judge, found["value"])
    if "retained" not in found:
        return value, ""
    return value, kept_text(block["kinds"][judge.name], found["retained"], found["retained_ci95"])


def spread_lines(row: Report) -> Cell:
    """The same of the spread between seeds."""
    spread = row["spread"]
    kept = kept_text("ratio", spread["ratio"], spread["ratio_ci95"]) if "ratio" in spread else ""
    return f"{spread['value']:.4f}", kept


def time_lines(block: Report, row: Report) -> Cell:
    """The seconds per picture, and how many times the speed of the reference that is."""
    seconds, first = row["seconds_per_picture"], block["systems"][0]
    if row is first or not seconds:
        return f"{seconds:.3f}", ""
    return f"{seconds:.3f}", f"{first['seconds_per_picture'] / seconds:.1f}x speed"


def shown_judges(block: Report) -> list[Judge]:
    return reported(block["kinds"])


def comparison_table(block: Report) -> str:
    """Rows are systems, columns judges; below each value what is kept of the first system's."""
    judges, spreads = shown_judges(block), "spread" in block["systems"][0]
    truth: list[Cell] = [(shown(judge, block["truth"][judge.name]), "") for judge in judges]
    truth.append(("", ""))  # nobody waited for it
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
    """The pairs of ``ratios.equal_steps``; * marks a difference whose 95% interval excludes zero."""
    judges = reported(pairs[0]["judges"])
    lines = []
    for pair in pairs:
        labels = label_lines(pair["system"]) + label_lines(f"minus {pair['against']}")
        lines.append((labels, [(_gain_text(judge, pair["judges"][judge.name]), "") for judge in judges]))
    return _table([judge.short for judge in judges], lines)


def _gain_text(judge: Judge, found: Report) -> str:
    if found["gain"] is None:
        return "- "
    sign = "+" if found["gain"] >= 0 else ""
    return f"{sign}{shown(judge, found['gain'])}{'*' if found['better'] or found['worse'] else ' '}"


def label_lines(label: str, wrap: Wrap = lambda text: textwrap.wrap(text, LABEL)) -> list[str]:
    """The label on one line if it fits; else what it is, then on new lines the settings after its first comma."""
    if len(wrap(label)) < 2:
        return [label]
    name, _, settings = label.partition(", ")
    return wrap(name) + wrap(settings)


def _table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]) -> str:
    """Each row: a label of as many lines as it needs beside cells of two. A column is as wide as its widest cell."""
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
