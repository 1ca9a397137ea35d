"""The correspondence loss on tokens whose answer is known, and in a training that can be broken off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainers.config.methods import Correspondence
from trainers.config.run import ConfigError
from trainers.loop.loop import train
from trainers.methods.correspondence import NOBODY, CorrespondenceLoss, Owners, PointerHead, pointer_loss
from trainers.methods.scenes import on_scenes
from trainers.methods.sft import SFTTraining
from trainers.methods.sft_text import SFTWithText
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.transformer import open_transformer

SFTOnScenes = on_scenes(SFTWithText)
SCENES = {
    "data": {"kind": "scenes", "folder": "", "samples": 0, "workers": 0, "scenes": {"buffer": 16, "uses": 2}},
    "sft": {"correspondence": {"blocks": [0], "weight": 0.5}},
}
TOKENS = {"correspondence": {**SCENES["sft"]["correspondence"], "token_weight": 0.25, "token_blocks": [1]}}


def network() -> MMDiT:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 8}
    return MMDiT(MMDiTConfig(in_channels=8, out_channels=2, axes_dims_rope=(4, 6, 6), **sizes))


def latents(*references: tuple[int, ...]) -> PackedLatents:
    """A target of 2 x 2 tokens and references of so many tokens in each sample."""
    shapes = tuple((LatentShape(1, 2, 2), *(LatentShape(1, 1, n) for n in one)) for one in references)
    longest = max(4 + sum(one) for one in references)
    torch.manual_seed(1)
    return PackedLatents(torch.randn(len(references), longest, 8), shapes, 4)


def test_the_loss_is_the_weighted_cross_entropy_of_the_owners() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [5.0, -5.0]]])  # p = (1/4, 3/4), (1/2, 1/2), any
    owners, weights = torch.tensor([[1, 0, NOBODY]]), torch.tensor([[1.0, 0.3, 0.0]])
    expected = (math.log(4 / 3) + 0.3 * math.log(2)) / 1.3
    assert pointer_loss(logits, owners, weights).tolist() == pytest.approx([expected])


def test_a_head_that_compares_finds_the_reference_of_every_token() -> None:
    """With equal maps a token points to the reference whose tokens, on average, it resembles; padding is not there."""
    head = PointerHead(64)
    for layer in (head.query, head.key):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    pattern = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    own = [pattern[[0, 1, 1, 0, 0, 1, 1]], pattern[[2, 0, 1, 1, 0, 1, 2]]]  # target, then the references' tokens
    logits: Tensor = head(torch.stack(own), latents((1, 2), (1, 1, 1)))
    assert logits.argmax(-1).tolist() == [[0, 1, 1, 0], [2, 0, 1, 1]]
    assert logits[0, :, 2].tolist() == [float("-inf")] * 4


def test_what_is_left_out_has_no_gradient() -> None:
    """Ambiguous tokens, samples without their prompt, and single references; the rest trains network and heads."""
    model = network()
    loss = CorrespondenceLoss(Correspondence(blocks=(0, 1)), model, seed=0)
    packed, text = latents((1, 2), (1, 2), (3,)), TextCond(torch.randn(3, 5, 8))
    owners = Owners(torch.tensor([[0, 1, NOBODY, 1], [0, 1, 1, 1], [NOBODY] * 4]), torch.tensor([1, 0, NOBODY]))
    t = torch.tensor([0.9, 0.9, 0.9])

    def values(dropped: list[bool]) -> tuple[Tensor, dict[str, float]]:
        with loss.recording() as seen:
            model(packed, t, text)
        return loss(seen, packed, owners, torch.tensor(dropped), t)

    each, metrics = values([False, True, False])
    assert each[0] > 0
    assert each[1:].tolist() == [0, 0]
    assert metrics["early_things"] == pytest.approx(1 / 12)  # token 0 of sample 0: the others show the background
    assert metrics["first_things"] == 0  # t is below 0.99
    each.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in loss.named_parameters() if "norm" in name)
    assert model.img_in.weight.grad is not None
    nothing, _ = values([True, True, True])
    assert nothing.tolist() == [0, 0, 0]
    nothing.sum().backward()  # connected all the same: processes add their gradients up one by one
    assert not any("network" in name for name, _ in loss.named_parameters())


def test_tokens_are_counted_by_their_times() -> None:
    """Early from t = 0.8 on, first from 0.99 on; of each the share that is right."""
    model = network()
    loss = CorrespondenceLoss(Correspondence(blocks=(0,)), model, seed=0)
    packed, t = latents((1, 2), (1, 2), (1, 2)), torch.tensor([0.7, 0.9, 1.0])
    owners = Owners(torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]), torch.tensor([1, 1, 1]))
    with loss.recording() as seen:
        model(packed, t, TextCond(torch.randn(3, 5, 8)))
    _, metrics = loss(seen, packed, owners, torch.tensor([False] * 3), t)
    assert metrics["early_things"] == pytest.approx(5 / 12)
    assert metrics["first_things"] == pytest.approx(3 / 12)
    right = (loss.heads["0"](seen["0"][0], packed).argmax(-1) == 0) & (owners.references == 0)
    assert metrics["early_things_right"] == pytest.approx(float(right[1:].sum()) / 12)
    assert metrics["first_things_right"] == pytest.approx(float(right[2].sum()) / 12)


def test_the_last_block_cannot_be_watched() -> None:
    with pytest.raises(ConfigError, match="below 2, got"):
        CorrespondenceLoss(Correspondence(blocks=(1, 2)), network(), seed=0)


def test_data_without_masks_are_refused(changed) -> None:
    config = changed(sections={"sft": SCENES["sft"] | {"train_text_encoder": False}})
    with pytest.raises(ConfigError, match="needs data with masks"):
        SFTTraining(replace(config, sft=replace(config.sft, train_text_encoder=True)))


def test_training_on_scenes_resumes_exactly_and_exports_no_head(changed, tmp_path, metrics, broken_off) -> None:
    config = changed(sections=SCENES | {"sft": TOKENS})
    whole = train(config, SFTOnScenes(config))
    again = replace(config, output=str(tmp_path / "broken"))
    resumed = broken_off(again, SFTOnScenes, after=5)
    assert metrics(again.output) == metrics(config.output)
    assert metrics(config.output)[0]["correspondence"] > 0
    assert metrics(config.output)[0]["token_pointer"] > 0
    assert metrics(config.output)[0]["early_things"] >= metrics(config.output)[0]["early_things_right"]
    file = "unipic_sft/transformer/diffusion_pytorch_model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    weights = open_transformer(whole / "unipic_sft").weights
    assert not [name for name in weights if "correspondence" in name]


def test_the_loss_of_single_tokens_is_added_and_changes_nothing_else(changed) -> None:
    without, both = (SFTOnScenes(changed(sections=SCENES | {"sft": sft})) for sft in (SCENES["sft"], TOKENS))
    (batch,) = without.batch(0).micro_batches
    with torch.no_grad():
        (less, plain), (more, metrics) = without.loss("student", batch), both.loss("student", batch)
    assert {name: value for name, value in metrics.items() if "token" not in name} == plain
    assert float((more - less).mean()) == pytest.approx(0.25 * metrics["token_pointer"], rel=1e-4)
    assert 0 < metrics["token_pointer_right"] < 1


def test_the_recipe_names_the_budgets_that_were_trained(changed) -> None:
    config = changed(sections=SCENES | {"data": SCENES["data"] | {"size": 160, "reference_budget": 96}})
    recipe = SFTOnScenes(config).student_recipe
    assert (recipe.output_budget, recipe.reference_budget) == (160, 96)
