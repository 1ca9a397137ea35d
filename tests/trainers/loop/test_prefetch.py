"""Batches made ahead: in their order, a few at a time, errors where they belong, and no thread left behind."""

import threading
import time

import pytest

from trainers.loop.prefetch import Prefetched


def threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def gone():
    for _ in range(100):
        if not threads():
            return True
        time.sleep(0.02)
    return False


def test_items_come_in_their_order():
    assert list(Prefetched(iter(range(50)), 3)) == list(range(50))
    assert gone()


def test_only_a_few_are_made_ahead():
    made = []
    items = Prefetched((made.append(i) or i for i in range(100)), 2)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) <= 4  # one given, two waiting, one in the hand
    items.close()
    assert gone()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_comes_where_its_item_would(error):
    def fails():
        yield 1
        yield 2
        raise error("here")

    items = Prefetched(fails(), 4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(error, match="here"):
        next(items)
    assert gone()
