"""The token pointer loss on attention whose answer is known, and a network that learns to copy with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainers.config.methods import Correspondence
from trainers.config.run import ConfigError
from trainers.methods.correspondence import NOBODY, Owners
from trainers.methods.token_pointer import (
    ShownTokens,
    TokenPointer,
    found,
    nearest_tokens,
    shown_tokens,
    token_pointer_loss,
)
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT

SIDE = 4
OPTIONS = Correspondence(token_weight=1.0, token_blocks=(0, 1))


def network() -> MMDiT:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 8}
    return MMDiT(MMDiTConfig(in_channels=8, out_channels=2, axes_dims_rope=(4, 6, 6), **sizes))


def test_places_fall_between_the_four_tokens_around_them() -> None:
    shape = LatentShape(1, 2, 4)  # 2 rows of 4 tokens; the centre of the first is at (1/8, 1/4)
    indices, shares = nearest_tokens(torch.tensor([[0.125, 0.25], [0.25, 0.5], [0.0, 1.0], [0.8125, 0.25]]), shape)
    pairs = [zip(i, s, strict=True) for i, s in zip(indices.tolist(), shares.tolist(), strict=True)]
    held = [{token: share for token, share in one if share} for one in pairs]
    assert held == [{0: 1.0}, {0: 0.25, 1: 0.25, 4: 0.25, 5: 0.25}, {4: 1.0}, {2: 0.25, 3: 0.75}]


def test_tokens_are_counted_through_the_references_in_their_order() -> None:
    sources = torch.tensor([[0, 0.1, 0.1], [2, 0.9, 0.9], [-1, 0.5, 0.5]])
    indices, shares = shown_tokens(sources, (2, 0), [LatentShape(1, 2, 2), LatentShape(1, 1, 3)])
    assert shares.sum(-1).tolist() == [1, 1, 0]
    assert (indices[0][shares[0] > 0].tolist(), indices[1][shares[1] > 0].tolist()) == ([4], [3])


def test_the_loss_is_minus_the_logarithm_of_the_heads_mean_probability() -> None:
    """Head 0 gives the two reference tokens 3/4 and 1/4, head 1 the same; padding gets nothing."""
    q = torch.tensor([[[[1.0]], [[0.0]]]])  # two heads, one target token, one value
    k = torch.tensor([[[[math.log(3)], [0.0], [9.0]], [[0.0], [0.0], [9.0]]]])
    shown = ShownTokens(torch.tensor([[[0, 1, 0, 1]]]), torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]))
    exists = torch.tensor([[True, True, False]])
    loss, attention = token_pointer_loss(q, k, exists, shown, torch.ones(1, 1))
    assert loss.tolist() == pytest.approx([math.log(2)])
    assert attention[0, :, 0].flatten().tolist() == pytest.approx([0.75, 0.25, 0, 0.5, 0.5, 0])
    sharp = ShownTokens(shown.indices, torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    loss, attention = token_pointer_loss(q, k, exists, sharp, torch.ones(1, 1))
    assert loss.tolist() == pytest.approx([-math.log((0.75 + 0.5) / 2)])
    assert found(attention, sharp).tolist() == [[True]]
    other = ShownTokens(shown.indices, torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]))
    assert found(attention, ShownTokens(other.indices + 1, sharp.shares)).tolist() == [[False]]


def test_the_gradient_goes_to_the_head_that_finds_the_token_best() -> None:
    q = (2.5 * torch.eye(3, 8)).expand(1, 2, 3, 8).clone().requires_grad_()
    k = torch.zeros(1, 2, 5, 8)
    k[0, 0, :3], k[0, 1, :3] = 2.5 * torch.eye(3, 8), -2.5 * torch.eye(3, 8)
    shown = ShownTokens(torch.tensor([[[0] * 4, [1] * 4, [2] * 4]]), torch.tensor([1.0, 0, 0, 0]).expand(1, 3, 4))
    loss, _ = token_pointer_loss(q, k, torch.ones(1, 5, dtype=torch.bool), shown, torch.ones(1, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    assert gradient[0, 1].norm() < 0.2 * gradient[0, 0].norm()


def test_excluded_tokens_have_no_gradient() -> None:
    q, k = torch.randn(2, 2, 3, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    shares = torch.tensor([[[1.0, 0, 0, 0], [0.0, 0, 0, 0], [0.5, 0.5, 0, 0]]]).repeat(2, 1, 1)
    shown = ShownTokens(torch.zeros(2, 3, 4, dtype=torch.int64), shares)
    owners = Owners(torch.tensor([[0, NOBODY, 1], [0, NOBODY, NOBODY]]), torch.tensor([1, NOBODY]))
    weights = shown.weights(owners, 0.25, torch.tensor([False, False]))
    assert weights.tolist() == [[1, 0, 0.25], [1, 0, 1]]  # an edit has no background of its own
    weights = shown.weights(owners, 0.25, torch.tensor([False, True]))
    loss, _ = token_pointer_loss(q, k, torch.ones(2, 5, dtype=torch.bool), shown, weights)
    assert loss[1] == 0
    loss.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert q.grad.flatten(3).norm(dim=-1).sum(1).ne(0).tolist() == [[True, False, True], [False] * 3]


def copies(batch: int, generator: torch.Generator) -> tuple[PackedLatents, ShownTokens]:
    """Targets that show one of two references, moved by one token around the edge; their tokens are noise."""
    shapes = (LatentShape(1, SIDE, SIDE),) * 3
    references = torch.randn(batch, 2 * SIDE * SIDE, 8, generator=generator)
    target = torch.randn(batch, SIDE * SIDE, 8, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    token = (rows * SIDE + (columns + 1) % SIDE).flatten() + SIDE * SIDE
    indices = token[None, :, None].expand(batch, -1, 4)
    shares = torch.tensor([1.0, 0, 0, 0]).expand(batch, SIDE * SIDE, 4)
    return PackedLatents(torch.cat([target, references], dim=1), (shapes,) * batch, SIDE * SIDE), ShownTokens(
        indices, shares
    )


def test_a_network_learns_which_token_to_copy() -> None:
    model, generator = network(), torch.Generator().manual_seed(1)
    loss = TokenPointer(OPTIONS, model, "full")
    optimizer, records = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        latents, shown = copies(4, generator)
        with loss.recording() as recorded:
            model(latents, torch.full((4,), 0.9), TextCond(torch.zeros(4, 3, 8)))
        each, metrics = loss(recorded, latents, shown, torch.ones(4, SIDE * SIDE))
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        records.append(metrics)
    assert records[-1]["token_pointer"] < 0.4 * records[0]["token_pointer"]
    assert records[-1]["token_pointer_right"] > 0.9


def test_recording_changes_no_velocity_and_ends() -> None:
    model, (latents, _) = network(), copies(2, torch.Generator().manual_seed(2))
    text = TextCond(torch.randn(2, 3, 8))
    loss = TokenPointer(OPTIONS, model, "full")

    def velocity() -> Tensor:
        v: Tensor = model(latents, 0.5, text)
        return v

    with loss.recording() as recorded:
        during = velocity()
    assert {block: q.shape for block, (q, _) in recorded.items()} == dict.fromkeys((0, 1), (2, 2, 3 + 48, 16))
    recorded.clear()
    assert torch.equal(during, velocity())
    assert not recorded


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token_blocks must be below 2, got \[1, 2\]"):
        TokenPointer(Correspondence(token_weight=1.0, token_blocks=(1, 2)), network(), "full")
    with pytest.raises(ConfigError, match="needs attention_form full, got prefix_causal"):
        TokenPointer(OPTIONS, network(), "prefix_causal")
    with pytest.raises(ConfigError, match="token_blocks must be distinct"):
        Correspondence(token_blocks=(1, 1))
