"""LoRA ranks by patterns of layer names, and exclusions: as peft makes them, as memory counts, as files say."""

import pytest
import torch

from trainers.config.run import AdapterConfig, ConfigError, NetworkConfig
from trainers.roles.frozen import load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import EMA, STUDENT
from trainers.tools import memory
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.weights.lora import read_lora, save_adapter
from unipic_core.weights.transformer import expected_shapes


def roles_with(**values):
    adapter = AdapterConfig(rank=4, alpha=8.0, **values)
    network = load_frozen(NetworkConfig(str(DEFAULT_MODEL), adapter=adapter))
    return AdapterRoles(network, adapter, (STUDENT,), seed=0), adapter


def rank(roles, layer):
    return roles.layers[layer].lora_A[STUDENT].weight.shape[0]


def test_ranks_and_exclusions_by_pattern():
    roles, adapter = roles_with(
        ranks={"*.attn.to_q": 6, "transformer_blocks.1.*": 2}, exclude=("transformer_blocks.0.*",)
    )
    assert not any(name.startswith("transformer_blocks.0.") for name in roles.layers)
    assert rank(roles, "transformer_blocks.2.attn.to_q") == 6
    assert rank(roles, "transformer_blocks.1.attn.to_q") == 6  # the first pattern that matches
    assert rank(roles, "transformer_blocks.1.attn.to_k") == 2
    assert rank(roles, "transformer_blocks.3.attn.to_k") == 4
    shapes = memory.adapter_shapes(expected_shapes(roles.network.config), adapter)
    assert {name: tuple(p.shape) for name, p in roles.parameters_of(STUDENT)} == shapes
    layer = roles.layers["transformer_blocks.1.attn.to_k"]
    assert layer.scaling[STUDENT] == roles.adapter(STUDENT)["transformer_blocks.1.attn.to_k"].scale == 8 / 2


def test_a_file_of_such_adapters_gives_the_same_velocity(tmp_path):
    patterns = {"ranks": {"*.attn.to_q": 6, "*.img_mlp.*": 2}, "exclude": ("*.to_v",)}
    roles, _ = roles_with(**patterns)
    generator = torch.Generator().manual_seed(0)
    for _, p in roles.parameters_of(STUDENT):
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    shape = LatentShape(1, 4, 4)
    latents = PackedLatents(torch.randn(1, 16, 64, generator=generator), ((shape,),), 16)
    text = TextCond(torch.randn(1, 8, roles.network.config.joint_attention_dim, generator=generator))
    path = tmp_path / "a.safetensors"
    save_adapter(path, roles.adapter(STUDENT))
    other, _ = roles_with(**patterns)
    other.start_from(path, (STUDENT, EMA))
    with torch.no_grad():
        wanted, got, base = (
            roles(STUDENT, latents, 0.5, text),
            other(EMA, latents, 0.5, text),
            roles("teacher", latents, 0.5, text),
        )
    assert float((wanted - base).norm()) > 0.1 * float(base.norm())
    assert float((wanted - got).norm()) < 0.02 * float((wanted - base).norm())  # files are bfloat16
    assert {layer.rank for layer in read_lora(path).layers.values()} == {2, 4, 6}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": {"*.nothing": 2}}, r"adapter.ranks: \*.nothing matches no layer with an adapter"),
        ({"exclude": ("*.nothing",)}, r"adapter.exclude: \*.nothing matches no layer of the network"),
        ({"exclude": ("*",)}, "match none that adapter.exclude leaves"),
        ({"ranks": {"*.to_q": 0}}, r"adapter.ranks must be at least 1, got 0 for \*.to_q"),
        ({"ranks": {"*.to_q": 10**6}}, "at most the layer's width"),
    ],
    ids=["ranks", "exclude", "all", "zero", "wide"],
)
def test_patterns_that_do_nothing_or_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        roles_with(**values)
