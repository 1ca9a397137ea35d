"""Batch order: every sample once an epoch, one bucket a batch, a function of (seed, step)."""

from collections import Counter

from trainers.batches import BucketOrder


def test_every_sample_is_visited_each_epoch():
    order = BucketOrder({"a": 8, "b": 5, "empty": 0}, 4, seed=3)
    assert order.batches_per_epoch == 4
    for epoch in range(3):
        seen = Counter((name, int(i)) for s in range(4) for name, rows in [order[epoch * 4 + s]] for i in rows)
        assert {k for k in seen if k[0] == "a"} == {("a", i) for i in range(8)}
        assert {k for k in seen if k[0] == "b"} == {("b", i) for i in range(5)}
        assert max(seen[k] for k in seen if k[0] == "a") == 1


def test_order_depends_on_seed_and_step_alone():
    sizes = {"a": 40, "b": 9}
    first, second, other = BucketOrder(sizes, 4, 1), BucketOrder(sizes, 4, 1), BucketOrder(sizes, 4, 2)
    steps = [50, 3, 17, 3]
    assert all(first[s][0] == second[s][0] and (first[s][1] == second[s][1]).all() for s in steps)
    assert any(first[s][0] != other[s][0] or (first[s][1] != other[s][1]).any() for s in range(10))


def test_small_buckets_fill_a_batch():
    counts = Counter(int(i) for i in BucketOrder({"a": 3}, 8, 0)[0][1])
    assert sorted(counts.values()) == [2, 3, 3]
