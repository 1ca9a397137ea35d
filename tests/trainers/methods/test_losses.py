"""Losses on values known by hand, in float64 where it matters."""

import math

import pytest
import torch
from torch import Tensor

from trainers.methods.losses import (
    RMS_FLOOR,
    consistency_loss,
    consistency_residual,
    dmd_direction,
    dmd_loss,
    fake_score_loss,
    flow_matching_loss,
    scaled_residual,
    scaled_tangent,
    tangent_share,
    vae_loss,
)
from unipic_core.conditioning.sequence import pack_latents
from unipic_core.sampling.flow import add_noise, like, velocity_to_x0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_flow_matching_loss_is_zero_at_the_velocity_and_counts_per_sample():
    x0, eps = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    assert flow_matching_loss(eps - x0, x0, eps).tolist() == [0, 0]
    off = torch.tensor([2.0, -3.0]).reshape(2, 1, 1)
    assert flow_matching_loss(eps - x0 + off, x0, eps).tolist() == pytest.approx([4, 9])


def test_losses_take_half_precision_and_count_in_float32():
    x0, eps = normal(2, 3, 4).float(), normal(2, 3, 4, seed=1).float()
    loss = flow_matching_loss((eps - x0).bfloat16(), x0, eps)
    assert loss.dtype is torch.float32
    assert 0 < float(loss.max()) < 1e-4  # the rounding of the prediction alone


