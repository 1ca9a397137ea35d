"""Rows of several sources: each its share of every epoch and update, none twice in an update, steps that alternate."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trainers.config.run import ConfigError
from trainers.data.batches import RowOrder
from trainers.data.mixing import AlternatingOrder, Chosen, EndlessRows, MixedOrder, counts_by_weight, even_pattern


def groups_of(*sizes):
    ends = np.cumsum([0, *sizes])
    return [np.arange(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize(("rows", "window"), [(5, 1), (5, 3), (5, 5), (12, 3), (40, 7), (41, 10), (28, 7)])
def test_rows_that_follow_each_other_differ(rows, window):
    endless = EndlessRows(rows, window, [3])
    for epoch in range(6):
        assert sorted(endless.take(epoch * rows, rows)) == list(range(rows))
    for start in range(5 * rows):
        assert len(set(endless.take(start, window).tolist())) == window


def test_large_sets_are_shuffled_anew_in_each_epoch():
    endless = EndlessRows(100, 8, [3])
    assert endless.take(0, 100).tolist() != endless.take(100, 100).tolist()
    assert endless.take(0, 0).tolist() == []


def test_a_pattern_spreads_its_sources():
    pattern = even_pattern([8, 4, 1])
    assert Counter(pattern.tolist()) == {0: 8, 1: 4, 2: 1}
    halves = [Counter(half.tolist()) for half in (pattern[:6], pattern[6:])]
    assert all(half[0] in (3, 4, 5) and half[1] in (1, 2, 3) for half in halves)


def test_weights_become_whole_numbers():
    assert counts_by_weight([3, 1], 40) == [30, 10]
    assert counts_by_weight([1, 1, 1], 10) == [4, 3, 3]
    assert counts_by_weight([1000, 1], 10) == [9, 1]
    assert min(counts_by_weight([1e9, 1, 1], 3)) == 1


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_repeats_give_every_row_so_often_in_an_epoch(batch, accumulation):
    sizes, repeats = (20, 9), (1, 3)
    counts = [n * r for n, r in zip(sizes, repeats, strict=True)]
    order = MixedOrder(groups_of(*sizes), counts, batch, 5, accumulation)
    assert order.rows == 47
    epoch = np.concatenate([order[i] for i in range(47)])[: 2 * 47]
    seen = Counter(epoch[:47].tolist())
    assert all(seen[row] == 1 for row in range(20))
    assert all(seen[row] == 3 for row in range(20, 29))
    for update in range(60):
        rows = np.concatenate([order[update * accumulation + i] for i in range(accumulation)])
        assert len(set(rows.tolist())) == batch * accumulation


def test_an_order_is_a_function_of_its_index():
    order, again = (MixedOrder(groups_of(30, 10), [30, 10], 4, 1) for _ in range(2))
    forwards = [order[i].tolist() for i in range(25)]
    assert [again[i].tolist() for i in reversed(range(25))] == forwards[::-1]


def test_each_update_has_its_share_of_a_source():
    order = MixedOrder(groups_of(300, 100), counts_by_weight([1, 1], 400), 8, 0)
    assert all(3 <= (order[i] < 300).sum() <= 5 for i in range(200))


def test_more_of_a_source_than_it_has_is_refused():
    with pytest.raises(ConfigError, match=r"takes 8 .* of data.sources\[1\], which has 3; lower its weight"):
        MixedOrder(groups_of(50, 3), counts_by_weight([1, 1], 53), 16, 0)


def test_updates_alternate_between_groups():
    rows = groups_of(12, 6)
    orders = [Chosen(RowOrder(len(g), 3, 0, 2), g) for g in rows]
    order = AlternatingOrder(orders, [1, 1])
    of = [int(order[i].min() >= 12) for i in range(12)]
    assert of == [0, 0, 1, 1] * 3
    first = np.concatenate([order[i] for i in (0, 1, 4, 5)])
    assert sorted(first) == list(range(12))  # an epoch of the first group in its first two updates
    weighted = AlternatingOrder(orders, [2, 1])
    assert Counter(int(weighted[2 * i].min() >= 12) for i in range(9)) == {0: 6, 1: 3}
