"""Rows as a hostile or careless user brings them: no picture and no line ends a caching run."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.paths import ROOT, TINY
from trainers import cache
from trainers.config.parse import make_folder
from trainers.config.run import ConfigError
from trainers.config.yaml_reader import read_yaml_mapping
from trainers.judges.vlm.config import read_judge
from trainers.judges.vlm.errors import JudgeError

TRAINING = "tests/compat/fixtures/training"
CONFIG = f"{TRAINING}/config.yaml"
UNIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on Unix alone")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a training's config, pictures and model."""
    shutil.copytree(ROOT / TRAINING, tmp_path / TRAINING)
    shutil.copytree(TINY, tmp_path / "tests" / "golden" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@UNIX
def test_one_bad_picture_never_ends_a_run(place):
    folder = place / TRAINING
    lines = (folder / "rows.jsonl").read_text().splitlines()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "cut.png").write_bytes((folder / "r0.png").read_bytes()[:60])
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    names = [
        "pipe.png",
        "device.png",
        "loop.png",
        "cut.png",
        "script.png",
        "n" * 300 + ".png",
        "/etc/passwd",
        "x\0y.png",
    ]
    bad = [{**json.loads(lines[0]), "input_images": [name]} for name in names]
    bad += [{**json.loads(lines[0]), "instruction": text} for text in ("", "\ud800", "<|im_end|>", "x" * 100_000)]
    rows = [*lines, *map(json.dumps, bad), "[]", "null", "{bad", "9" * 5000]
    (folder / "odd.jsonl").write_text("\n".join(rows) + "\n")
    assert cache.main([CONFIG, "data.folder=cache", f"data.path={TRAINING}/odd.jsonl", "data.bad_rows=skip"]) == 0
    report = json.loads((place / "cache" / "report.json").read_text())
    assert (report["rows"], report["used"]) == (len(rows), len(lines))
    assert [skipped["row"] for skipped in report["skipped"]] == list(range(len(lines), len(rows)))
    assert all(len(skipped["reason"]) < 300 for skipped in report["skipped"])


@UNIX
@pytest.mark.parametrize("kind", ["pipe", "file", "dangling"])
def test_a_cache_goes_into_a_folder_alone(kind, place, capsys):
    path = place / "there"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    assert cache.main([CONFIG, f"data.folder={path}"]) == 2
    assert "data.folder: expected a folder, got" in capsys.readouterr().err
    assert path.lstat() == before


def test_folders_are_made_or_refused_in_a_sentence(tmp_path):
    make_folder(tmp_path / "a" / "b", "output")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(ConfigError, match="^output: expected a folder, got n{60,}: File name too long$|cannot"):
        make_folder(Path("n" * 300), "output")


@UNIX
def test_a_config_is_never_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is a device or a pipe"):
            read_yaml_mapping(path)
        with pytest.raises(JudgeError, match="is a device or a pipe"):
            read_judge(path)


def test_a_judge_s_config_is_bounded(tmp_path):
    """Nine levels of nine aliases stand for 400 million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "judge.yaml").write_text("\n".join(lines))
    with pytest.raises(JudgeError):
        read_judge(tmp_path / "judge.yaml")
