"""Plot of retained quality against steps or seconds: a panel per judge, a line per model and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison import reported_judges
from ..kinds import Judge
from ..retention import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
SPACING = 0.07  # between the bars of two series at equal steps, of a doubling of the steps
Point = tuple[float, float, float, float]  # steps or seconds, value, low, high

AXES = {"steps": "steps", "seconds": "seconds_per_picture"}
"""Axis -> key of a comparison row."""


def draw_plot(block: Report, out: Path, against: str = "steps") -> None:
    """Draw a ``comparison`` as PNG; error bars are 95% intervals, the dashed line is the reference.

    Every system needs ``steps``; systems of one ``series`` are joined by a line. against: one of AXES.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {judge.name: f"{judge.title}, {retained_words(judge)}" for judge in reported_judges(block)}
    if "spread" in block["systems"][0]:
        titles["spread"] = "spread between seeds, ratio"
    rows = ceil(len(titles) / COLUMNS)
    figure, panels = pyplot.subplots(
        rows, COLUMNS, figsize=(4 * COLUMNS, 3 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for panel, (name, title) in zip(panels.flat, titles.items(), strict=False):
        draw_panel(panel, block, name, title, against)
    for panel in panels.flat[len(titles) :]:
        panel.set_axis_off()
    # sharex hides the ticks of all rows but the last, where a column may end sooner
    for panel in panels.flat[max(0, len(titles) - COLUMNS) : len(titles)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(AXES[against].replace("_", " "))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw_panel(panel: Axes, block: Report, name: str, title: str, against: str) -> None:
    """Draw the panel of one judge, or of the spread."""
    decibels = block["kinds"].get(name) == "difference_db"
    equal_quality = 0.0 if decibels else 1.0
    panel.axhline(equal_quality, color="0.4", linestyle="--", linewidth=1, label=f"the reference: {block['reference']}")
    panel.plot([block["systems"][0][AXES[against]]], [equal_quality], marker="s", color="0.4")
    series = series_of(block, name, against)
    spacing = SPACING if against == "steps" else 0  # bars at equal steps stand side by side
    for index, (label, points) in enumerate(series.items()):
        factor = 2 ** (spacing * (index - (len(series) - 1) / 2))
        # a percentile interval may exclude the value itself; bars need lengths of at least 0
        errors = [[max(v - low, 0) for _, v, low, _ in points], [max(high - v, 0) for _, v, _, high in points]]
        places, values = [point[0] * factor for point in points], [point[1] for point in points]
        panel.errorbar(places, values, errors, marker="o", markersize=4, capsize=3, linewidth=1.4, label=label)
    panel.set_xscale("log", base=2)
    if against == "steps":
        ticks = sorted({row["steps"] for row in block["systems"]})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
    else:
        panel.xaxis.set_major_formatter("{x:.2g}")
    panel.set_title(title, fontsize=9)
    panel.grid(alpha=0.3)


def retained_words(judge: Judge) -> str:
    """Meaning of the y axis."""
    if judge.decibels:
        return "difference"
    return "ratio retained" if judge.higher_is_better else "ratio retained (inverted)"


def series_of(block: Report, name: str, against: str = "steps") -> dict[str, list[Point]]:
    """Points of each series, sorted by steps or seconds; without those whose ratio does not exist."""
    series: dict[str, list[Point]] = {}
    for row in block["systems"][1:]:
        value, bounds = retained_of(row, name)
        points = series.setdefault(row.get("series", row["label"]), [])
        if value is not None and bounds is not None:
            points.append((row[AXES[against]], value, bounds[0], bounds[1]))
    return {label: sorted(points) for label, points in series.items()}


def retained_of(row: Report, name: str) -> tuple[float | None, Sequence[float] | None]:
    """Retained quality of one judge, or ratio of the spread, with its interval."""
    if name == "spread":
        return row["spread"]["ratio"], row["spread"]["ratio_ci95"]
    return row["judges"][name]["retained"], row["judges"][name]["retained_ci95"]