def test_flow_matching_minimiser_is_the_conditional_mean():
    """Data N(m, s^2): E[eps - x0 | x_t] is linear in x_t with a known slope; least squares on the loss must find it."""
    mean, std, t = 0.7, 0.5, 0.4
    x0, eps = mean + std * normal(200_000, 1), normal(200_000, 1, seed=1)
    variance = (1 - t) ** 2 * std**2 + t**2
    slope = (t - (1 - t) * std**2) / variance
    offset = -mean - slope * (1 - t) * mean
    x_t = add_noise(x0, eps, t)
    guess = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([guess], lr=1, max_iter=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = flow_matching_loss(guess[0] * x_t + guess[1], x0, eps).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert guess.tolist() == pytest.approx([slope, offset], abs=0.01)


# --- consistency ------------------------------------------------------------------------------------------------------


def test_residual_is_zero_for_the_map_of_a_known_ode():
    """Data N(0, s^2): the ODE keeps x_t / std(x_t), so f = s x_t / std(x_t), and F = (x_t - f) / t has no residual."""
    s = 0.5
    t = torch.tensor([0.2, 0.6, 0.95], dtype=torch.float64)
    x_t = normal(3, 2, 4)
    at = like(t, x_t)
    variance = ((1 - at) * s) ** 2 + at**2
    v = (at - (1 - at) * s**2) / variance * x_t

    def student(x: Tensor, t: Tensor) -> Tensor:
        at = like(t, x)
        return x * (1 - s / (((1 - at) * s) ** 2 + at**2).sqrt()) / at

    tangent = torch.func.jvp(student, (x_t, t), (v, torch.ones_like(t)))[1]
    residual = consistency_residual(student(x_t, t), v, tangent, t)
    assert float(residual.abs().max()) < 1e-12
    assert float(consistency_residual(v, v, tangent, t).abs().max()) > 0.1  # what flow matching would leave


def test_residual_follows_its_equation():
    v_sg, v, tangent = (normal(2, 3, 4, seed=i) for i in range(3))
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    got = consistency_residual(v_sg, v, tangent, t)
    torch.testing.assert_close(got[0], v_sg[0] - v[0] + 0.25 * tangent[0])
    torch.testing.assert_close(got[1], v_sg[1] - v[1] + tangent[1])


def test_gradient_of_the_consistency_loss_is_the_residual():
    v, residual = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    loss = consistency_loss(v, residual)
    torch.testing.assert_close(loss, residual.square().mean((1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(v.grad, 2 * residual / 12)


def test_cosine_term_is_over_the_channels_of_a_latent_pixel():
    """Packed or not, the same number: 1 - cos over C of a picture [1, C, 4, 4]."""
    picture, other = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=1)
    v, wanted = pack_latents(picture), pack_latents(other)
    got = consistency_loss(v, v - wanted, cosine=True) - consistency_loss(v, v - wanted)
    expected = 1 - torch.nn.functional.cosine_similarity(picture, other, dim=1)
    torch.testing.assert_close(got, expected.mean().reshape(1))


def test_scaled_residual_has_one_size_whatever_the_residual():
    residual = normal(3, 4, 8) * torch.tensor([100.0, 10.0, 0.0]).reshape(3, 1, 1)
    sizes = scaled_residual(residual, "rms").square().mean((1, 2)).sqrt()
    assert sizes.tolist() == pytest.approx([1, 1, 0], abs=2 * RMS_FLOOR / 10)
    assert torch.equal(scaled_residual(residual, "none"), residual)


def test_scaled_residual_keeps_its_direction():
    residual = normal(3, 4, 8)
    scaled = scaled_residual(residual, "rms")
    cosine = torch.nn.functional.cosine_similarity(residual.flatten(1), scaled.flatten(1))
    assert cosine.tolist() == pytest.approx([1, 1, 1])


def test_released_tangent_is_divided_by_the_norm_of_the_whole_latent():
    tangent = torch.full((1, 4, 4), 2.0)  # norm 8
    torch.testing.assert_close(scaled_tangent(tangent), tangent / 8.1)
    large = scaled_tangent(normal(1, 4096, 64))
    assert float(large.square().mean().sqrt()) < 2e-3  # at 1024^2 next to nothing is left of it


# --- distribution matching --------------------------------------------------------------------------------------------


def dmd_case() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, eps, v_teacher, v_fake = (normal(3, 2, 4, seed=i) for i in range(4))
    return x, eps, torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64), v_teacher, v_fake


def test_final_direction_is_the_difference_of_the_scores():
    """Score s = -eps_hat / t with eps_hat = x_t + (1 - t) F: the direction is s_fake - s_teacher."""
    x, eps, t, v_teacher, v_fake = dmd_case()
    x_t, at = add_noise(x, eps, t), like(t, x)
    teacher, fake = (-(x_t + (1 - at) * v) / at for v in (v_teacher, v_fake))
    torch.testing.assert_close(dmd_direction(x, eps, t, v_teacher, v_fake, "final"), fake - teacher)


@pytest.mark.parametrize("weighting", ["first", "released"])
def test_first_direction_is_the_difference_of_the_pictures(weighting: str):
    """(x0_fake - x0_teacher) / mean|x - x0_predicted| per sample, by the fake score or (released) the teacher."""
    x, eps, t, v_teacher, v_fake = dmd_case()
    x_t = add_noise(x, eps, t)
    teacher, fake = (velocity_to_x0(x_t, v, t) for v in (v_teacher, v_fake))
    away = (x - (teacher if weighting == "released" else fake)).abs().mean((1, 2)).reshape(3, 1, 1)
    got = dmd_direction(x, eps, t, v_teacher, v_fake, weighting)
    torch.testing.assert_close(got, (fake - teacher) / away)


@pytest.mark.parametrize("weighting", ["first", "released", "final"])
def test_a_step_against_the_direction_nears_the_teacher(weighting: str):
    """Teacher N(2, s^2), fake N(0, s^2), both velocities known: the pictures must move up, whatever t."""
    s, x, eps = 0.5, normal(64, 1, 4) * 0.5, normal(64, 1, 4, seed=1)
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    x_t, at = add_noise(x, eps, t), like(t, x)
    variance = ((1 - at) * s) ** 2 + at**2

    def v(mean: float) -> Tensor:
        return (at - (1 - at) * s**2) / variance * (x_t - (1 - at) * mean) - mean

    moved = x.clone().requires_grad_()
    dmd_loss(moved, dmd_direction(x, eps, t, v(2.0), v(0.0), weighting)).sum().backward()
    assert bool((-moved.grad > 0).all())


def test_first_direction_is_finite_where_nothing_differs_and_at_the_ends():
    x, eps = normal(2, 2, 4), normal(2, 2, 4, seed=1)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    same = eps - x
    for weighting in ("first", "released"):
        assert dmd_direction(x, eps, t, same, same, weighting).abs().max() == 0
        assert bool(dmd_direction(x, eps, t, same + 1, same, weighting).isfinite().all())


def test_gradient_of_the_dmd_loss_is_the_direction():
    x, direction = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    loss = dmd_loss(x, direction)
    torch.testing.assert_close(loss, 0.5 * direction.square().mean((1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(x.grad, direction / 12)


def test_fake_score_loss_gives_the_student_no_gradient():
    x, eps = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    v = normal(2, 3, 4, seed=2).requires_grad_()
    fake_score_loss(v, x, eps).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(v.grad, 2 * (v - (eps - x)).detach() / 12)


# --- the VAE ----------------------------------------------------------------------------------------------------------


def test_vae_loss_terms():
    picture = torch.zeros(2, 3, 2, 2)
    zeros = torch.zeros(2, 4, 1, 1)
    off = torch.tensor([0.5, 1.0]).reshape(2, 1, 1, 1)
    loss, metrics = vae_loss(picture, picture + off, zeros, zeros, l1_weight=0.1, kl_weight=1.0)
    assert loss.tolist() == pytest.approx([0.25 + 0.05, 1 + 0.1])
    assert metrics["kl"] == 0
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / 0.625))
    _, metrics = vae_loss(picture, picture + off, zeros + 1, zeros, l1_weight=0.1, kl_weight=1.0)
    assert metrics["kl"] == pytest.approx(0.5)


def test_vae_loss_to_a_prior():
    """Nothing to pay where the posterior is the prior; one standard deviation away costs a half."""
    picture, prior = torch.zeros(1, 3, 2, 2), torch.tensor(3.0)
    log_var = torch.full((1, 4, 1, 1), 2 * math.log(0.2))
    weights = {"l1_weight": 0.0, "kl_weight": 1.0}
    at, _ = vae_loss(picture, picture, prior.expand_as(log_var), log_var, prior, 0.2, **weights)
    away, _ = vae_loss(picture, picture, prior.expand_as(log_var) + 0.2, log_var, prior, 0.2, **weights)
    assert at.item() == pytest.approx(0, abs=1e-6)
    assert away.item() == pytest.approx(0.5, abs=1e-5)


# --- tangent warm-up --------------------------------------------------------------------------------------------------


def test_the_share_of_the_tangent_grows_to_one():
    assert [tangent_share(update, 4) for update in (0, 1, 2, 4, 9, 2**48)] == [0, 0.25, 0.5, 1, 1, 1]
    assert tangent_share(0, 0) == 1


def test_a_share_of_the_tangent_enters_the_residual():
    v_sg, v, tangent, t = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2), torch.tensor([0.2, 0.9])
    none, half, whole = (consistency_residual(v_sg, v, tangent, t, share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, v_sg - v)
    torch.testing.assert_close(half, (none + whole) / 2)
    assert torch.equal(whole, consistency_residual(v_sg, v, tangent, t))
