"""Losses on values known by hand, in float64 where it matters."""

import math

import pytest
import torch

from trainers.losses import flow_matching_loss, logit_normal_times, sample_generators, vae_loss
from unipic_core.schedules import resolution_shift


def test_flow_matching_loss_is_zero_at_the_velocity():
    x0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert flow_matching_loss(eps - x0, x0, eps) == 0
    assert flow_matching_loss(eps - x0 + 2, x0, eps).item() == pytest.approx(4)


def test_flow_matching_minimiser_is_the_conditional_mean():
    """Data N(m, s^2): E[eps - x0 | x_t] is linear in x_t with a known slope; least squares on the loss must find it."""
    generator = torch.Generator().manual_seed(0)
    mean, std, t = 0.7, 0.5, 0.4
    x0 = mean + std * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    eps = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    x_t = (1 - t) * x0 + t * eps
    features = torch.cat([x_t, torch.ones_like(x_t)], dim=1)
    slope, offset = torch.linalg.lstsq(features, eps - x0).solution.flatten().tolist()
    variance = (1 - t) ** 2 * std**2 + t**2
    expected = (t - (1 - t) * std**2) / variance
    assert slope == pytest.approx(expected, abs=0.01)
    assert offset == pytest.approx(-mean - expected * (1 - t) * mean, abs=0.01)


def test_vae_loss_terms():
    picture = torch.zeros(1, 3, 2, 2)
    zeros = torch.zeros(1, 4, 1, 1)
    loss, metrics = vae_loss(picture, picture + 0.5, zeros, zeros, l1_weight=0.1, kl_weight=1.0)
    assert loss.item() == pytest.approx(0.25 + 0.05)
    assert metrics["kl"] == 0
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / 0.25))
    _, metrics = vae_loss(picture, picture + 0.5, zeros + 1, zeros, l1_weight=0.1, kl_weight=1.0)
    assert metrics["kl"] == pytest.approx(0.5)


def test_times_are_logit_normal_and_shifted():
    t = logit_normal_times(sample_generators(0, 0, 4000), 64, 0.0, 1.0)
    k = resolution_shift(64)
    assert t.min() > 0
    assert t.max() < 1
    assert t.median().item() == pytest.approx(k * 0.5 / (1 + (k - 1) * 0.5), abs=0.02)


def test_draws_depend_on_seed_step_and_sample_alone():
    whole = [torch.randn(3, generator=g) for g in sample_generators(1, 5, 4)]
    half = [torch.randn(3, generator=g) for g in sample_generators(1, 5, 2, first=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], half, strict=True))
    places = ((0, 0, 1), (0, 1, 1), (1, 0, 1))
    draws = {tuple(torch.randn(2, generator=sample_generators(*p)[0]).tolist()) for p in places}
    assert len(draws) == 3


def test_vae_loss_to_a_prior():
    """Nothing to pay where the posterior is the prior; one standard deviation away costs a half."""
    picture, prior = torch.zeros(1, 3, 2, 2), torch.tensor(3.0)
    log_var = torch.full((1, 4, 1, 1), 2 * math.log(0.2))
    weights = {"l1_weight": 0.0, "kl_weight": 1.0}
    at, _ = vae_loss(picture, picture, prior.expand_as(log_var), log_var, prior, 0.2, **weights)
    away, _ = vae_loss(picture, picture, prior.expand_as(log_var) + 0.2, log_var, prior, 0.2, **weights)
    assert at.item() == pytest.approx(0, abs=1e-6)
    assert away.item() == pytest.approx(0.5, abs=1e-5)
