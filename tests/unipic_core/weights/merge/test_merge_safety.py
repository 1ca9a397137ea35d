"""Merging loses nothing of the user's, copies nothing from outside, and cleans up after killed runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from unipic_core.errors import CheckpointError
from unipic_core.replacing import SYSTEM, replacing, require_new, write_json
from unipic_core.weights.merge import merge

from .small_loras import TINY, files


@pytest.mark.parametrize("place", ["notes.txt", "transformer/notes.txt", "vae/deep/notes.txt", "recipe.json", "empty/"])
def test_a_folder_with_anything_of_the_users_is_not_overwritten(place: str, out: Path, lora: Path) -> None:
    merge(TINY, out / "model", [(lora, 1.0)])
    mine = out / "model" / place
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.mkdir() if place.endswith("/") else mine.write_text("dear")
    held = files(out)
    with pytest.raises(CheckpointError, match=f"holds {place.rstrip('/')}.*, which merge did not write|holds vae/deep"):
        merge(TINY, out / "model", [(lora, 2.0)], overwrite=True)
    assert files(out) == held
    assert mine.exists()


def dear(path: Path) -> None:
    """Write a user's file; of a path in an absent folder that one too."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("dear")


@pytest.mark.parametrize(
    ("dst", "mine"),
    [
        ("o.safetensors", "o.safetensors"),
        ("o.safetensors", "o.safetensors/notes.txt"),
        ("model", "model"),
        ("model", "model/notes.txt"),
    ],
)
def test_what_appears_during_a_merge_stays(dst: str, mine: str, out: Path, lora: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{dst} appeared while this was written, so it stays"):
        merge(TINY, out / dst, [(lora, 1.0)], progress=lambda *_: dear(out / mine))
    assert files(out) == {mine: b"dear"}
    assert [path.name for path in out.iterdir()] == [dst]


def test_an_empty_folder_that_appears_during_a_merge_is_refused_too(out: Path, lora: Path) -> None:
    with pytest.raises(CheckpointError, match="model appeared while this was written"):
        merge(TINY, out / "model", [(lora, 1.0)], progress=lambda *_: (out / "model").mkdir(exist_ok=True))
    assert [path.name for path in out.iterdir()] == ["model"]


def test_a_folder_that_gains_a_file_during_a_merge_is_not_overwritten(out: Path, lora: Path) -> None:
    merge(TINY, out / "model", [(lora, 1.0)])
    held, mine = files(out), out / "model" / "notes.txt"
    with pytest.raises(CheckpointError, match="holds notes.txt, which merge did not write"):
        merge(TINY, out / "model", [(lora, 2.0)], overwrite=True, progress=lambda *_: dear(mine))
    assert files(out) == {**held, "model/notes.txt": b"dear"}


def test_a_folder_that_comes_in_place_of_the_file_to_overwrite_stays(out: Path, lora: Path) -> None:
    mine = out / "o.safetensors" / "notes.txt"
    with pytest.raises(CheckpointError, match="cannot write .*directory"):
        merge(TINY, out / "o.safetensors", [(lora, 1.0)], overwrite=True, progress=lambda *_: dear(mine))
    assert files(out) == {"o.safetensors/notes.txt": b"dear"}


def test_a_model_that_merge_did_not_write_is_not_overwritten(out: Path, lora: Path) -> None:
    shutil.copytree(TINY, out / "model")
    held = files(out)
    with pytest.raises(CheckpointError, match="which merge did not write"):
        merge(TINY, out / "model", [(lora, 1.0)], overwrite=True)
    assert files(out) == held


def links(base: Path, kind: str) -> None:
    if kind == "file":
        (base.parent / "secret").write_text("key")
        (base / "tokenizer" / "secret.json").symlink_to(base.parent / "secret")
    elif kind == "folder":
        (base.parent / "secrets").mkdir()
        (base / "vae" / "more").symlink_to(base.parent / "secrets")
    elif kind == "loop":
        (base / "vae" / "again").symlink_to(base / "vae")
    elif kind == "broken":
        (base / "vae" / "absent").symlink_to(base / "nowhere")
    else:
        os.mkfifo(base / "vae" / "pipe")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "outside the model folder"),
        ("folder", "outside the model folder"),
        ("loop", "a folder that it lies in"),
        ("broken", "leads nowhere"),
        ("pipe", "a device or a pipe"),
    ],
)
def test_links_out_of_the_source_loops_and_pipes_are_refused(kind: str, message: str, out: Path, lora: Path) -> None:
    base = shutil.copytree(TINY, out.parent / "base")
    links(base, kind)
    with pytest.raises(CheckpointError, match=message):
        merge(base, out / "model", [(lora, 1.0)])
    assert list(out.iterdir()) == []


