"""A frozen base in its stored forms: what it keeps, what it computes, and what trains through it."""

import builtins
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.trainers.roles.stored_bases import (
    FORMS,
    NANO,
    base,
    distance,
    example,
    gradients,
    layers,
    roles,
    skip_without,
)
from trainers.config.run import ConfigError
from trainers.roles.frozen import FrozenLinear, load_frozen
from trainers.roles.types import EMA, STUDENT, TEACHER
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.model.block_swap import Copies
from unipic_core.weights.convert import convert
from unipic_core.weights.transformer import load_transformer

ERROR = {"fp32": 0.0, "bf16": 3e-3, "fp8": 0.035, "nf4": 0.11}
"""Most that a stored weight may be off, relative to the norm of the weights: about 2^-9, 2^-5 and a tenth."""


def layer(kind, seed=0):
    skip_without(kind)
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(64, 96, generator=g) * 0.02, torch.randn(64, generator=g)
    made = FrozenLinear(96, 64, device="meta")
    made.reserve(kind)
    made.fill(weight, bias)
    return made, weight, bias


@pytest.fixture(scope="module")
def inputs():
    return example()


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_weight_is_restored_within_its_error(kind, dtype):
    made, weight, bias = layer(kind)
    restored = made.dequantised(torch.device("cpu"), dtype)
    assert restored.shape == weight.shape
    assert restored.dtype is dtype
    rounding = 3e-3 if dtype is torch.bfloat16 else 0.0
    assert distance(restored.float(), weight) <= ERROR[kind] + rounding
    if kind == "bf16":
        assert torch.equal(restored.float(), weight.bfloat16().float())
    x = torch.randn(7, 96)
    expected = nn.functional.linear(x.to(dtype), restored, bias.to(dtype))
    assert torch.equal(made(x.to(dtype)), expected)


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 32), ("bf16", 16), ("fp8", 8), ("nf4", 4.5)])
def test_a_stored_weight_takes_its_bits(kind, bits):
    made, weight, _ = layer(kind)
    held = made.weight.nbytes + (made.scale.nbytes if made.scale is not None else 0)
    assert held == pytest.approx(weight.numel() * bits / 8, abs=4)  # fp8 has one float32 scale


def test_layers_outside_the_blocks_have_no_less_than_bfloat16():
    kinds = {name: m.storage_dtype for name, m in layers(base("fp8")).items()}
    assert {k for n, k in kinds.items() if n.startswith("transformer_blocks.")} == {"fp8"}
    assert {k for n, k in kinds.items() if not n.startswith("transformer_blocks.")} == {"bf16"}
    assert {m.storage_dtype for m in layers(base("fp32")).values()} == {"fp32"}


def test_scaled_fp8_files_are_not_quantised_again(tmp_path):
    """Ours come back bit by bit; a scale that bfloat16 cannot hold is rounded to it, and no value moves."""
    own = convert(DEFAULT_MODEL, tmp_path / "own.safetensors", dtype="fp8_scaled")
    tensors = load_file(own)
    found = layers(load_frozen(replace(NANO, model=str(own), weights="fp8")))
    scaled = {n.removesuffix("_scale") for n in tensors if n.endswith(".weight_scale")}
    assert len(scaled) == 6 * 14
    for name in scaled:
        made = found[name.removesuffix(".weight")]
        assert torch.equal(made.weight.view(torch.uint8), tensors[name].view(torch.uint8)), name
        assert torch.equal(made.scale, tensors[name + "_scale"]), name
    others = {n: w * 1.003 if n.endswith(".weight_scale") else w for n, w in tensors.items()}
    config = replace(NANO, model=str(tmp_path / "other.safetensors"), weights="fp8")
    save_file(others, config.model, metadata=metadata_of(own))
    found = layers(load_frozen(config))
    for name in scaled:
        made = found[name.removesuffix(".weight")]
        assert torch.equal(made.weight.view(torch.uint8), tensors[name].view(torch.uint8)), name
        assert distance(made.scale, others[name + "_scale"]) < 2**-7


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("fp32", 1e-6), ("bf16", 0.01), ("fp8", 0.15), ("nf4", 0.5)])
def test_the_velocity_is_the_float32_network_s_within_the_form_s_error(kind, error, inputs):
    with torch.no_grad():
        plain, network = load_transformer(DEFAULT_MODEL, dtype=torch.float32), base(kind)
        expected = plain(*inputs)
        assert distance(network(*inputs), expected) < error
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rounding = distance(plain(*inputs).float(), expected)
            assert distance(network(*inputs).float(), expected) < error + 1.1 * rounding < error + 0.03


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_pass_through_frozen_layers(kind, inputs):
    """Against a float32 network of plain layers that holds the same restored weights."""
    made = roles(kind)
    v, adapters, x = gradients(made, inputs)
    assert len(adapters) > 100
    reference = roles("fp32")
    for name, module in layers(made.network).items():
        twin = reference.network.get_submodule(name)
        twin.weight.data = module.dequantised(torch.device("cpu"), torch.float32)
    plain = gradients(reference, inputs)
    assert distance(v, plain[0]) < 1e-5
    assert distance(x, plain[2]) < 1e-5
    assert all(distance(a, b) < 1e-4 for a, b in zip(adapters, plain[1], strict=True))
    assert all(
        p.grad is None
        for p in made.network.parameters()
        if p.dtype is torch.uint8 or (p.ndim == 2 and not p.requires_grad)
    )


