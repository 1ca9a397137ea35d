"""`python -m trainers.curves RUN [RUN ...] --out FILE.png`: plot the metrics of runs from their metrics.jsonl."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

PANELS_IN_A_ROW = 4
NOT_DRAWN = ("step", "lr", "grad_norm", "seconds_per_step", "samples_per_second", "peak_memory_gib")


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the records of a run folder or a metrics.jsonl file."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(runs: Sequence[Path], out: Path, smooth: int = 5) -> None:
    """Draw one panel per metric and one line per run, in one colour in all panels: raw values, and their mean over
    `smooth` records on each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = {run.stem if run.is_file() else run.name: read_metrics(run) for run in runs}
    keys = dict.fromkeys(k for rows in records.values() for row in rows for k in row)
    names = [k for k in keys if k.split("/")[-1] not in NOT_DRAWN]
    wide = min(len(names), PANELS_IN_A_ROW)
    high = -(-len(names) // wide)
    figure, grid = pyplot.subplots(high, wide, figsize=(5 * wide, 3.6 * high), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        for number, (label, rows) in enumerate(records.items()):
            points = [(r["step"], r[name]) for r in rows if name in r]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            windows = [values[max(0, i - smooth) : i + smooth + 1] for i in range(len(values))]
            means = [sum(window) / len(window) for window in windows]
            panel.plot(steps, means, color=f"C{number}", label=label)
            panel.plot(steps, values, color=f"C{number}", alpha=0.2)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
        if name.split("/")[-1] in ("loss", "l1"):
            panel.set_yscale("log")
    panels[0].legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainers.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders, or metrics.jsonl files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args()
    draw_curves(args.runs, args.out)


if __name__ == "__main__":
    main()