def test_links_within_the_source_are_copied_as_files(out: Path, lora: Path) -> None:
    base = shutil.copytree(TINY, out.parent / "base")
    (base / "vae" / "also.json").symlink_to(base / "vae" / "config.json")
    merge(base, out / "model", [(lora, 1.0)])
    copy = out / "model" / "vae" / "also.json"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (TINY / "vae" / "config.json").read_bytes()


def test_modes_and_links_at_the_destination_stay(tmp_path: Path) -> None:
    target = tmp_path / "real.json"
    target.write_text("older")
    target.chmod(0o600)
    (tmp_path / "link.json").symlink_to(target)
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_devices_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name, message in (("pipe", "a device or a pipe"), ("dangling", "leads nowhere")):
        with pytest.raises(CheckpointError, match=message):
            write_json(tmp_path / name, {})
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "dangling"}


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path: Path) -> None:
    token = f"{SYSTEM}{'0123456789abcdef' * 2}"[:32]
    dead = [tmp_path / f".unipic.partial-{token}.safetensors", tmp_path / f".unipic.partial-{token}"]
    dead[0].write_text("half")
    dead[1].mkdir()
    kept = [tmp_path / ".unipic.partial-mine", tmp_path / "model.partial-1234", tmp_path / f"x.unipic.partial-{token}"]
    for path in kept:
        path.write_text("dear")
    link = tmp_path / f".unipic.partial-{token[:-1]}0"
    link.symlink_to(kept[0])
    alive = tmp_path / f".unipic.partial-{token[:-1]}1"
    alive.write_text("in work")
    with open(alive) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        write_json(tmp_path / "a.json", {})
        assert alive.exists()
    assert not any(path.exists() for path in dead)
    assert all(path.read_text() == "dear" for path in kept)
    assert link.is_symlink()


def test_another_machine_s_leftovers_stay_for_a_day(tmp_path: Path) -> None:
    """Locks are not seen across machines on every shared folder, and one that is at work must not lose its file."""
    theirs = tmp_path / f".unipic.partial-{'f' * 8}{'0' * 24}.safetensors"
    theirs.write_text("in work")
    write_json(tmp_path / "a.json", {})
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    write_json(tmp_path / "a.json", {})
    assert not theirs.exists()


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a.json") as partial:
            names.add(partial.name)
    assert len(names) == 3
    assert all(len(name) > 32 and name.endswith(".json") for name in names)


def test_a_kill_between_the_two_renames_is_undone_by_the_next_run(out: Path, lora: Path) -> None:
    merge(TINY, out / "model", [(lora, 1.0)])
    held = files(out)
    pid = os.fork()
    if not pid:
        replace = os.replace

        def killed(src: Path, dst: Path) -> None:
            replace(src, dst)
            if src == out / "model":
                os._exit(0)

        os.replace = killed  # type: ignore[assignment]
        merge(TINY, out / "model", [(lora, 2.0)], overwrite=True)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not (out / "model").exists()
    with pytest.raises(CheckpointError, match="already exists"):
        require_new(out / "model", overwrite=False)
    assert {n: b for n, b in files(out).items() if n.startswith("model")} == held
    write_json(out / "a.json", {})
    assert {p.name for p in out.iterdir()} == {"model", "a.json"}
