"""The plot of the metrics of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.tools.curves import draw_curves, labels_of, main

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def run(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": step, **dict.fromkeys(names, 1.0 + step)} for step in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def shows(part: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(part - colour).sum(-1) < 12).any())


def test_a_run_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    draw_curves([run(tmp_path / "first", "a"), run(tmp_path / "second", "a", "b")], out)
    left, right = np.array_split(pixels(out), 2, axis=1)
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


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run(tmp_path / name, "a") for name in ("x/sft", "y/sft", "y/dmd", "z/y/sft")]
    monkeypatch.chdir(runs[0])
    assert labels_of([Path("."), *runs[1:]]) == ["x/sft", f"{tmp_path.name}/y/sft", "dmd", "z/y/sft"]
    files = [one / "metrics.jsonl" for one in runs[:2]]
    assert labels_of([*files, files[0]]) == ["x/sft/metrics", "y/sft/metrics", "x/sft/metrics"]


def test_every_run_is_drawn_and_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [run(tmp_path / name, metric) / "metrics.jsonl" for name, metric in (("one", "a"), ("two", "b"))]
    assert main([*map(str, files), "--out", str(tmp_path / "curves.png")]) == 0
    left, right = np.array_split(pixels(tmp_path / "curves.png"), 2, axis=1)
    assert shows(left, BLUE)
    assert shows(left, ORANGE), "the legend names the run without a line in its panel too"
    assert shows(right, ORANGE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing, which is no file; check the path"),
        ("", "empty, a folder without this file; check the path"),
        ("\n", "metrics.jsonl has no metrics to draw; training writes the first ones after log_every steps"),
        ('{"step": 1, "lr": 0.1}\n', "has no metrics to draw"),
        ('{"loss": 1}\n', "expected a step and numbers in each line, got {'loss': 1}"),
        ('{"step": 1, "loss": "low"}\n', "expected a step and numbers in each line"),
        ("no metrics\n", "metrics.jsonl, line 1 is not JSON"),
    ],
)
def test_a_run_without_metrics_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    folder = tmp_path / ("missing" if content is None else "run" if content else "empty")
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "metrics.jsonl").write_text(content, encoding="utf-8")
    assert main([str(folder), "--out", str(tmp_path / "curves.png")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_a_run_that_is_being_written_is_drawn_without_its_last_half_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = run(tmp_path / "run", "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 20, "a"')
    assert main([str(folder), "--out", str(tmp_path / "curves.png")]) == 0


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = str(run(tmp_path / "run", "a"))
    for out in ("no/such/folder/curves.png", ".", "curves.words"):
        assert main([folder, "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
