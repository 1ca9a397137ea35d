"""Losses as pure functions of tensors, each with its equation. All return one value per sample, [B], in float32.

x0, eps, x_t, v: [B, N, 4C] (or any [B, ...]); t: [B]. With values per sample a batch can be split over processes in
any way, and a non-finite value can be traced to its sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unipic_core.conditioning.sequence import PATCH
from unipic_core.sampling.flow import like, velocity

TimedVelocity = Callable[[Tensor, Any], Tensor]
"""(x_t [B, ...], t: [B] or a number) -> v [B, ...]: a network with its other inputs bound."""


def per_sample(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over all but the batch dimension, [B, ...] -> [B]; weights: [B, N] of the tokens, see `weighted_mean`."""
    return values.flatten(1).mean(1) if weights is None else weighted_mean(values, weights)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of each sample over its tokens i, sum_i w_i m_i / sum_i w_i, where m_i is the mean of token i's values.

    values: [B, N, ...]; weights: [B, N], at least 0. Dividing by the weights' sum keeps the size of the gradient: a
    sample of which half is masked out weighs as much as any other. A sample without weight counts 0.
    """
    means = values.flatten(2).mean(2) if values.ndim > 2 else values
    return (weights * means).sum(1) / weights.sum(1).clamp(min=1e-6)


def mask_weights(mask: Tensor | None, outside: float) -> Tensor | None:
    """Weight of each token in a masked loss, w = m + (1 - m) outside, with m its share inside the mask, [B, N]."""
    return None if mask is None else mask + (1 - mask) * outside


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor, weights: Tensor | None = None) -> Tensor:
    """|F(x_t, t) - (eps - x0)|^2; weights: [B, N] of the tokens (masked loss)."""
    # UniPic 3, eq. 1
    return per_sample((full(v) - velocity(full(x0), full(eps))).square(), weights)


def full(x: Tensor) -> Tensor:
    """Convert to float32; float64 (used by tests) stays."""
    return x if x.dtype == torch.float64 else x.float()


# --- consistency tuning (UniPic 3, section 4.3, eq. 9-11) -------------------------------------------------------------


def difference_tangent(network: TimedVelocity, x_t: Tensor, v: Tensor, t: Tensor, e: float) -> Tensor:
    """dF/dt = (F(x_t + e v, t + e) - F(x_t - e v, t - e)) / 2e, the total derivative along dx/dt = v.

    Near t = 0 and t = 1 steps are clipped to [0, 1], and the denominator with them.
    """
    after, before = (t + e).clamp(max=1), (t - e).clamp(min=0)
    x_t, v = full(x_t), full(v)
    high = full(network(x_t + like(after - t, x_t) * v, after))
    low = full(network(x_t + like(before - t, x_t) * v, before))
    # UniPic 3, section 4.3: the central difference that stands for dF/dt in eq. 9-11
    return (high - low) / like(after - before, x_t)


def jvp_tangent(network: TimedVelocity, x_t: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(F(x_t, t), dF/dt): the same derivative exactly, as a Jacobian-vector product in direction (v, 1).

    The network's attention must support forward-mode differentiation (two matrix products do).
    """
    x_t, v = full(x_t), full(v)
    value_and_tangent: Any = torch.func.jvp(network, (x_t, t), (v.to(x_t), torch.ones_like(t)))
    return value_and_tangent


def consistency_residual(v_sg: Tensor, v: Tensor, tangent: Tensor, t: Tensor, share: float = 1.0) -> Tensor:
    """r = F - (v - share t dF/dt): with share 1 zero where f(x_t, t) = x_t - t F does not change along dx/dt = v.

    share: of the tangent, from 0 (flow matching on v) to 1 (tangent warm-up, sCM, arXiv 2410.11081, section 4).
    """
    # UniPic 3, eq. 9, with the opposite sign: df/dt = v - F - t dF/dt = -r
    return full(v_sg) - (full(v) - share * like(t, tangent) * full(tangent))


def tangent_share(update: int, warmup: int) -> float:
    """Share of the tangent in update 0, 1, ...: linear from 0 to 1 over `warmup` updates; without warm-up 1."""
    return min(1.0, update / warmup) if warmup else 1.0


