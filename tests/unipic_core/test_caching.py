"""The caches by content: bounded, and keyed by everything that matters."""

from __future__ import annotations

import torch
from PIL import Image

from unipic_core.caching import LRU, WeightsKey, image_key


def test_lru() -> None:
    cache: LRU[int] = LRU(2)
    made: list[str] = []
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: made.append(key) or len(made))  # type: ignore[func-returns-value]
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_keys() -> None:
    a = Image.new("RGB", (2, 8))
    assert image_key(a) == image_key(a.copy())
    assert image_key(a) != image_key(Image.new("RGB", (8, 2)))  # equal bytes
    layer = torch.nn.Linear(2, 2)
    before = WeightsKey(layer)
    layer.to("cpu")
    assert WeightsKey(layer) == before != WeightsKey(torch.nn.Linear(2, 2))
    layer.load_state_dict(layer.state_dict())
    assert WeightsKey(layer) != before


def test_moved_weights_keep_their_key_and_others_never_get_it() -> None:
    layer = torch.nn.Linear(2, 2)
    before = WeightsKey(layer)
    layer.weight.data = layer.weight.data.clone()  # what Module.to another device does
    assert WeightsKey(layer) == before
    assert hash(WeightsKey(layer)) == hash(before)
    state = before._state
    layer.weight = torch.nn.Parameter(layer.weight.detach())  # the same values at the same address
    after = WeightsKey(layer)
    after._state = state  # even if the new parameter got the old one's id
    assert after != before
