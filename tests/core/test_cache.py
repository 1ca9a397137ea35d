"""The caches by content: bounded, and keyed by everything that matters."""

from __future__ import annotations

import torch
from PIL import Image

from unipic_core.pipeline.cache import LRU, image_key, weights_key


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
    before = weights_key(layer)
    layer.to("cpu")
    assert weights_key(layer) == before != weights_key(torch.nn.Linear(2, 2))
    layer.load_state_dict(layer.state_dict())
    assert weights_key(layer) != before
