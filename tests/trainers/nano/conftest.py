"""Everything here runs on the vendored subset alone."""

from __future__ import annotations

import pytest

from trainers.nano.emoji import SUBSET, Bank


@pytest.fixture(scope="session")
def bank() -> Bank:
    return Bank.open(SUBSET)
