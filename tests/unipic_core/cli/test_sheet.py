"""compose --sheet: inputs, prompt and results in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unipic_core.cli import compose as command
from unipic_core.cli.commands import main
from unipic_core.cli.sheet import GAP, INPUT, LEFT, RESULT, picture_sheet, wrapped

FAST = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]
COLOURS = ("red", "green", "blue", "yellow")


def colour_at(sheet: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = sheet.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_inputs_stand_in_rows_and_results_beside_them() -> None:
    inputs = [Image.new("RGB", (40, 20), colour) for colour in COLOURS]
    results = [Image.new("RGB", (30, 30), colour) for colour in ("black", "purple")]
    sheet = picture_sheet(inputs, "a cat in a box", results)
    for index, picture in enumerate(inputs):
        row, column = divmod(index, 3)
        middle = (GAP + column * (INPUT + GAP) + INPUT // 2, GAP + row * (INPUT + GAP) + INPUT // 2)
        assert colour_at(sheet, *middle) == picture.getpixel((0, 0))
    for index, picture in enumerate(results):
        left = 2 * GAP + LEFT + index * (RESULT + GAP)
        assert colour_at(sheet, left + 2, GAP + 2) == picture.getpixel((0, 0))
    assert sheet.width == 2 * GAP + LEFT + 2 * (RESULT + GAP)


def test_a_long_prompt_is_wrapped_and_makes_room() -> None:
    prompt = "put the cup of image 1 beside the guitar of image 2 " * 12
    assert " ".join(wrapped(prompt, LEFT)) == prompt.strip()
    inputs = [Image.new("RGB", (8, 8))]
    short, long = (picture_sheet(inputs, text, inputs) for text in ("a cat", prompt))
    assert long.height > short.height
    below = np.asarray(long.crop((GAP, short.height, GAP + LEFT, long.height)).convert("L"))
    assert below.min() < 60  # the words go on there


@pytest.fixture
def picture(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "load_pipeline", lambda *_: tiny)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def run(golden: Path, picture: Path, *more: object) -> int:
    place = ["--model", golden / "tiny", "--out", picture.with_name("out.png"), *more]
    return main(["compose", str(picture), "--prompt", "a cat", *FAST, *map(str, place)])


def test_compose_writes_the_sheet_of_all_results(golden: Path, picture: Path, capsys: Any) -> None:
    sheet = picture.with_name("sheet.png")
    assert run(golden, picture, "--sheet", sheet, "--num-images", 2) == 0
    written = Image.open(sheet)
    assert written.width == 2 * GAP + LEFT + 2 * (RESULT + GAP)
    assert "unipic" in written.info
    assert capsys.readouterr().out.splitlines()[-1] == str(sheet)
    first = (
        Image.open(picture.with_name("out-0.png"))
        .convert("RGB")
        .resize((RESULT, RESULT // 2), Image.Resampling.LANCZOS)
    )
    left, top = 2 * GAP + LEFT, GAP + RESULT // 4
    shown = written.crop((left, top, left + RESULT, top + RESULT // 2))
    assert np.abs(np.asarray(shown, float) - np.asarray(first, float)).max() == 0


def test_a_sheet_replaces_no_file_unasked(golden: Path, picture: Path, capsys: Any) -> None:
    sheet = picture.with_name("sheet.png")
    sheet.write_bytes(b"older")
    assert run(golden, picture, "--sheet", sheet) == 2
    assert "sheet.png already exists" in capsys.readouterr().err
    assert run(golden, picture, "--sheet", picture.with_name("out.png")) == 2
    assert "--sheet and --out name the same file" in capsys.readouterr().err
    assert run(golden, picture, "--sheet", picture, "--overwrite") == 2
    assert "is an input of this command" in capsys.readouterr().err
    assert run(golden, picture, "--sheet", sheet, "--overwrite") == 0
