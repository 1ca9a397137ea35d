"""Atomic writing where others write or tidy the same folder; more of it in weights/merge/test_merge_safety.py."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from unipic_core import replacing as module
from unipic_core.errors import CheckpointError


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("appears", [True, False])
def test_a_new_file_never_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, appears: bool
) -> None:
    """On disks with hard links and without."""

    def refused(*_: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refused)
    place = tmp_path / "a.txt"
    with (
        pytest.raises(module.AppearedError, match=r"a\.txt appeared while this") if appears else nullcontext(),
        module.replacing(place, overwrite=False) as partial,
    ):
        partial.write_text("mine", encoding="utf-8")
        if appears:
            place.write_text("theirs", encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "a.txt": "theirs" if appears else "mine"
    }
    with pytest.raises(CheckpointError, match="already exists"), module.replacing(place, overwrite=False):
        pass


@pytest.mark.skipif(module.fcntl is None, reason="locks of POSIX")
@pytest.mark.parametrize("when", ["before the lock", "later"])
def test_a_new_file_that_another_run_takes_for_a_leftover_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The other run locks the file between its creation and our lock, and removes it then or at any later time."""
    lock, taken = module.lock, []

    def beaten(path: Path) -> int | None:
        if not taken:
            taken.append((path, lock(path)))
            if when == "before the lock":
                path.unlink()
        return lock(path)

    monkeypatch.setattr(module, "lock", beaten)
    with module.replacing(tmp_path / "a.txt") as partial:
        [(other, descriptor)] = taken
        assert partial != other
        other.unlink(missing_ok=True)
        partial.write_text("mine", encoding="utf-8")
        assert descriptor is not None
        os.close(descriptor)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a.txt": "mine"}
