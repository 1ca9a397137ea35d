"""Atomic writing beside other runs that tidy the same folder; more of it in weights/merge/test_merge_safety.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unipic_core import replacing as module

pytestmark = pytest.mark.skipif(module.fcntl is None, reason="locks of POSIX")


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
