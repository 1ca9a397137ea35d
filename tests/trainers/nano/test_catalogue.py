"""The catalogue's promises: counts, disjoint splits, sensible flags."""

from __future__ import annotations

from collections import Counter

import pytest

from trainers.nano.catalogue import TONES, Asset, in_split, load, with_tone


def designs(kind: str, split: str) -> set[str]:
    return {asset.design for asset in load() if asset.kind == kind and asset.split == split}


def test_there_are_the_expected_numbers_of_files_and_designs() -> None:
    assert sum(asset.kind == "person" for asset in load()) == 1479
    assert len(designs("person", "train") | designs("person", "heldout")) == 259
    assert 620 <= len(designs("object", "train") | designs("object", "heldout")) <= 700


def test_enough_is_held_out_over_many_categories() -> None:
    assert len(designs("object", "heldout")) >= 100
    assert len(designs("person", "heldout")) >= 39
    categories = Counter(asset.category for asset in load() if asset.split == "heldout")
    assert len(categories) >= 25


@pytest.mark.parametrize("group", ["design", "family"])
def test_no_design_and_no_family_is_in_both_splits(group: str) -> None:
    train = {getattr(asset, group) for asset in load() if asset.split == "train"}
    heldout = {getattr(asset, group) for asset in load() if asset.split == "heldout"}
    assert train.isdisjoint(heldout)


def test_the_demo_is_held_out() -> None:
    heldout = {asset.name for asset in load() if asset.split == "heldout"}
    assert {"guitar", "astronaut", "superhero", "top hat", "panda", "pizza"} <= heldout


def test_keys_and_names_are_unique() -> None:
    assert max(Counter(asset.key for asset in load()).values()) == 1
    names: dict[str, set[str]] = {}
    for asset in load():
        names.setdefault(asset.name, set()).add(asset.design)
    assert [name for name, sharing in names.items() if len(sharing) > 1] == []


def test_names_are_spoken_words() -> None:
    for asset in load():
        assert 2 <= len(asset.name) <= 40, asset
        assert not set(asset.name) & set(":;()’"), asset
        assert "skin tone" not in asset.name


def test_tones_follow_the_first_code_point() -> None:
    assert with_tone("1f9d1-200d-1f680", "dark") == "1f9d1-1f3ff-200d-1f680"
    toned = [asset for asset in load() if asset.tone]
    assert all(TONES[asset.tone] == asset.key.split("-")[1] for asset in toned if asset.tone)
    assert {asset.kind for asset in toned} == {"person"}


def test_nobody_with_a_prop_can_hold_and_objects_have_no_pose() -> None:
    for asset in load():
        assert not (asset.holds_prop and asset.can_hold), asset
        assert (asset.pose is None) == (asset.kind == "object"), asset


def test_an_unknown_split_is_refused() -> None:
    asset = Asset("1f3b8", "guitar", "object", "musical-instrument", "1f3b8", "1f3b8", "heldout")
    assert in_split(asset, "all")
    with pytest.raises(ValueError, match="'test'"):
        in_split(asset, "test")  # type: ignore[arg-type]
