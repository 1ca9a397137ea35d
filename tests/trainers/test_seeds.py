import torch

from trainers.seeds import sample_generators


def test_draws_depend_on_seed_step_and_sample_alone():
    whole = [torch.randn(3, generator=g) for g in sample_generators(1, 5, 4)]
    half = [torch.randn(3, generator=g) for g in sample_generators(1, 5, 2, first=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], half, strict=True))
    places = ((0, 0, 1), (0, 1, 1), (1, 0, 1))
    draws = {tuple(torch.randn(2, generator=sample_generators(*p)[0]).tolist()) for p in places}
    assert len(draws) == 3
