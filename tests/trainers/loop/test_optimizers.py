"""Muon and the choice of what it trains."""

import pytest
import torch
from torch import nn

from trainers.config.methods import OptimizerConfig
from trainers.loop.optimizers import Muon, is_hidden_matrix, lr_factor, make_optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (5, 40)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert singular.min() > 0.5
    assert singular.max() < 1.4


def test_muon_solves_a_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator) * torch.logspace(0, -1, 8)
    truth = torch.randn(4, 8, generator=generator)
    layer = nn.Linear(8, 4, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - x @ truth.T).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_convolutions_and_matrices_are_hidden_first_and_last_layers_are_not():
    w = torch.zeros(4, 4)
    assert is_hidden_matrix("transformer_blocks.0.attn.to_q.weight", w)
    assert is_hidden_matrix("encoder.down_blocks.0.conv1.weight", torch.zeros(4, 4, 3, 3))
    for name in ("img_in.weight", "proj_out.weight", "blocks.0.img_mod.1.weight", "embed_tokens.weight"):
        assert not is_hidden_matrix(name, w)
    assert not is_hidden_matrix("x.bias", torch.zeros(4))


def test_every_parameter_is_trained_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    for muon_lr, count in ((0.0, 1), (0.01, 2)):
        optimizers = make_optimizers(list(model.named_parameters()), OptimizerConfig(muon_lr=muon_lr))
        assert len(optimizers) == count
        ids = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_schedule():
    factor = lr_factor(OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1), 110)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
