"""The caches by content: bounded, and keyed by everything that matters."""

from __future__ import annotations

import torch
from PIL import Image

from unipic_core.caching import LRU, WeightsKey, checksums, image_key


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


def test_checksums_notice_signs_order_and_values() -> None:
    """Sampled values weighted so that changed signs, of whose sums many are 0, do not cancel."""
    tensors = [torch.randn(160, generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
    for count in (16, 1024):
        seen = checksums(tensors, count)
        assert len(set(seen)) == len(tensors)
        for change in (torch.neg, lambda t: t.flip(0), lambda t: t * 1.001, lambda t: t.bfloat16()):
            changed = checksums([change(t) for t in tensors], count)
            assert not any(a == b for a, b in zip(seen, changed, strict=True))
