"""Seeds derived from run seed, step and row, so that batches can be split over processes in any way."""

from __future__ import annotations

import torch


def sample_generators(seed: int, step: int, samples: int, first: int = 0) -> list[torch.Generator]:
    """One generator per sample, seeded by (seed, step, sample index): batches can be split over devices in any way."""
    return [torch.Generator().manual_seed(mixed_seed(seed, step, first + i)) for i in range(samples)]


def mixed_seed(*values: int) -> int:
    """Hash several numbers into one seed."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
