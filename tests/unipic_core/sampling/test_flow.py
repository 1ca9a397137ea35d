"""The flow's conversions, there and back in float64; guidance."""

from __future__ import annotations

import pytest
import torch

from unipic_core.sampling.flow import add_noise, velocity, velocity_to_x0, x0_to_velocity
from unipic_core.sampling.guidance import apply_guidance


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 7, 3, generator=generator, dtype=torch.float64)
    return x0, eps


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0, torch.tensor([0.01, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)])
def test_there_and_back(drawn: tuple[torch.Tensor, torch.Tensor], t: float | torch.Tensor) -> None:
    x0, eps = drawn
    x_t, v = add_noise(x0, eps, t), velocity(x0, eps)
    assert x_t.dtype == torch.float64
    torch.testing.assert_close(velocity_to_x0(x_t, v, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(x0_to_velocity(x_t, x0, t), v, rtol=0, atol=1e-11)


def test_ends(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, eps = drawn
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, 1.0), eps)


def test_dtype_is_kept_and_arithmetic_is_float32() -> None:
    x0, eps = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = add_noise(x0, eps, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    t = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ((1 - t) * x0.float() + t * eps.float()).bfloat16())


def test_guidance() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 1, 4, 6, generator=generator)
    torch.testing.assert_close(apply_guidance(c, u, 1.0), c)
    guided = apply_guidance(c, u, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), c.norm(dim=-1))  # per token
    direction = u + 4 * (c - u)
    torch.testing.assert_close(
        guided / guided.norm(dim=-1, keepdim=True), direction / direction.norm(dim=-1, keepdim=True)
    )
    zero = torch.zeros(1, 4, 6)
    assert torch.equal(apply_guidance(zero, zero, 4.0), zero)  # the denominator is clamped
