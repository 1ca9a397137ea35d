"""The SFT trainer end to end in miniature: cache, joint training, resume, frozen text, export for the pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers import text_cache
from trainers.cache import Compositions, build, encode_rows, fingerprint, load_image_vae, read_cache
from trainers.config import ConfigError
from trainers.loop import train
from trainers.sft import SFTTraining, make_inputs
from trainers.text_cache import encoder_inputs
from unipic_core.pipeline import UniPicPipeline
from unipic_core.pipeline.text import TextEncoder


def metrics(output):
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]


def test_cached_inputs_are_what_the_pipeline_would_feed(run):
    """Encoder inputs from cached arrays equal `TextEncoder.prepare` on the same references as pictures."""
    text = TextEncoder.from_pretrained(run.options.model, dtype=torch.float32)
    rows = Compositions(run.options.data, 0, 6)
    row = next(r for r in (rows[i] for i in range(6)) if len(r.references) > 1)
    (bucket,) = encode_rows(load_image_vae(Path(run.options.model) / "vae"), [row]).values()
    ours = encoder_inputs(text, bucket, np.array([0]), [row.prompt])
    theirs = text.prepare([[Image.fromarray(r) for r in row.references]], [row.prompt])
    for key, value in theirs.items():
        assert torch.allclose(value.float(), ours[key].float(), atol=1e-5), key


def test_cache_is_complete_and_not_mixed(run):
    data = run.options.data
    assert sum(len(b) for b in read_cache(data).values()) == data.samples
    shard = Path(data.folder) / "shard-00001.safetensors"
    before, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    vae = load_image_vae(Path(run.options.model) / "vae")
    build(data, vae)
    assert shard.stat().st_mtime_ns == stamp
    shard.unlink()
    with pytest.raises(ConfigError, match="1 of 2 shards are missing"):
        read_cache(data)
    build(data, vae)
    assert shard.read_bytes() == before
    with pytest.raises(ConfigError, match="holds another set"):
        build(replace(data, seed=9), vae)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    with pytest.raises(ConfigError, match="holds another set"):
        build(data, vae)


def test_text_cache_notices_other_prompts_positions_and_weights(run):
    text = TextEncoder.from_pretrained(run.options.model, dtype=torch.float32)
    name, bucket = next(iter(read_cache(run.options.data).items()))
    keys = {text_cache._key(text, fingerprint(text.network), name, bucket)}
    keys.add(
        text_cache._key(
            text, fingerprint(text.network), name, replace(bucket, prompts=(*bucket.prompts[:-1], "another"))
        )
    )
    text.positions = "sequential"
    keys.add(text_cache._key(text, fingerprint(text.network), name, bucket))
    with torch.no_grad():
        text.network.get_input_embeddings().weight.copy_(text.network.get_input_embeddings().weight.flip(0))
    keys.add(text_cache._key(text, fingerprint(text.network), name, bucket))
    assert len(keys) == 4


def test_training_resumes_exactly_and_exports_a_pipeline(changed, tmp_path, monkeypatch):
    whole = train(changed(), SFTTraining(changed()))
    expected = metrics(whole.parent)

    config = replace(changed(), output=str(tmp_path / "broken"))
    method = SFTTraining(config)
    batch = method.batch

    def fails(step):
        if step == 5:
            raise KeyboardInterrupt
        return batch(step)

    method.batch = fails
    with pytest.raises(KeyboardInterrupt):
        train(config, method)
    resumed = train(config, SFTTraining(config))
    assert metrics(config.output) == expected
    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (resumed / part).read_bytes() == (whole / part).read_bytes()

    assert json.loads((resumed / "text_encoder" / "config.json").read_text())["unipic_positions"] == "multimodal"
    pipe = UniPicPipeline.from_pretrained(resumed, torch_dtype=torch.float32, device="cpu")
    red = Image.new("RGB", (96, 64), "red")
    out = pipe(images=[red, red], prompt="the object from image 1", num_inference_steps=2, true_cfg_scale=1.0)
    assert out.images[0].size[0] * out.images[0].size[1] <= 128 * 128


def test_frozen_encoder_gives_the_embeddings_of_the_live_one(changed):
    live, frozen = SFTTraining(changed()), SFTTraining(changed({"train_text_encoder": False}))
    frozen_again = SFTTraining(changed({"train_text_encoder": False}))
    for step in range(3):
        a, b, c = live.batch(step), frozen.batch(step), frozen_again.batch(step)
        with torch.no_grad():
            text = live.text.forward(a.text)
        assert torch.allclose(a.x0, b.x0)
        mask = torch.ones_like(text.embeds[..., 0], dtype=torch.bool) if text.mask is None else text.mask
        assert torch.allclose(text.embeds[mask], b.text.embeds[mask], atol=0.05)  # kept in bfloat16
        assert torch.equal(b.text.embeds, c.text.embeds)
    assert not any(n.startswith("encoder") for n, _ in frozen.model.named_parameters())


def test_learns_one_batch(changed):
    """The loss on one fixed batch falls well below that of predicting nothing (E|v|^2)."""
    config = changed()
    method = SFTTraining(config)
    batch = method.batch(0)
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss, _ = method.loss(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_inputs_pack_target_and_references(run):
    buckets = read_cache(run.options.data)
    bucket = next(b for b in buckets.values() if len(b.references) > 1)
    inputs = make_inputs(bucket, np.array([0]), None)
    packed = inputs.pack(inputs.x0)
    assert packed.num_target_tokens == 64
    assert len(packed.shapes[0]) == 1 + len(bucket.references)
    assert packed.tokens.shape[1] == sum(s.num_tokens for s in packed.shapes[0])
