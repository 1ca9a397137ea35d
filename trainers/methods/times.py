"""Distribution of training times: logit-normal, shifted by resolution, with a uniform share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unipic_core.sampling.schedules import Shift, resolution_shift, shift_times


def logit_normal_times(
    generators: Sequence[torch.Generator], num_target_tokens: int, mean: float, std: float, shift: Shift = Shift()
) -> Tensor:
    """Draw times [B]: sigmoid(N(mean, std)), shifted by resolution like the sampler's schedule."""
    z = torch.cat([torch.randn(1, generator=g) for g in generators])
    return shift_times(torch.sigmoid(mean + std * z), resolution_shift(num_target_tokens, shift))


def some_uniform(t: Tensor, generators: Sequence[torch.Generator], share: float, least: float) -> Tensor:
    """Replace a share of the times [B] by uniform times in least .. 1."""
    draws = torch.stack([torch.rand(2, generator=g) for g in generators])
    return torch.where(draws[:, 0] < share, least + (1 - least) * draws[:, 1], t)
