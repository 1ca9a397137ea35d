"""The plot of the metrics of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.tools.curves import draw_curves

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def run(folder: Path, *names: str) -> Path:
    folder.mkdir()
    rows = [{"step": step, **dict.fromkeys(names, 1.0 + step)} for step in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_run_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    draw_curves([run(tmp_path / "first", "a"), run(tmp_path / "second", "a", "b")], out)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    left, right = np.array_split(picture, 2, axis=1)

    def shows(part: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((np.abs(part - colour).sum(-1) < 12).any())

    assert shows(left, BLUE)  # legend
    assert shows(left, ORANGE)
    assert shows(right, ORANGE)
    assert not shows(right, BLUE), "the second run alone has b"


def test_many_metrics_are_drawn_in_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    draw_curves([run(tmp_path / "one", *"abcdef")], out)
    width, height = Image.open(out).size
    assert width == 4 * 550
    assert height > 700
