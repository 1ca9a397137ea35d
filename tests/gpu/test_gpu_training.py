"""A stored base on a GPU: every form trains, swapped blocks change nothing, and memory is what was computed."""

import json
from dataclasses import replace

import pytest
import torch

from trainers.config.run import AdapterConfig, NetworkConfig, parse_run
from trainers.roles.frozen import FrozenLinear, load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import STUDENT
from trainers.tools.memory import OUTSIDE, estimate
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.transformer import CONFIG_KEY
from unipic_core.weights.write import write_safetensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FORMS = ("fp32", "bf16", "fp8", "nf4")
NANO = NetworkConfig(str(DEFAULT_MODEL), adapter=AdapterConfig(rank=8))
CUDA = torch.device("cuda")


def two_steps(network, side=8, text=32, batch=2):
    """Losses of two AdamW steps on fixed inputs, on the GPU under autocast."""
    assert network.adapter is not None
    roles = AdapterRoles(load_frozen(network), network.adapter, (STUDENT,), seed=0)
    roles.place(CUDA)
    g = torch.Generator().manual_seed(1)
    shape = LatentShape(1, side, side)
    tokens = torch.randn(batch, 2 * side**2, 64, generator=g).to(CUDA)
    latents = PackedLatents(tokens, ((shape, shape),) * batch, side**2)
    words = TextCond(torch.randn(batch, text, roles.network.config.joint_attention_dim, generator=g).to(CUDA))
    optimizer = torch.optim.AdamW([p for _, p in roles.trained(STUDENT)], lr=1e-4)
    losses = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = roles(STUDENT, latents, 0.5, words).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, roles


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_trains(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    (before, after), roles = two_steps(replace(NANO, weights=kind))
    assert after < before
    assert all(p.device.type == "cuda" for p in roles.parameters())


@pytest.mark.parametrize("kind", FORMS)
def test_swapped_blocks_stay_behind_and_change_nothing(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    usual, _ = two_steps(replace(NANO, weights=kind))
    swapped, roles = two_steps(replace(NANO, weights=kind, block_swap=4, gradient_checkpointing=True))
    assert swapped == pytest.approx(usual, rel=1e-3)
    behind = [m for m in roles.network.transformer_blocks[2:].modules() if isinstance(m, FrozenLinear)]
    assert all(m.weight.device.type == "cpu" and m.weight.is_pinned() for m in behind)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_takes_the_memory_that_was_computed(kind, checkpointing, tmp_path):
    """At the released width, with few layers, within a quarter."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    sizes = MMDiTConfig(num_layers=4)
    described = {n: (torch.bfloat16, tuple(w.shape)) for n, w in MMDiT(sizes, device="meta").state_dict().items()}
    data = ((n, torch.randn(shape).mul_(0.02).bfloat16()) for n, (_, shape) in described.items())
    file = tmp_path / "wide.safetensors"
    write_safetensors(file, described, data, {CONFIG_KEY: json.dumps(sizes.to_dict())})
    network = NetworkConfig(
        str(file), weights=kind, adapter=AdapterConfig(rank=64), gradient_checkpointing=checkpointing
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    two_steps(network, side=64, text=1152, batch=1)
    measured = torch.cuda.max_memory_allocated() - start
    values = {"folder": "x", "kind": "jsonl", "path": "x", "size": 1024, "reference_budget": 1024}
    run = parse_run(
        {
            "method": "sft",
            "output": "x",
            "batch_size": 1,
            "precision": "bf16",
            "data": values,
            "network": {
                "model": str(file),
                "weights": kind,
                "gradient_checkpointing": checkpointing,
                "adapter": {"rank": 64},
            },
        }
    )
    assert measured == pytest.approx(estimate(run).gpu - OUTSIDE, rel=0.25)