def scaled_residual(residual: Tensor, normalisation: str, weights: Tensor | None = None) -> Tensor:
    """Return the residual unchanged ("none") or divided by its root (weighted) mean square per sample ("rms")."""
    if normalisation == "none":
        return residual
    rms = like(per_sample(residual.square(), weights).sqrt(), residual)
    return residual / (rms + RMS_FLOOR)


RMS_FLOOR = 0.1
"""Added to the root mean square so that small residuals are not scaled up to full gradients; tuned on a toy problem."""


def scaled_tangent(tangent: Tensor) -> Tensor:
    """dF/dt / (|dF/dt| + 0.1), with the norm over a sample's whole latent (released code)."""
    return tangent / (like(tangent.flatten(1).norm(dim=1), tangent) + 0.1)


def consistency_loss(v: Tensor, residual: Tensor, cosine: bool = False, weights: Tensor | None = None) -> Tensor:
    """|F - sg(F - r)|^2, whose gradient is the residual r; `cosine` adds the released code's second term.

    v: the student's F(x_t, t), with gradient. weights: [B, N] of the tokens (masked loss). The cosine term is
    1 - cos(F, F - r) over the channels of each latent pixel, [B, N, C, 2, 2] in packed order.
    """
    v = full(v)
    # UniPic 3, eq. 11: F - r = v - t dF/dt
    target = v.detach() - residual
    # its gradient is 2 r dF/dtheta: eq. 10 with w(t) = 1/t
    loss = per_sample((v - target).square(), weights)
    if cosine:
        a, b = (x.unflatten(-1, (-1, PATCH * PATCH)) for x in (v, target))
        loss = loss + per_sample(1 - F.cosine_similarity(a, b, dim=-2), weights)
    return loss


# --- distribution matching (UniPic 3, section 4.3, eq. 12-14) ---------------------------------------------------------


def fake_score_loss(v: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """|F_fake(x_t, t) - (eps - x)|^2: flow matching on the student's samples x."""
    # UniPic 3, eq. 1 on the student's samples: the fake score that stands for the student's score in eq. 12
    return flow_matching_loss(v, x.detach(), eps)


def dmd_direction(
    x: Tensor, eps: Tensor, t: Tensor, v_teacher: Tensor, v_fake: Tensor, weighting: str = "first"
) -> Tensor:
    """Gradient w g with respect to x, where g = (1 - t)/t (F_teacher - F_fake).

    weighting: "final": w = 1 (paper). "first": w g = (F_teacher - F_fake) / mean|x - eps + F_fake| (the paper's first
    version). "released": the same with F_teacher in the mean, clipped below at 1e-5 (released code).
    """
    x, eps, v_teacher, v_fake = full(x), full(eps), full(v_teacher), full(v_fake)
    # UniPic 3, eq. 12-13: the gradient of KL(student | teacher) as a difference of two velocities
    difference = v_teacher - v_fake
    if weighting == "final":
        return like((1 - t) / t, x) * difference
    predicted = v_teacher if weighting == "released" else v_fake
    return difference / like(per_sample((x - eps + predicted).abs()).clamp(min=1e-5), x)


def dmd_loss(x: Tensor, direction: Tensor) -> Tensor:
    """1/2 |x - sg(x - w g)|^2, whose gradient with respect to x is w g. x: the student's samples, with gradient."""
    x = full(x)
    # UniPic 3, eq. 14
    return 0.5 * per_sample((x - (x - direction).detach()).square())


# --- the VAE ----------------------------------------------------------------------------------------------------------


def vae_loss(
    picture: Tensor,
    decoded: Tensor,
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_std: float = 1.0,
    *,
    l1_weight: float,
    kl_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """(x - y)^2 + a |x - y| + b KL(N(mean, var) || N(prior_mean, prior_std^2)), averaged over elements."""
    difference = decoded.float() - picture.float()
    mse, l1 = per_sample(difference.square()), per_sample(difference.abs())
    z = (mean.float() - prior_mean) / prior_std
    log_ratio = log_var.float() - 2 * math.log(prior_std)
    kl = 0.5 * per_sample(z.square() + log_ratio.exp() - 1 - log_ratio)
    psnr = -10 * float(torch.log10(mse.detach().mean() / 4))
    metrics = {"l1": float(l1.detach().mean()), "kl": float(kl.detach().mean()), "psnr": psnr}
    return mse + l1_weight * l1 + kl_weight * kl, metrics
