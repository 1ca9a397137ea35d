"""Losses: pure functions of tensors, each under its equation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unipic_core.flow import velocity
from unipic_core.schedules import Shift, resolution_shift, shift_times


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """|F(x_t, t) - (eps - x0)|^2, mean over everything, in float32."""
    return (v.float() - velocity(x0.float(), eps.float())).square().mean()


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
    """(x - y)^2 + a |x - y| + b KL(N(mean, var) || N(prior_mean, prior_std^2)), each a mean per element, in float32."""
    difference = decoded.float() - picture.float()
    mse, l1 = difference.square().mean(), difference.abs().mean()
    away = (mean.float() - prior_mean) / prior_std
    log_ratio = log_var.float() - 2 * math.log(prior_std)
    kl = 0.5 * (away.square() + log_ratio.exp() - 1 - log_ratio).mean()
    psnr = -10 * float(torch.log10(mse.detach() / 4))
    metrics = {"l1": float(l1.detach()), "kl": float(kl.detach()), "psnr": psnr}
    return mse + l1_weight * l1 + kl_weight * kl, metrics


def logit_normal_times(
    generators: Sequence[torch.Generator], num_target_tokens: int, mean: float, std: float, shift: Shift = Shift()
) -> Tensor:
    """[B] times: t = sigmoid(N(mean, std)), shifted by the resolution as the sampler's schedule is."""
    z = torch.cat([torch.randn(1, generator=g) for g in generators])
    return shift_times(torch.sigmoid(mean + std * z), resolution_shift(num_target_tokens, shift))


def sample_generators(seed: int, step: int, samples: int, first: int = 0) -> list[torch.Generator]:
    """One generator per sample, from (seed, step, sample index) alone: batches may be split over devices in any way."""
    return [torch.Generator().manual_seed(_mix(seed, step, first + i)) for i in range(samples)]


def _mix(*values: int) -> int:
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
