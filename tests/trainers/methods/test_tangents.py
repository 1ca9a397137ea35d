"""The two tangents: equal where the step is small, on a smooth function and on the network itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.paths import GOLDEN, TINY
from trainers.methods.losses import TimedVelocity, difference_tangent, jvp_tangent
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.model.attention import BACKENDS
from unipic_core.sampling.flow import add_noise, like
from unipic_core.weights.transformer import load_transformer


def smooth(x_t: Tensor, t: Tensor | float) -> Tensor:
    """Not linear in x_t nor in t, and the elements of a sample depend on each other."""
    time = like(t, x_t)
    return torch.sin(x_t + 2 * time) * x_t.roll(1, dims=-1) + torch.cos(3 * time)


def smooth_tangent(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """d smooth(x_t, t) along dx/dt = v, by hand."""
    time = like(t, x_t)
    inner, beside = x_t + 2 * time, x_t.roll(1, dims=-1)
    return torch.cos(inner) * (v + 2) * beside + torch.sin(inner) * v.roll(1, dims=-1) - 3 * torch.sin(3 * time)


def smooth_inputs(times: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t, v = (torch.randn(len(times), 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x_t, v, torch.tensor(times, dtype=torch.float64)


def test_both_tangents_are_the_derivative_by_hand():
    x_t, v, t = smooth_inputs([0.1, 0.37, 0.5, 0.9])
    expected = smooth_tangent(x_t, v, t)
    torch.testing.assert_close(jvp_tangent(smooth, x_t, v, t)[1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(difference_tangent(smooth, x_t, v, t, 1e-4), expected, rtol=0, atol=1e-6)


def test_the_central_difference_errs_with_the_square_of_its_step():
    x_t, v, t = smooth_inputs([0.3, 0.6])
    expected = smooth_tangent(x_t, v, t)
    wide, narrow = ((difference_tangent(smooth, x_t, v, t, e) - expected).norm() for e in (1e-2, 1e-3))
    assert float(wide / narrow) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("e", [5e-3, 1e-3])
def test_at_the_ends_the_difference_stays_within_the_flow(e: float):
    """One-sided there: asked only for times in [0, 1], at points of the same line, and right to first order."""
    x_t, v, t = smooth_inputs([0.0, e / 3, 1 - e / 3, 1.0])
    asked = []

    def recorded(x: Tensor, at: Tensor) -> Tensor:
        asked.append(at)
        torch.testing.assert_close(x, x_t + like(at - t, x_t) * v)
        return smooth(x, at)

    got = difference_tangent(recorded, x_t, v, t, e)
    assert all(bool(((at >= 0) & (at <= 1)).all()) for at in asked)
    error = (got - smooth_tangent(x_t, v, t)).abs().amax()
    assert 1e-2 * e < float(error) < 20 * e  # a first order's error; that of a central difference would be ~ e^2


def test_jvp_gives_the_value_too():
    x_t, v, t = smooth_inputs([0.2, 0.8])
    assert torch.equal(jvp_tangent(smooth, x_t, v, t)[0], smooth(x_t, t))


# --- the network ------------------------------------------------------------------------------------------------------


def golden_line(backend: str) -> tuple[TimedVelocity, Tensor, Tensor, Tensor]:
    """(network, x_t, v, t) of a golden case, x0 being what its sampler made."""
    network = load_transformer(TINY / "transformer", dtype=torch.float32, attention=BACKENDS[backend])
    case = load_file(GOLDEN / "cases" / "one_reference_4_steps" / "tensors.safetensors")
    eps, x0, t = case["noise"], case["latents_after_step_4"], torch.tensor([0.6])
    shape = LatentShape(1, 6, 8)
    latents = pack_with_references(eps, shape, [[case["reference_latent_1"][0]]])
    text = TextCond(case["prompt_embeds"])
    return lambda x, at: network(latents.with_target(x), at, text), add_noise(x0, eps, t), eps - x0, t


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_tangents_agree_on_the_golden_network(backend: str):
    """Time enters multiplied by 1000, so the step must be far below 1e-3 for the two to be the same method.

    Measured: 1.0e-3, 0.091 and 0.89.
    """
    network, x_t, v, t = golden_line(backend)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exact = jvp_tangent(network, x_t, v, t)[1]
        away = {e: float((difference_tangent(network, x_t, v, t, e) - exact).norm() / exact.norm()) for e in STEPS}
    assert away[1e-4] < 2e-3
    assert 0.04 < away[1e-3] < 0.2
    assert 0.4 < away[5e-3] < 2


STEPS = (1e-4, 1e-3, 5e-3)
