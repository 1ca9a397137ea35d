"""The bank of pictures, and unpacking an archive that is not to be trusted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainers.nano import emoji
from trainers.nano.emoji import SUBSET, Bank, default_folder, fetch, unpack


def archive(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            package.addfile(member)
    return path


def test_the_subset_says_that_it_is_one(bank: Bank) -> None:
    assert bank.is_subset
    assert "trainers.nano.emoji" in bank.note
    assert {asset.kind for asset in bank.objects()} == {"object"}
    assert len(bank.objects()) >= 150
    assert len(bank.persons()) >= 55


def test_the_subset_is_small_and_carries_its_licence() -> None:
    assert sum(path.stat().st_size for path in SUBSET.iterdir()) < 2.5e6
    notice = (SUBSET / "NOTICE").read_text(encoding="utf-8")
    assert "Microsoft" in notice
    assert "LobeHub" in notice


def test_splits_partition_the_bank(bank: Bank) -> None:
    for listed in (bank.objects, bank.persons):
        assert len(listed("train")) + len(listed("heldout")) == len(listed("all"))
        assert all(asset.split == "heldout" for asset in listed("heldout"))


def test_pictures_are_cropped_to_their_alpha_and_kept(bank: Bank) -> None:
    asset = bank.by_key["1f3b8"]
    picture = bank.image(asset)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 4
    assert picture[..., 3].any(axis=0)[[0, -1]].all()
    assert picture[..., 3].any(axis=1)[[0, -1]].all()
    assert bank.sprite(asset) is bank.sprite(asset)


def test_a_head_is_in_the_upper_middle(bank: Bank) -> None:
    for asset in bank.persons():
        if asset.can_wear:
            x, top, width = bank.head(asset)
            assert 0.3 < x < 0.7, asset
            assert 0 <= top < 0.2, asset
            assert 0.25 < width <= 1, asset


def test_without_a_fetched_set_the_subset_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIPIC_DATA", str(tmp_path))
    assert default_folder() == tmp_path
    assert Bank.open().folder == SUBSET
    (tmp_path / "1f3b8.webp").write_bytes((SUBSET / "1f3b8.webp").read_bytes())
    assert [asset.name for asset in Bank.open().objects()] == ["guitar"]


def test_the_digest_follows_the_pictures_and_not_their_folder(bank: Bank, tmp_path: Path) -> None:
    for name in ("1f3b8.webp", "26fa.webp"):
        (tmp_path / name).write_bytes((SUBSET / name).read_bytes())
    both = Bank(tmp_path).digest
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Bank(moved).digest == both != bank.digest
    (moved / "26fa.webp").write_bytes((SUBSET / "1f3b8.webp").read_bytes())
    assert Bank(moved).digest != both
    (moved / "26fa.webp").unlink()
    assert Bank(moved).digest != both


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainers\.nano\.emoji"):
        Bank.open(tmp_path)


def test_unpacking_takes_webp_files_only_and_stays_inside(tmp_path: Path) -> None:
    members = {
        "package/assets/1f3b8.webp": b"guitar",
        "package/assets/../../escaped.webp": b"no",
        "/package/assets/absolute.webp": b"no",
        "package/assets/deep/1f3b9.webp": b"no",
        "package/package.json": b"{}",
    }
    path = archive(tmp_path / "package.tgz", members, link="package/assets/link.webp")
    assert unpack(path, tmp_path / "out") == 1
    assert [found.name for found in (tmp_path / "out").iterdir()] == ["1f3b8.webp"]
    assert not (tmp_path / "escaped.webp").exists()


def test_a_huge_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "MAX_FILE_BYTES", 4)
    path = archive(tmp_path / "package.tgz", {"package/assets/1f3b8.webp": b"guitar"})
    with pytest.raises(RuntimeError, match="6 bytes"):
        unpack(path, tmp_path / "out")


def test_nothing_is_fetched_over_existing_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected an empty folder"):
        fetch(tmp_path)
