"""The masked loss: its equation, and that the methods use it on the tokens of the masks."""

from dataclasses import replace

import pytest
import torch

from trainers.config.methods import MaskedLoss
from trainers.config.run import ConfigError
from trainers.methods.consistency import ConsistencyTraining
from trainers.methods.correspondence import NOBODY, Owners
from trainers.methods.losses import (
    consistency_loss,
    flow_matching_loss,
    mask_weights,
    per_sample,
    scaled_residual,
    weighted_mean,
)
from trainers.methods.sft import SFTTraining


def test_weighted_mean_by_hand():
    values = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [4.0, 4.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5], [0.0, 0.25]])
    assert weighted_mean(values, weights).tolist() == pytest.approx([(2 + 0.5 * 6) / 1.5, 4.0])
    assert weighted_mean(values, torch.ones(2, 2)).tolist() == per_sample(values).tolist()
    assert weighted_mean(values, torch.zeros(2, 2)).tolist() == [0, 0]


def test_tokens_outside_have_their_weight():
    mask = torch.tensor([[1.0, 0.25, 0.0]])
    assert mask_weights(mask, 0.2).tolist() == [pytest.approx([1.0, 0.25 + 0.75 * 0.2, 0.2])]
    assert mask_weights(None, 0.2) is None


@pytest.mark.parametrize("inside", [1, 2, 8])
def test_a_small_mask_leaves_the_size_of_the_gradient(inside):
    """The gradient of what moves all tokens alike is the same under any mask; outside it there is none."""
    x0, eps = torch.zeros(1, 8, 4), torch.zeros(1, 8, 4)
    offset, free = torch.tensor(3.0, requires_grad=True), torch.ones(1, 8, 4, requires_grad=True)
    mask = (torch.arange(8) < inside).float()[None]
    flow_matching_loss(offset * torch.ones(1, 8, 4), x0, eps, mask).sum().backward()
    assert float(offset.grad) == pytest.approx(6.0)
    flow_matching_loss(free, x0, eps, mask).sum().backward()
    assert (free.grad[0].abs().sum(1) > 0).tolist() == [i < inside for i in range(8)]


def test_consistency_takes_its_size_and_its_loss_from_the_mask():
    """Whatever the residual is outside, the normalised residual and the loss inside are the same."""
    residual = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask, other = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]]), residual.clone()
    other[mask == 0] = 1e3
    v = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for r in (residual, other):
        scaled = scaled_residual(r, "rms", mask)
        losses.append(consistency_loss(v, scaled, cosine=True, weights=mask))
        assert torch.equal(scaled[mask > 0], scaled_residual(residual, "rms", mask)[mask > 0])
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("make", "method", "section"),
    [
        (SFTTraining, "sft", {"sft": {"train_text_encoder": False}}),
        (ConsistencyTraining, "consistency", {"consistency": {"velocity": "data", "normalisation": "none"}}),
    ],
)
def test_a_method_averages_over_the_mask(changed, make, method, section):
    """Left and right half together are the whole; rows without a mask are as before."""
    training = make(changed(method, section))
    batch = training.batch(1).micro_batches[0]
    half = torch.zeros(batch.x0.shape[:2])
    half[:, ::2] = 1
    with torch.no_grad():
        whole = training.loss("student", batch)[0]
        training.masked_loss = MaskedLoss()
        assert torch.equal(training.loss("student", batch)[0], whole)
        left, right = (training.loss("student", replace(batch, mask=m))[0] for m in (half, 1 - half))
        training.masked_loss = MaskedLoss(outside=1.0)
        everywhere = training.loss("student", replace(batch, mask=half))[0]
    assert torch.allclose((left + right) / 2, whole, rtol=1e-5)
    assert not torch.allclose(left, whole, rtol=1e-3)
    assert torch.allclose(everywhere, whole, rtol=1e-6)


def test_a_row_has_the_same_loss_beside_rows_with_masks(changed):
    """In one padded batch, some rows of which have masks."""
    training = SFTTraining(changed(sections={"sft": {"train_text_encoder": False}}))
    training.masked_loss = MaskedLoss(outside=0.1)
    take = training.samples.take

    def with_masks(row):
        rows = take(row)
        mask = torch.zeros(1, *(side // 2 for side in rows.target.shape[-2:]))
        mask[:, : 1 + row % 3] = 1
        return replace(rows, mask=mask) if row % 2 else rows

    training.samples.take = with_masks
    rows = next(piece.rows for i in range(8) for piece in training.batch(i).micro_batches if len(piece.rows) > 1)
    with torch.no_grad():
        together = training.loss("student", training.micro_batch(training.samples, rows, 0))[0]
        for row, loss in zip(rows, together.tolist(), strict=True):
            alone = training.loss("student", training.micro_batch(training.samples, [row], 0))[0]
            assert float(alone) == pytest.approx(loss, rel=1e-5)


def test_a_masked_loss_without_masks_is_refused(changed):
    config = changed(sections={"sft": {"train_text_encoder": False, "mask": {}}})
    with pytest.raises(ConfigError, match="sft.mask needs rows with masks"):
        SFTTraining(config)


def test_methods_without_a_term_on_real_pictures_refuse_masks(changed):
    with pytest.raises(ConfigError, match="unknown key 'mask'"):
        changed("dmd", {"dmd": {"mask": {}}})
    with pytest.raises(ConfigError, match="consistency.mask cannot be used in method joint"):
        changed("joint", {"consistency": {"mask": {}}})
    with pytest.raises(ConfigError, match=r"outside must be from 0 to 1"):
        changed(sections={"sft": {"mask": {"outside": 2}}})


def test_scenes_leave_out_what_shows_the_background_alone():
    owners = Owners(torch.tensor([[0, 1, 2, NOBODY], [0, 1, NOBODY, NOBODY]]), torch.tensor([2, NOBODY]))
    assert owners.mask.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
