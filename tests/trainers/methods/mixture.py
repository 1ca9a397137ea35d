"""A conditioned Gaussian mixture whose flow is known in closed form: the problem on which the distillation is proved.

x0 [B, 1, D], as one packed token; given condition c it is mode k with probability weights[c, k], then
N(means[c, k], STD^2). x_t = (1 - t) x0 + t eps, v = eps - x0, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainers.methods.losses import TimedVelocity, per_sample
from unipic_core.sampling.flow import add_noise, like
from unipic_core.sampling.guidance import apply_guidance

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

STD = 0.45
"""Of one mode. Two modes of a condition are 1.5 to 2.1 apart, the whole data has a standard deviation near 0.9."""


@dataclass(frozen=True)
class Mixture:
    """means [C, K, D], weights [C, K] that sum to 1 over K; all conditions are equally frequent."""

    means: Tensor
    weights: Tensor

    @property
    def conditions(self) -> int:
        return len(self.weights)

    def of(self, cond: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """(means [B or 1, K, D], log weights [B or 1, K]) for conditions [B]; None: all conditions together."""
        means, weights = self.means.to(x.dtype), self.weights.to(x.dtype)
        if cond is None:
            return means.flatten(0, 1)[None], (weights / self.conditions).flatten()[None].log()
        return means[cond], weights[cond].log()

    def responsibilities(self, x: Tensor, t: Tensor | float, cond: Tensor | None) -> Tensor:
        """p(mode | x_t) [B, K]."""
        means, log_weights = self.of(cond, x)
        t = like(t, x)
        variance = ((1 - t) * STD) ** 2 + t**2
        away = (x - (1 - t) * means).square().sum(-1, keepdim=True) / (2 * variance)
        return (log_weights - away[..., 0]).softmax(-1)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None) -> Tensor:
        """E[eps - x0 | x_t] [B, 1, D]: the mean over modes, each of which is Gaussian and so linear in x_t."""
        means, _ = self.of(cond, x_t)
        p = self.responsibilities(x_t, t, cond)[..., None]
        t = like(t, x_t)
        variance = ((1 - t) * STD) ** 2 + t**2
        by_mode = (t - (1 - t) * STD**2) / variance * (x_t - (1 - t) * means) - means
        return (p * by_mode).sum(1, keepdim=True)

    def guided(self, x_t: Tensor, t: Tensor | float, cond: Tensor, scale: float) -> Tensor:
        """The velocity as the trainers guide it."""
        v = self.velocity(x_t, t, cond)
        return v if scale == 1 else apply_guidance(v, self.velocity(x_t, t, None), scale)

    def sample(self, cond: Tensor, generator: torch.Generator) -> Tensor:
        """x0 [B, 1, D]."""
        modes = torch.multinomial(self.weights[cond], 1, generator=generator)[:, 0]
        x0 = self.means[cond, modes][:, None]
        return x0 + STD * torch.randn(x0.shape, generator=generator)

    def shares(self, x0: Tensor, cond: Tensor) -> Tensor:
        """[C, K]: what each condition's samples give to each mode; its expectation for true samples is `weights`."""
        p = self.responsibilities(x0, 0.0, cond)
        return torch.stack([p[cond == c].mean(0) for c in range(self.conditions)])


def two_conditions(dim: int = 2) -> Mixture:
    """Two conditions of three modes each, with unequal weights, in the first two of `dim` dimensions."""
    angles = torch.tensor([[0.2, 2.3, 4.3], [1.2, 3.4, 5.2]])
    radii = torch.tensor([[1.2, 0.9, 1.1], [0.9, 1.2, 1.0]])
    means = torch.zeros(2, 3, dim)
    means[..., 0], means[..., 1] = radii * angles.cos(), radii * angles.sin()
    return Mixture(means, torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.6, 0.15]]))


def solve(velocity: Callable[[Tensor, float], Tensor], x: Tensor, start: float = 1.0, end: float = 0.0) -> Tensor:
    """The ODE dx/dt = v from `start` to `end` by 100 steps of Heun's method, in float64, returned as x's type."""
    times = torch.linspace(start, end, 101, dtype=torch.float64).tolist()
    y = x.double()
    for t, after in pairwise(times):
        v = velocity(y, t)
        ahead = velocity(y + (after - t) * v, after)
        y = y + (after - t) * (v + ahead) / 2
    return y.to(x.dtype)


# --- the network ------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A small MLP (x_t [B, 1, D], t, cond [B]) -> v [B, 1, D]."""

    def __init__(self, dim: int, conditions: int, width: int = 96) -> None:
        super().__init__()
        self.conditions = conditions
        sizes = [dim + conditions + 2 * len(FREQUENCIES), width, width, width]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor) -> Tensor:
        x = x_t.flatten(1)
        phase = like(t, x).expand(len(x), 1) * torch.tensor(FREQUENCIES).to(x)
        which = nn.functional.one_hot(cond, self.conditions).to(x)
        return self.layers(torch.cat([x, phase.cos(), phase.sin(), which], dim=1))[:, None]

    def given(self, cond: Tensor) -> TimedVelocity:
        return lambda x_t, t: self(x_t, t, cond)


FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
"""Of the time embedding, in radians per unit of t."""


def train(parameters: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Adam, the rate falling to zero along a cosine. loss: step -> [B]."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(step).mean().backward()
        optimizer.step()


@dataclass(frozen=True)
class Batch:
    """What a step sees."""

    x0: Tensor
    eps: Tensor
    cond: Tensor


def draw(mixture: Mixture, size: int, generator: torch.Generator) -> Batch:
    cond = torch.randint(mixture.conditions, (size,), generator=generator)
    x0 = mixture.sample(cond, generator)
    return Batch(x0, torch.randn(x0.shape, generator=generator), cond)


@cache
def pretrained(dim: int = 2) -> Network:
    """The network that knows the mixture's velocity, to a tenth of it: what a distillation starts from. Copy it."""
    mixture, generator = two_conditions(dim), torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(dim, mixture.conditions)

    def loss(step: int) -> Tensor:
        batch = draw(mixture, 256, generator)
        t = torch.rand(256, generator=generator)
        x_t = add_noise(batch.x0, batch.eps, t)
        return per_sample((network(x_t, t, batch.cond) - mixture.velocity(x_t, t, batch.cond)).square())

    train(network.parameters(), loss, 1500, 3e-3)
    return network


# --- measures ---------------------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """The RMS distance between sorted projections of two sets of equally many samples, over random directions."""
    towards = torch.randn(a.flatten(1).shape[1], directions, generator=torch.Generator().manual_seed(7))
    towards = towards / towards.norm(dim=0)
    sorted_a, sorted_b = (x.flatten(1).float() @ towards for x in (a, b))
    return float((sorted_a.sort(0).values - sorted_b.sort(0).values).square().mean().sqrt())


def distribution_distance(mixture: Mixture, a: Tensor, b: Tensor, cond: Tensor) -> float:
    """The largest sliced Wasserstein distance over the conditions, both sets with the conditions `cond`."""
    return max(sliced_wasserstein(a[cond == c], b[cond == c]) for c in range(mixture.conditions))