def test_a_plain_linear_layer_has_the_same_gradient():
    made, weight, bias = layer("fp32")
    x = torch.randn(3, 7, 96, requires_grad=True)
    made(x).square().sum().backward()
    mine, x.grad = x.grad, None
    nn.functional.linear(x, weight, bias).square().sum().backward()
    assert torch.allclose(mine, x.grad, rtol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_and_block_swap_change_no_bit(kind, autocast, inputs):
    plain = gradients(roles(kind), inputs, autocast)
    other = gradients(roles(kind, gradient_checkpointing=True, block_swap=4), inputs, autocast)
    for a, b in zip((plain[0], plain[2], *plain[1]), (other[0], other[2], *other[1]), strict=True):
        assert torch.equal(a, b)


def swapping(made):
    """The roles with copies of swapped blocks into the memory of the CPU, as a GPU would have them."""
    (swap,) = {m.swap for m in layers(made.network).values() if m.swap is not None}
    swap.copies = Copies()
    return swap


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_copied_blocks_change_no_bit(kind, checkpointing, inputs):
    """Three steps, each of a pass without gradient and one with; backward goes through the blocks in reverse."""
    plain = roles(kind, gradient_checkpointing=checkpointing)
    other = roles(kind, gradient_checkpointing=checkpointing, block_swap=5)
    swap = swapping(other)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(plain(TEACHER, *inputs), other(TEACHER, *inputs))
        before = swap.waited
        expected, mine = gradients(plain, inputs), gradients(other, inputs)
        for a, b in zip((expected[0], expected[2], *expected[1]), (mine[0], mine[2], *mine[1]), strict=True):
            assert torch.equal(a, b)
        assert swap.waited - before == 0, "there and back, every block was copied ahead"
        for p in (p for made in (plain, other) for _, p in made.trained(STUDENT)):
            p.grad = None
    assert len(swap.rooms) == 2


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_exact_tangent_goes_through(kind, swapped, inputs):
    """Forward-mode differentiation, in float32 inside autocast, against a difference."""
    latents, t, text = inputs
    made = roles(kind, block_swap=3 if swapped else 0)
    if swapped:
        swapping(made)
    made.network.attention = lambda q, k, v, mask: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    def network(x, t):
        return made(STUDENT, latents.with_target(x), t, text)

    x, v = latents.target, torch.ones_like(latents.target)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        tangent = torch.func.jvp(network, (x, t), (v, torch.zeros_like(t)))[1]
        difference = (network(x + 1e-2 * v, t) - network(x - 1e-2 * v, t)) / 2e-2
    assert tangent.dtype is torch.float32
    assert distance(tangent, difference) < 1e-2


# --- roles over it, and messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
def test_roles_over_a_stored_base(kind, inputs):
    made = roles(kind)
    with torch.no_grad():
        teacher = base(kind)(*inputs)
        assert torch.equal(made(TEACHER, *inputs), teacher)
        assert torch.equal(made(EMA, *inputs), teacher)  # its adapter still adds nothing
        assert distance(made(STUDENT, *inputs), teacher) > 0.01
    assert all(p.dtype is torch.float32 for _, p in made.trained(STUDENT))
    gradients(made, inputs, autocast=True)
    optimizer = torch.optim.AdamW([p for _, p in made.trained(STUDENT)], lr=1e-2)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(made(TEACHER, *inputs), teacher)


def test_nf4_without_bitsandbytes_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r'needs bitsandbytes; pip install "comfyui-unipic\[quant\]", or choose bf16'):
        load_frozen(replace(NANO, weights="nf4"))
