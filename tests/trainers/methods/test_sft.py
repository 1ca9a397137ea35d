"""The SFT trainers end to end in miniature: joint training, resume, frozen text, adapters, export for the pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainers.cache import cached_samples, read_preview
from trainers.data.text_embeddings import text_fingerprint
from trainers.loop.loop import train
from trainers.methods.inputs import make_inputs
from trainers.methods.sft import SFTTraining
from trainers.methods.sft_text import SFTWithText
from unipic_core.pipeline import UniPicPipeline
from unipic_core.weights.lora import read_lora
from unipic_core.weights.recipe import Recipe

FROZEN = {"sft": {"train_text_encoder": False}}


def test_training_resumes_exactly_and_exports_a_pipeline(changed, tmp_path, metrics, broken_off):
    whole = train(changed(), SFTWithText(changed()))
    expected = metrics(whole.parent)

    config = replace(changed(), output=str(tmp_path / "broken"))
    resumed = broken_off(config, SFTWithText, after=5)
    assert metrics(config.output) == expected
    parts = [f.relative_to(whole) for f in whole.rglob("*.safetensors")]
    assert {f.parent.name for f in parts} >= {"transformer", "text_encoder", "vae"}
    for part in parts:
        assert (resumed / part).read_bytes() == (whole / part).read_bytes(), part

    folder = resumed / "unipic_sft"
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["unipic_positions"] == "multimodal"
    assert Recipe.read(folder).made["method"] == "sft"
    pipe = UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")
    red = Image.new("RGB", (96, 64), "red")
    out = pipe(images=[red, red], prompt="the object from image 1", num_inference_steps=2, true_cfg_scale=1.0)
    assert out.images[0].size[0] * out.images[0].size[1] <= 128 * 128


def rows_of(batch, method):
    """Row -> its latents and its text, of all pieces."""
    found = {}
    for piece in batch.micro_batches:
        with torch.no_grad():
            cond = method.text.forward(piece.encoder_inputs) if isinstance(method, SFTWithText) else piece.cond
        for i, row in enumerate(piece.rows):
            words = cond.embeds[i] if cond.mask is None else cond.embeds[i][cond.mask[i]]
            found[row] = piece.x0[i], words
    return found


def test_a_batch_of_mixed_rows_has_the_losses_of_its_rows_alone(changed):
    """Whatever is beside them, and in whichever pieces they are computed."""
    method = SFTTraining(changed(sections=FROZEN, batch_size=8))
    batch = method.batch(3)
    assert sorted(row for piece in batch.micro_batches for row in piece.rows) == sorted(method.order[3].tolist())
    assert len({shapes for piece in batch.micro_batches for shapes in piece.latents.shapes}) > 1
    rows = [row for piece in batch.micro_batches for row in piece.rows]
    together = method.micro_batch(method.samples, rows, 3, method.prompt_dropout)
    assert together.latents.mask is not None
    losses = dict(zip(together.rows, method.loss("student", together)[0].tolist(), strict=True))
    for piece in batch.micro_batches:
        for row, loss in zip(piece.rows, method.loss("student", piece)[0].tolist(), strict=True):
            assert loss == pytest.approx(losses[row], abs=1e-6)
        alone = method.loss("student", method.micro_batch(method.samples, piece.rows[:1], 3, method.prompt_dropout))[0]
        assert float(alone) == pytest.approx(losses[piece.rows[0]], abs=1e-6)


def test_frozen_encoder_gives_the_embeddings_of_the_live_one(changed):
    live, frozen = SFTWithText(changed()), SFTTraining(changed(sections=FROZEN))
    live.prompt_dropout = frozen.prompt_dropout = 0.5
    for step in range(4):
        ours, theirs = (rows_of(method.batch(step), method) for method in (live, frozen))
        assert ours.keys() == theirs.keys()
        for row, (x0, embeds) in ours.items():
            assert torch.equal(x0, theirs[row][0])
            assert torch.allclose(embeds, theirs[row][1], atol=0.05)  # kept in bfloat16
    assert not any(n.startswith("encoder") for n, _ in frozen.trained("student"))


def test_guided_samples_of_a_training_encoder_see_both_branches(changed):
    """The unconditional branch is encoded for samples, as the frozen encoder's lies in the cache."""
    live, frozen = (
        make(changed(sections={**sections, "preview": {"samples": 2, "steps": 2, "guidance": 4.0}}))
        for make, sections in ((SFTWithText, {}), (SFTTraining, FROZEN))
    )
    row = read_preview(live.data, live.preview_config, live.encoder)[0].rows
    kept = read_preview(frozen.data, frozen.preview_config, frozen.encoder)[0].rows
    with torch.no_grad():
        made = live.sample("ema", live.sample_inputs(row), 0)
        wanted = frozen.sample("ema", frozen.sample_inputs(kept), 0)
        live.preview_config = replace(live.preview_config, guidance=1.0)
        unguided = live.sample("ema", live.sample_inputs(row), 0)
    assert torch.allclose(made, wanted, atol=0.05)  # the cache is in bfloat16
    assert not torch.allclose(made, unguided, atol=0.05)


def test_learns_one_batch(changed):
    """The loss on one fixed batch falls well below that of predicting nothing (E|v|^2)."""
    method = SFTWithText(changed())
    batch = method.batch(0).micro_batches[0]
    optimizer = torch.optim.AdamW([p for _, p in method.trained("student")], lr=2e-3)
    losses = []
    for _ in range(40):
        loss = method.loss("student", batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_adapter_can_be_fine_tuned(changed):
    """A LoRA on frozen weights; what is exported opens, and says how it was made."""
    sections = {**FROZEN, "network": {"adapter": {"rank": 2, "alpha": 4.0}}}
    export = train(changed(sections=sections, steps=3), SFTTraining(changed(sections=sections, steps=3)))
    lora = read_lora(export / "unipic_sft.safetensors")
    (early,) = (export.parent / "checkpoints" / "step-0000003").glob("*.safetensors")
    assert early.read_bytes() == (export / "unipic_sft.safetensors").read_bytes()
    report = json.loads((export.parent / "data.json").read_text())
    assert (report["rows"], report["repeated_in_step"]) == (48, 0)
    assert report["padding_share"] <= 0.05
    assert lora.recipe is not None
    assert lora.recipe.made["method"] == "sft"
    assert lora.recipe.steps is None  # sampled as its base is
    assert lora.ranks == (2,)


def test_inputs_pack_target_and_references(run):
    (samples,) = cached_samples(run.data, text_fingerprint(Path(run.network.model)))
    rows = samples.take(int(samples.num_references.argmax()))
    assert len(rows.references) > 1
    packed = make_inputs(rows).latents
    assert packed.num_target_tokens == 64
    assert len(packed.shapes[0]) == 1 + len(rows.references)
    assert packed.tokens.shape[1] == sum(s.num_tokens for s in packed.shapes[0])
