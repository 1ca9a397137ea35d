"""Batch order: every row once an epoch, none twice in an update; pieces of near lengths, equally many per process."""

from collections import Counter

import numpy as np
import pytest

from trainers.config.run import ConfigError
from trainers.data.batches import (
    MAX_PADDING,
    Lengths,
    RowOrder,
    data_report,
    micro_batches_of,
    micro_batches_of_process,
)


@pytest.mark.parametrize(
    ("rows", "size", "accumulation"), [(7, 2, 1), (7, 7, 1), (10, 3, 3), (13, 6, 2), (50, 4, 2), (100, 33, 1)]
)
def test_every_row_once_an_epoch_and_never_twice_in_an_update(rows, size, accumulation):
    order = RowOrder(rows, size, 3, accumulation)
    batches = [order[i] for i in range(12 * rows * accumulation)]
    endless = np.concatenate(batches)
    for start in range(0, len(endless) - rows + 1, rows):
        assert sorted(endless[start : start + rows]) == list(range(rows))
    for at in range(0, len(batches) - accumulation + 1, accumulation):
        update = np.concatenate(batches[at : at + accumulation])
        assert len(update) == len(set(update.tolist())) == size * accumulation


def test_order_depends_on_seed_and_step_alone():
    first, second, other = (RowOrder(49, 4, seed) for seed in (1, 1, 2))
    assert all((first[s] == second[s]).all() for s in (50, 3, 17, 3))
    assert any((first[s] != other[s]).any() for s in range(10))
    assert any((first[s] != first[s + 49]).any() for s in range(12))


def test_a_small_set_is_ordered_once_however_long_it_trains(monkeypatch):
    """Its epochs depend on all before them: the next one must not begin at the first again."""
    calls, steps = [], RowOrder._without_repeats
    monkeypatch.setattr(RowOrder, "_without_repeats", lambda *args: calls.append(1) or steps(*args))
    forwards = RowOrder(20, 7, 0)
    seen = {i: forwards[i] for i in range(1000, 1200)}
    assert len(calls) <= 1200 * 7 / 20 + 1
    for i in (1100, 1000, 1199):
        assert (RowOrder(20, 7, 0)[i] == seen[i]).all()
        assert (forwards[i] == seen[i]).all()


def test_an_update_larger_than_the_set_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size 4 x accumulation 2 needs 8 different rows, got 7"):
        RowOrder(7, 4, 0, accumulation=2)
    with pytest.raises(ConfigError, match="holds no sample"):
        RowOrder(0, 4, 0)


@pytest.fixture(scope="module")
def mixed() -> Lengths:
    """Eleven camera sizes, one to six references that share a budget, prompts of different lengths."""
    rng = np.random.default_rng(0)
    target = rng.choice([4096, 4032, 4080, 3072, 4050, 4064, 2304, 3968, 4000, 3840, 3600], 20_000)
    references, words = 4096 + rng.integers(-128, 129, 20_000), rng.integers(10, 120, 20_000)
    return Lengths(target, target + references, 1024 + words)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_mixed_rows_are_padded_by_five_percent_at_most(mixed, size):
    order = RowOrder(20_000, size, 0)
    for i in range(20):
        pieces = micro_batches_of(order[i], mixed)
        assert sorted(row for piece in pieces for row in piece) == sorted(order[i])
        for piece in pieces:
            assert len(set(mixed.target[piece])) == 1
            assert mixed.total[piece].sum() >= (1 - MAX_PADDING) * mixed.padded_tokens(piece)


def test_report_of_mixed_data(mixed):
    report = data_report(RowOrder(20_000, 64, 0), mixed)
    assert (report["rows"], report["rows_per_epoch"], report["repeated_in_step"]) == (20_000, 20_000, 0)
    assert report["largest_tokens"] == mixed.total.max()
    assert 0 < report["padding_share"] <= MAX_PADDING
    assert report["micro_batches_per_epoch"] >= 313


def test_a_piece_has_at_most_so_many_tokens(mixed):
    for piece in micro_batches_of(np.arange(64), mixed, max_tokens=30_000):
        assert mixed.padded_tokens(piece) <= 30_000
    assert all(len(piece) == 1 for piece in micro_batches_of(np.arange(8), mixed, max_tokens=1))


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 9])
def test_processes_have_equally_many_pieces_and_every_row_once(mixed, processes):
    rows = RowOrder(20_000, 7, 0)[0]
    shares = [micro_batches_of_process(rows, mixed, p, processes) for p in range(processes)]
    assert len({len(share) for share in shares}) == 1
    seen = Counter(row for share in shares for piece, counts in share if counts for row in piece)
    assert seen == Counter(rows.tolist())


def test_700_000_rows_are_ordered_quickly():
    import time

    order = RowOrder(700_000, 256, 0)
    order[0]
    start = time.perf_counter()
    for i in range(200):
        order[i]
    assert (time.perf_counter() - start) / 200 < 1e-3
