"""Emulated TensorFloat-32, and where it is used."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from trainers.config.methods import ConsistencyMethod
from trainers.config.run import ConfigError
from trainers.methods.consistency import consistency_terms
from trainers.methods.precision import rounded, tensor_float32


def test_ten_bits_of_mantissa_are_left():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-11 - 2**-20, -1 - 2**-11, 3e-30, 0.0])
    assert rounded(x).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, float(rounded(x)[5]), 0.0]
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert float(((rounded(values) - values) / values).abs().max()) <= 2**-11
    assert not (rounded(values).view(torch.int32) & 0x1FFF).any()
    assert rounded(values.double()).dtype is torch.float64


def test_products_are_of_rounded_operands_and_the_rest_is_float32():
    g = torch.Generator().manual_seed(0)
    x, layer = torch.randn(5, 7, generator=g), nn.Linear(7, 3)
    batch = torch.randn(2, 4, 7, generator=g)
    with torch.no_grad():
        plain = layer(x)
        with tensor_float32("cpu"):
            got, products = layer(x), batch @ batch.mT
            same = x * 1.2345
        wanted = rounded(x) @ rounded(layer.weight).T + layer.bias
        assert torch.allclose(got, wanted, atol=1e-6)
        assert not torch.allclose(got, plain, atol=1e-6)
        assert torch.allclose(products, rounded(batch) @ rounded(batch).mT, atol=1e-5)
        assert torch.equal(same, x * 1.2345)
        assert torch.equal(layer(x), plain)  # after it, float32 again


def test_attention_is_rounded_too():
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    plain = nn.functional.scaled_dot_product_attention(q, q, q)
    with tensor_float32("cpu"):
        got = nn.functional.scaled_dot_product_attention(q, q, q)
    assert 1e-5 < float((got - plain).abs().max()) < 1e-2


def test_only_the_tangent_of_a_consistency_step_is_rounded():
    """Prediction and gradient are those of float32; the target moves by less than a hundredth."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 4))

    def network(x_t, t):
        return layers(torch.cat([x_t, t.reshape(-1, 1, 1).expand(*x_t.shape[:2], 1)], -1))

    x0, eps, t = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.tensor([0.1, 0.5, 0.9])
    options = ConsistencyMethod(velocity="data", tangent="jvp", normalisation="none")
    results = []
    for chosen in (options, replace(options, tangent_precision="tf32")):
        layers.zero_grad()
        loss, metrics = consistency_terms(network, lambda x, t, v: v, x0, eps, t, chosen)
        loss.sum().backward()
        results.append((loss.detach(), metrics["tangent"], layers[0].weight.grad.clone()))
    (loss, tangent, grad), (rounded_loss, rounded_tangent, rounded_grad) = results
    assert tangent != rounded_tangent
    assert rounded_tangent == pytest.approx(tangent, rel=1e-2)
    assert torch.allclose(rounded_loss, loss, rtol=1e-2)
    assert float((rounded_grad - grad).norm()) < 1e-2 * float(grad.norm())


def test_a_difference_of_rounded_products_is_refused():
    with pytest.raises(ConfigError, match="tangent_precision tf32 needs tangent jvp"):
        ConsistencyMethod(tangent_precision="tf32")
