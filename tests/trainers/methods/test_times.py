import pytest

from trainers.methods.times import logit_normal_times
from trainers.seeds import sample_generators
from unipic_core.sampling.schedules import resolution_shift


def test_times_are_logit_normal_and_shifted():
    t = logit_normal_times(sample_generators(0, 0, 4000), 64, 0.0, 1.0)
    k = resolution_shift(64)
    assert t.min() > 0
    assert t.max() < 1
    assert t.median().item() == pytest.approx(k * 0.5 / (1 + (k - 1) * 0.5), abs=0.02)
