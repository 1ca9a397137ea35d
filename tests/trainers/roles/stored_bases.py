"""The nano's network as a frozen base in its stored forms, with adapters over it, for the tests of frozen.py."""

from dataclasses import replace

import pytest
import torch

from trainers.config.run import AdapterConfig, NetworkConfig
from trainers.roles.frozen import FrozenLinear, load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import STUDENT
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond

FORMS = ("fp32", "bf16", "fp8", "nf4")
NANO = NetworkConfig(str(DEFAULT_MODEL), adapter=AdapterConfig())


def skip_without(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")


def base(kind="fp32", **options):
    skip_without(kind)
    return load_frozen(replace(NANO, weights=kind, **options))


def layers(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, FrozenLinear)}


def example():
    """(latents, t, text) of two samples with a reference each."""
    g = torch.Generator().manual_seed(1)
    shape = LatentShape(1, 4, 4)
    latents = PackedLatents(torch.randn(2, 32, 64, generator=g), ((shape, shape),) * 2, 16)
    return latents, torch.tensor([0.3, 0.8]), TextCond(torch.randn(2, 5, 128, generator=g))


def roles(kind="fp32", seed=2, **options):
    """Adapters over a base, with weights that do something."""
    made = AdapterRoles(base(kind, **options), AdapterConfig(rank=4, alpha=4.0), (STUDENT,), seed=0)
    g = torch.Generator().manual_seed(seed)
    for _, p in made.parameters_of(STUDENT):
        p.data = torch.randn(p.shape, generator=g) * 0.05
    return made


def gradients(made, inputs, autocast=False):
    """(velocity, gradients of the adapters, gradient of the input) of one student step."""
    latents, t, text = inputs
    x = latents.tokens.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        v = made(STUDENT, replace(latents, tokens=x), t, text)
        loss = v.float().square().mean()
    loss.backward()
    return v.detach(), [p.grad for _, p in made.trained(STUDENT) if p.grad is not None], x.grad


def distance(a, b):
    return float((a - b).norm() / b.norm())
