"""Batch order: every sample equally often, one bucket a batch, a function of (seed, step)."""

from collections import Counter

import pytest

from trainers.config.run import ConfigError
from trainers.data.batches import BucketOrder


def visits(order, steps):
    return Counter((name, int(i)) for s in range(steps) for name, rows in [order[s]] for i in rows)


def test_every_sample_is_visited_once_an_epoch():
    """Two epochs of 8 + 6 samples are 7 batches of 4; after the first, two of the smaller bucket are still to come."""
    order = BucketOrder({"a": 8, "b": 6, "empty": 0}, 4, seed=3)
    first = visits(order, 3)
    assert {k for k in first if k[0] == "a"} == {("a", i) for i in range(8)}
    assert sum(first[k] for k in first if k[0] == "b") == 4
    assert max(first.values()) == 1
    assert visits(order, 7) == {**{("a", i): 2 for i in range(8)}, **{("b", i): 2 for i in range(6)}}


def test_small_buckets_are_not_repeated_more_than_large_ones():
    """A sample alone in its shape counts as much as one of a thousand, though its batches hold it 8 times."""
    sizes = {"rare": 1, "few": 3, "many": 100}
    order = BucketOrder(sizes, 8, seed=0)
    epochs = 24  # the least in which every bucket's samples fill whole batches
    seen = visits(order, epochs * 104 // 8)
    assert set(seen.values()) == {epochs}
    assert len(seen) == 104


def test_epochs_are_told_apart_by_step_alone():
    """Where epochs are shorter than a batch, most of them are empty."""
    order = BucketOrder({"a": 2, "b": 1}, 8, seed=0)
    names = Counter(order[s][0] for s in range(30))
    assert names == {"a": 20, "b": 10}
    assert order[10**9][0] in ("a", "b")


def test_order_depends_on_seed_and_step_alone():
    sizes = {"a": 40, "b": 9}
    first, second, other = BucketOrder(sizes, 4, 1), BucketOrder(sizes, 4, 1), BucketOrder(sizes, 4, 2)
    steps = [50, 3, 17, 3]
    assert all(first[s][0] == second[s][0] and (first[s][1] == second[s][1]).all() for s in steps)
    assert any(first[s][0] != other[s][0] or (first[s][1] != other[s][1]).any() for s in range(10))
    assert any((first[s][1] != first[s + 12][1]).any() for s in range(12))


def test_batches_are_of_the_size_asked_for():
    assert all(len(BucketOrder({"a": 3, "b": 50}, 16, 0)[s][1]) == 16 for s in range(20))


def test_an_empty_cache_is_an_error():
    with pytest.raises(ConfigError, match="holds no sample"):
        BucketOrder({"a": 0}, 4, 0)
