"""What a cache holds: what the pipeline would have fed, read row by row."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainers.cache.small_sets import contents, embeddings, opened
from trainers.cache import build, fingerprint
from trainers.config.run import ConfigError
from trainers.data.sources import Compositions
from trainers.data.text_embeddings import UNCOND_PROMPT, encoder_fingerprint, encoder_inputs, text_fingerprint
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.weights.formats.safetensors_file import read_safetensors

# --- what is in it ----------------------------------------------------------------------------------------------------


def row_with_prompt(samples, prompt):
    return next(rows for rows in map(samples.take, range(len(samples))) if rows.prompts == (prompt,))


def test_encoder_inputs_are_what_the_pipeline_would_feed(nano, text):
    """From cached arrays as from pictures, and the cached latents' shapes go with them."""
    scenes = Compositions(nano, 0, 6)
    row = next(r for r in (scenes[i] for i in range(6)) if len(r.references) > 1)
    cached = row_with_prompt(opened(nano), row.prompt)
    ours = encoder_inputs(text, cached, [row.prompt])
    theirs = text.prepare([[Image.fromarray(r) for r in row.references]], [row.prompt])
    for key, value in theirs.items():
        assert torch.allclose(value.float(), ours[key].float(), atol=1e-5), key
    assert [r.shape[-2] * 8 for r in cached.references] == [r.shape[0] for r in row.references]
    without = text.prepare([[]], ["a text alone"])
    alone = encoder_inputs(text, replace(cached, vision=()), ["a text alone"])
    assert all(torch.equal(without[key], alone[key]) for key in without)


def test_embeddings_are_those_of_the_live_encoder(nano, text):
    """With the prompt and with " ", though the start that both share is stored once."""
    frozen, live = opened(nano, encoder_fingerprint(text)), opened(nano)
    assert len(frozen) == len(live) == nano.samples
    for row in range(len(frozen)):
        rows, pictures = frozen.take(row), live.take(row)
        assert rows.vision == ()
        assert rows.prompts == pictures.prompts
        assert torch.equal(rows.target, pictures.target)
        for cond, prompts in ((rows.cond, rows.prompts), (rows.uncond, [UNCOND_PROMPT])):
            with torch.no_grad():
                expected = text.forward(encoder_inputs(text, pictures, prompts))
            for ours, theirs in zip(embeddings(cond), embeddings(expected), strict=True):
                assert ours.shape == theirs.shape
                assert torch.allclose(ours, theirs, atol=0.03, rtol=0.01)  # kept in bfloat16


def test_latents_are_those_of_the_vae(nano, vae):
    row = Compositions(nano, 0, 1)[0]
    rows = row_with_prompt(opened(nano), row.prompt)
    pixels = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for p in (row.target, *row.references)]
    with torch.no_grad():
        expected = [vae.encode(p)[:, :, 0] for p in pixels]
    for ours, theirs in zip((rows.target, *rows.references), expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, atol=0.03, rtol=0.01)


def test_fingerprint_is_of_what_embeddings_depend_on(folder, text, tmp_path):
    """Of a folder as of a module, in any type; another with other weights, positions or words."""
    name = encoder_fingerprint(text)
    assert text_fingerprint(folder) == name
    half = TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert encoder_fingerprint(half) == name
    half.model.bfloat16().save_pretrained(tmp_path / "text_encoder")
    half.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert text_fingerprint(tmp_path) == name

    names = {name}
    half.positions = "sequential"
    names.add(encoder_fingerprint(half))
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({**config, "unipic_positions": "sequential"}))
    assert text_fingerprint(tmp_path) == encoder_fingerprint(half)
    with torch.no_grad():
        half.network.get_input_embeddings().weight[5] += 1
    names.add(encoder_fingerprint(half))
    half.tokenizer.add_tokens(["zebra"])
    names.add(encoder_fingerprint(half))
    half.model.config.vision_config.fullatt_block_indexes = [0]
    names.add(encoder_fingerprint(half))
    assert len(names) == 5


def test_fingerprint_of_a_module_ignores_its_type(vae):
    name = fingerprint(vae)
    assert fingerprint(vae.bfloat16()) == name
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    assert fingerprint(vae) != name


# --- lazy -------------------------------------------------------------------------------------------------------------


def test_opening_reads_no_tensor(nano, text, tmp_path):
    """What is written into the files after they were opened is what `take` gives: nothing had been copied."""
    for path in Path(nano.folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    samples = opened(replace(nano, folder=str(tmp_path)), encoder_fingerprint(text))
    assert len(samples) == nano.samples
    assert (samples.lengths.target == 64).all()
    for path in tmp_path.glob("*-0*.safetensors"):
        first, before = min(spec.offset for spec in read_safetensors(path)[0].values()), path.stat()
        with open(path, "r+b") as file:
            file.seek(first)
            file.write(b"\0" * (before.st_size - first))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a file that was written again is refused
    for rows in map(samples.take, range(len(samples))):
        for tensor in (rows.target, *rows.references, rows.cond.embeds, rows.uncond.embeds):
            assert not tensor.any()


def test_an_open_cache_gives_what_it_held(jsonl, vae, text):
    """Though its files are written again, with other offsets, under a run."""
    build(jsonl, vae, None)
    samples = opened(jsonl)
    before = [samples.take(row) for row in range(len(samples))]
    build(jsonl, vae, text)
    for row, rows in enumerate(before):
        again = samples.take(row)
        assert torch.equal(again.target, rows.target)
        assert all(map(torch.equal, again.vision, rows.vision))


# --- what is kept -----------------------------------------------------------------------------------------------------


def size_of_shards(data):
    return sum(len(content) for name, content in contents(data.folder).items() if not name.startswith("index-"))


def test_pictures_are_kept_for_an_encoder_that_trains_along(jsonl, vae, text):
    build(jsonl, vae, text)
    with pytest.raises(ConfigError, match=r"holds no pictures.*run python -m trainers.cache"):
        opened(jsonl)
    small = size_of_shards(jsonl)
    build(jsonl, vae, None)
    samples = opened(jsonl)
    for name in samples.buckets:
        rows = samples.take(samples.first_row(name))
        assert len(rows.vision) == len(rows.references) == name.count("_")
    assert size_of_shards(jsonl) > small
    build(jsonl, vae, text)
    assert size_of_shards(jsonl) == small
