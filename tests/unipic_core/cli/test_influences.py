"""`unipic compose --boxes, --strengths, --ranges`: what reaches the plan, and one sentence for mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from unipic_core.cli.arguments import parser
from unipic_core.cli.commands import main
from unipic_core.cli.compose import influences_of
from unipic_core.conditioning.influence import Influence, Region
from unipic_core.errors import UniPicError

BOXES = '[{"id": "image_2", "bbox": [0, 500, 1000, 1000]}]'


def influences(*arguments: str) -> list[Influence] | None:
    return influences_of(parser().parse_args(["compose", "a.png", "b.png", "--prompt", "p", *arguments]))


def test_options(tmp_path: Path) -> None:
    region = Region(500, 0, 1000, 1000)
    assert influences() is None
    assert influences("--boxes", BOXES) == [Influence(), Influence(region=region)]
    (tmp_path / "boxes.json").write_text(BOXES, encoding="utf-8")
    path = str(tmp_path / "boxes.json")
    all_of_them = influences("--boxes", path, "--strengths", "0.5,2", "--ranges", "0-1,0.25-0.5")
    assert all_of_them == [Influence(0.5), Influence(2.0, region, 0.25, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strengths", "1"], "--strengths must have one value for each of 2 pictures, got 1"),
        (["--ranges", "0-1,0-1,0-1"], "--ranges must have one value for each of 2 pictures, got 3"),
        (["--strengths", "1,-2"], "strength must be a number from 0 to 100, got -2.0"),
        (["--boxes", "absent.json"], "--boxes must be JSON or a file of it, got 'absent.json'"),
        (["--boxes", "[1]"], "boxes must be a list of rows"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UniPicError, match=message):
        influences(*arguments)


def test_a_strength_changes_the_picture_and_1_does_not(golden: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    pictures = []
    for name, more in (("plain", []), ("one", ["--strengths", "1"]), ("none", ["--strengths", "0"])):
        out = tmp_path / f"{name}.png"
        sizes = ["--size", "64x64", "--reference-budget", "64", "--steps", "1", "--device", "cpu"]
        place = ["--model", str(golden / "tiny"), "--out", str(out), *sizes, *more]
        assert main(["compose", str(tmp_path / "red.png"), "--prompt", "a cat", *place]) == 0
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
