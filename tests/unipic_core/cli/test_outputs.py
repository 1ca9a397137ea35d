"""compose writes over nothing that the user did not name: files, inputs, links, devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unipic_core.cli import compose as command
from unipic_core.cli.arguments import parser
from unipic_core.cli.commands import main
from unipic_core.cli.outputs import check_outputs, free_path, output_paths
from unipic_core.errors import UniPicError

FAST = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def loaded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_pipeline", lambda *_: tiny)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(command, "load_pipeline", load)


def run(golden: Path, picture: Path, out: Path, *more: object) -> int:
    place = ["--model", golden / "tiny", "--out", out, *more]
    return main(["compose", str(picture), "--prompt", "a cat", *FAST, *map(str, place)])


def test_an_existing_file_asks_for_overwrite(golden: Path, picture: Path, loaded: None, capsys: Any) -> None:
    out = picture.with_name("out.png")
    out.write_bytes(b"older")
    assert run(golden, picture, out) == 2
    assert "out.png already exists; choose another name, or replace it with --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"older"
    assert run(golden, picture, out, "--overwrite") == 0
    assert Image.open(out).size == (32, 16)


def test_names_of_several_pictures_are_checked(golden: Path, picture: Path, unloaded: None, capsys: Any) -> None:
    older = picture.with_name("out-8.png")
    older.write_bytes(b"older")
    assert run(golden, picture, picture.with_name("out.png"), "--num-images", 3, "--seed", 7) == 2
    assert "out-8.png already exists" in capsys.readouterr().err
    assert older.read_bytes() == b"older"


@pytest.mark.parametrize("kind", ["itself", "hard link", "several"])
def test_an_input_is_never_written_over(golden: Path, picture: Path, unloaded: None, capsys: Any, kind: str) -> None:
    before, out, more = picture.read_bytes(), picture, []
    if kind == "hard link":
        out = picture.with_name("other.png")
        os.link(picture, out)
    elif kind == "several":
        out, more = picture, ["--num-images", "2"]
        picture = picture.rename(picture.with_name("cat-1.png"))
    assert run(golden, picture, out, "--overwrite", *more) == 2
    assert "is an input of this command and would be lost" in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_the_default_name_is_checked_like_any_other(
    picture: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(picture.parent)
    assert parser().parse_args(["compose", "-p", "a"]).out == Path("out.png")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemExit):
        main(["compose", str(picture), "-p", "a cat"])
    assert "'out.png' may not be written; choose another place" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_links_and_devices_are_refused(golden: Path, picture: Path, unloaded: None, capsys: Any, kind: str) -> None:
    out, other = picture.with_name("out.png"), picture.with_name("other.png")
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(other)
    if kind == "link":
        other.write_bytes(b"other")
    assert run(golden, picture, out, "--overwrite") == 2
    assert ("a device or a pipe" if kind == "pipe" else "out.png is a link to") in capsys.readouterr().err
    assert not other.exists() or other.read_bytes() == b"other"


def test_what_appears_while_composing_stays(
    golden: Path, picture: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = picture.with_name("out.png")

    def load(*_: Any) -> Any:
        out.write_bytes(b"of another program")
        return tiny

    monkeypatch.setattr(command, "load_pipeline", load)
    assert run(golden, picture, out) == 0
    assert "the picture is written to" in capsys.readouterr().err
    assert out.read_bytes() == b"of another program"
    assert Image.open(picture.with_name("out-2.png")).size == (32, 16)


def test_what_appears_while_the_picture_is_encoded_stays(
    golden: Path, picture: Path, loaded: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, save = picture.with_name("out.png"), Image.Image.save

    def slow(image: Image.Image, path: Path, **how: Any) -> None:
        save(image, path, **how)
        out.write_bytes(b"of another program")

    monkeypatch.setattr(Image.Image, "save", slow)
    assert run(golden, picture, out) == 0
    assert "the picture is written to" in capsys.readouterr().err
    assert out.read_bytes() == b"of another program"
    assert Image.open(picture.with_name("out-2.png")).size == (32, 16)


def test_names(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "a.png", 7, 1) == [tmp_path / "a.png"]
    assert output_paths(tmp_path / "a.png", 7, 2) == [tmp_path / "a-7.png", tmp_path / "a-8.png"]
    check_outputs(output_paths(tmp_path / "a.png", 7, 2), [], False)
    (tmp_path / "a.png").touch()
    (tmp_path / "a-2.png").touch()
    assert free_path(tmp_path / "a.png") == tmp_path / "a-3.png"
    with pytest.raises(UniPicError, match="cannot be written"):
        check_outputs([tmp_path / "a.png" / "b" / ("x" * 300)], [], False)
