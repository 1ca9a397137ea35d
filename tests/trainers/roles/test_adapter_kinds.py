"""LoRA, DoRA, LoKr and LoHa: trained through peft, written to files, and read back by the core and the pipeline."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import TINY
from trainers.config.run import AdapterConfig, ConfigError, NetworkConfig
from trainers.methods.losses import jvp_tangent
from trainers.roles.frozen import load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.pipeline import UniPicPipeline
from unipic_core.weights.lora import merge_lora, read_lora, save_adapter
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer

KINDS = {
    "lora": {"type": "lora"},
    "dora": {"type": "dora"},
    "lokr": {"type": "lokr", "rank": 2},
    "lokr of full factors": {"type": "lokr", "rank": 32, "alpha": 32.0},
    "lokr with factor": {"type": "lokr", "rank": 2, "factor": 4},
    "loha": {"type": "loha"},
}
PARTS = {
    "lora": {"down", "up"},
    "dora": {"down", "up", "dora_scale"},
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lokr of full factors": {"lokr_w1", "lokr_w2"},
    "lokr with factor": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def roles_of(kind, weights="fp32", trained=(STUDENT, FAKE_SCORE), **values):
    adapter = replace(AdapterConfig(rank=4, alpha=8.0), **{**KINDS[kind], **values})
    network = load_frozen(NetworkConfig(str(TINY), adapter=adapter, weights=weights))
    return AdapterRoles(network, adapter, trained, seed=0)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    latents = PackedLatents(torch.randn(1, 16, 16, generator=g), ((LatentShape(1, 4, 4),),), 16)
    return latents, 0.5, TextCond(torch.randn(1, 8, 32, generator=g))


def trained(roles, inputs, steps=4):
    """A few steps towards ones, rounded to the dtype of files."""
    optimizer = torch.optim.AdamW([p for _, p in roles.trained(STUDENT)], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (roles(STUDENT, *inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, p in roles.trained(STUDENT):
        if "magnitude" not in name:
            p.data = p.data.bfloat16().float()
    assert losses[-1] < losses[0]
    return roles


@kinds
@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
def test_every_role_starts_as_the_base_and_only_one_moves(kind, weights, inputs):
    if kind == "dora" and weights == "fp8":
        pytest.skip("refused by the config")
    roles = roles_of(kind, weights)
    with torch.no_grad():
        base = roles(TEACHER, *inputs)
        for role in (STUDENT, FAKE_SCORE, EMA):
            assert torch.allclose(roles(role, *inputs), base, atol=1e-6), role
    assert all(p.dtype is torch.float32 for _, p in roles.trained(STUDENT))
    trained(roles, inputs)
    with torch.no_grad():
        assert not torch.allclose(roles(STUDENT, *inputs), base, atol=1e-2)
        for role in (TEACHER, FAKE_SCORE, EMA):
            assert torch.allclose(roles(role, *inputs), base, atol=1e-6), role


@kinds
def test_a_file_gives_the_output_of_the_trained_network(kind, inputs, tmp_path):
    """By the core's loader and in the pipeline, to 1e-5; what it changes is much larger."""
    roles, file = trained(roles_of(kind), inputs), tmp_path / "a.safetensors"
    save_adapter(file, roles.adapter(STUDENT), recipe=Recipe(steps=3))
    with torch.no_grad():
        wanted, base = roles(STUDENT, *inputs), roles(TEACHER, *inputs)
        network, lora = load_transformer(TINY), read_lora(file)
        assert merge_lora(network, lora).unmatched == ()
        assert torch.allclose(network(*inputs), wanted, atol=1e-5)
        pipe = UniPicPipeline.from_pretrained(TINY, torch_dtype=torch.float32, device="cpu")
        pipe.load_lora(file)
        assert torch.allclose(pipe.transformer(*inputs), wanted, atol=1e-5)
    assert float((wanted - base).abs().max()) > 0.05
    assert lora.recipe == Recipe(steps=3)
    assert {frozenset(layer.parts) for layer in lora.layers.values()} == {frozenset(PARTS[kind])}
    assert not any(key.endswith("alpha") for key in load_file(file))  # it is in the weights


@kinds
def test_training_goes_on_from_a_file(kind, inputs, tmp_path):
    roles, file = trained(roles_of(kind), inputs), tmp_path / "a.safetensors"
    save_adapter(file, roles.adapter(STUDENT))
    other = roles_of(kind, alpha=2.0)  # its scale is taken into the weights
    other.start_from(file, (STUDENT, EMA))
    with torch.no_grad():
        wanted = roles(STUDENT, *inputs)
        for role in (STUDENT, EMA):
            assert torch.allclose(other(role, *inputs), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="does not fit network.adapter: in .* expected"):
        roles_of("loha" if kind == "lora" else "lora").start_from(file, (STUDENT,))


@kinds
def test_ranks_and_exclusions_by_pattern(kind):
    values = {"ranks": {"*.attn.to_q": 1}, "exclude": ("transformer_blocks.0.*",)}
    roles = roles_of(kind, **values)
    layers = roles.adapter(STUDENT)
    assert not any(name.startswith("transformer_blocks.0.") for name in layers)
    assert layers["transformer_blocks.1.attn.to_q"].rank == 1
    assert layers["transformer_blocks.1.attn.to_k"].rank != 1


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_the_exact_tangent_goes_through(kind, inputs):
    """Forward-mode differentiation against a central difference along the time."""
    roles = trained(roles_of(kind), inputs)
    latents, _, text = inputs

    def velocity(x, t):
        return roles(STUDENT, latents.with_target(x), t, text)

    x, t = latents.target, torch.tensor([0.5])
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        tangent = jvp_tangent(velocity, x, torch.zeros_like(x), t)[1]
        e = 1e-4
        difference = (velocity(x, t + e) - velocity(x, t - e)) / (2 * e)
    assert float((tangent - difference).norm()) < 0.02 * float(difference.norm())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"adapter": {"type": "boft"}}, "type must be one of lora, dora, lokr, loha"),
        ({"adapter": {"type": "lora", "factor": 4}}, "factor is for type lokr, got type lora"),
        ({"adapter": {"type": "lokr", "dropout": 0.1}}, "dropout is for types lora and dora, got type lokr"),
        ({"adapter": {"type": "dora"}, "weights": "fp8"}, "adapter.type dora needs the values of the base's weights"),
        ({"adapter": {"type": "dora"}, "block_swap": 1}, "adapter.type dora needs the values of the base's weights"),
        ({"adapter": {"type": "loha"}, "weights": "nf4"}, "adapter.type loha cannot be used with weights nf4"),
    ],
)
def test_what_cannot_be_is_refused(changed, network, message):
    with pytest.raises(ConfigError, match=message):
        changed(sections={"network": network})


def test_loha_has_no_exact_tangent(changed):
    sections = {"network": {"adapter": {"type": "loha"}}, "consistency": {"tangent": "jvp"}}
    with pytest.raises(ConfigError, match="tangent jvp cannot be used with adapter.type loha"):
        changed("consistency", sections)
