"""`python -m trainers.curves RUN [RUN ...] --out FILE.png`: plot the metrics of runs from their metrics.jsonl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unipic_core.replacing import replacing

from ..judges.vlm import read_lines
from ..terminal import exit_code

PANELS_IN_A_ROW = 4
NOT_DRAWN = ("step", "lr", "grad_norm", "seconds_per_step", "samples_per_second", "peak_memory_gib")


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the records of a run folder or a metrics.jsonl file. Raises ValueError if there is none to draw."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        came = "a folder without this file" if run.is_dir() else "which is no file"
        raise ValueError(f"expected the output folder of a run or its metrics.jsonl, got {run}, {came}; check the path")
    rows = list(read_lines(path))
    wrong = [row for row in rows if "step" not in row or not all(isinstance(one, (int, float)) for one in row.values())]
    if wrong:
        raise ValueError(f"{path}: expected a step and numbers in each line, got {str(wrong[0])[:80]}; check the path")
    if not drawn_metrics(rows):
        raise ValueError(f"{path} has no metrics to draw; training writes the first ones after log_every steps")
    return rows


def drawn_metrics(rows: Sequence[dict[str, float]]) -> list[str]:
    """Names of the metrics that have a panel, in the order of the records."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name.split("/")[-1] not in NOT_DRAWN]


def labels_of(runs: Sequence[Path]) -> list[str]:
    """A label for each run: the name of its folder or file, after as many parent folders as tell it from the others."""
    whole = [run.resolve() for run in runs]
    paths = [path.with_suffix("").parts if path.is_file() else path.parts for path in whole]
    labels = []
    for number, parts in enumerate(paths):
        others = [other for other, path in zip(paths, whole, strict=True) if path != whole[number]]
        ends = (parts[-count:] for count in range(1, len(parts) + 1))
        unique = (end for end in ends if all(other[-len(end) :] != end for other in others))
        labels.append("/".join(next(unique, (str(runs[number]),))))
    return labels


def draw_curves(runs: Sequence[Path], out: Path, smooth: int = 5) -> None:
    """Draw one panel per metric and one line per run, in one colour in all panels: raw values, and their mean over
    `smooth` records on each side. A run that is given twice is drawn once. Raises ValueError as `read_metrics`."""
    records = dict(zip(labels_of(runs), map(read_metrics, runs), strict=True))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    names = drawn_metrics([row for rows in records.values() for row in rows])
    wide = min(len(names), PANELS_IN_A_ROW)
    high = -(-len(names) // wide)
    figure, grid = pyplot.subplots(high, wide, figsize=(5 * wide, 3.6 * high), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        for number, rows in enumerate(records.values()):
            points = [(r["step"], r[name]) for r in rows if name in r]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            windows = [values[max(0, i - smooth) : i + smooth + 1] for i in range(len(values))]
            means = [sum(window) / len(window) for window in windows]
            panel.plot(steps, means, color=f"C{number}")
            panel.plot(steps, values, color=f"C{number}", alpha=0.2)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        if name.split("/")[-1] in ("loss", "l1"):
            panel.set_yscale("log")
    # Of all runs, since some have no line in the first panel.
    panels[0].legend(handles=[Line2D([], [], color=f"C{number}", label=label) for number, label in enumerate(records)])
    with replacing(out) as partial:
        figure.savefig(partial, dpi=110, format=out.suffix.removeprefix(".") or "png")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders, or metrics.jsonl files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args(argv)
    return exit_code(lambda: draw_curves(args.runs, args.out), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
