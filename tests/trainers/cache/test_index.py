"""The index of a cache: it gives the rows that the shards hold, notices changes, and opens a large set quickly."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.trainers.cache.small_sets import opened, rows_of
from trainers.cache import build, cached_shards
from trainers.data import index as index_module
from trainers.data.index import index_path
from trainers.data.text_embeddings import encoder_fingerprint
from unipic_core.errors import CheckpointError


@pytest.fixture
def built(jsonl, vae, text):
    build(jsonl, vae, text)
    return jsonl


def stored(data, kind):
    """What the safetensors library reads of a cache's files of one kind: [(tensors, metadata of JSON)]."""
    files = []
    for path in sorted(Path(data.folder).glob(f"{kind}-0*")):
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
            files.append(({name: file.get_tensor(name) for name in file.keys()}, metadata))  # noqa: SIM118
    return files


def test_rows_are_those_of_the_shards(built, text):
    name = encoder_fingerprint(text)
    samples, expected = opened(built, name), []
    for (latents, told), (words, lengths) in zip(stored(built, "shard"), stored(built, f"text-{name}"), strict=True):
        for shapes, prompts in told["prompts"].items():
            texts = words[f"{shapes}/embeds"].split(lengths["lengths"][shapes])
            for i, prompt in enumerate(prompts):
                pictures = [latents[f"{shapes}/reference_{j}"][i] for j in range(shapes.count("_"))]
                uncond = torch.cat([texts[i][: lengths["shared"][shapes]], words[f"{shapes}/uncond"][i]])
                expected.append((shapes, prompt, [latents[f"{shapes}/target"][i], *pictures], texts[i], uncond))
    expected.sort(key=lambda row: row[0])
    assert len(samples) == len(expected) == 7
    for row, (shapes, prompt, pictures, cond, uncond) in enumerate(expected):
        mine = samples.take(row)
        assert row in rows_of(samples, shapes)
        assert mine.prompts == (prompt,)
        for a, b in zip((mine.target, *mine.references), pictures, strict=True):
            assert torch.equal(a, b.float()[None])
        assert torch.equal(mine.cond.embeds, cond.float()[None])
        assert torch.equal(mine.uncond.embeds, uncond.float()[None])
        tokens = [p.shape[1] * p.shape[2] // 4 for p in pictures]
        assert (samples.lengths.target[row], samples.lengths.pictures[row]) == (tokens[0], sum(tokens))
        assert samples.lengths.text[row] == len(cond)
        assert samples.num_references[row] == len(pictures) - 1
    with pytest.raises(IndexError, match="expected a sample from 0 to 6"):
        samples.take(7)


def test_rows_for_an_encoder_that_trains_bring_pictures(nano):
    samples = opened(nano)
    for latents, told in stored(nano, "shard"):
        for shapes, prompts in told["prompts"].items():
            of_shapes = [samples.take(row) for row in rows_of(samples, shapes)]
            for i, prompt in enumerate(prompts):
                (mine,) = (rows for rows in of_shapes if rows.prompts == (prompt,))
                assert len(mine.vision) == shapes.count("_")
                for j, picture in enumerate(mine.vision):
                    assert torch.equal(picture[0], latents[f"{shapes}/vision_{j}"][i])


def test_it_is_built_once_and_again_when_a_shard_changes(built, text, monkeypatch):
    name, built_again = encoder_fingerprint(text), []
    real = index_module.build_index
    monkeypatch.setattr(index_module, "build_index", lambda *a: built_again.append(1) or real(*a))
    before = opened(built, name)
    assert index_path(Path(built.folder), name).exists()
    opened(built, name)
    assert len(built_again) == 1
    shard = cached_shards(built)[0]
    os.utime(shard, ns=(1, 1))
    assert opened(built, name).contents == before.contents
    assert len(built_again) == 2
    index_path(Path(built.folder), name).write_bytes(b"torn")
    opened(built, name)
    assert len(built_again) == 3


def test_a_folder_that_cannot_be_written_serves_too(built, text, monkeypatch):
    def refuses(*_args, **_kwargs):
        raise CheckpointError("read only")

    monkeypatch.setattr(index_module, "replacing", refuses)
    assert len(opened(built, encoder_fingerprint(text))) == 7


@pytest.mark.parametrize(("opens", "message"), [(True, "shorter than when it was indexed"), (False, "written again")])
def test_a_shard_that_became_shorter_is_named(built, text, opens, message):
    samples = opened(built, encoder_fingerprint(text))
    if opens:
        [samples.take(row) for row in range(len(samples))]
    for path in cached_shards(built):
        os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=message):
        [samples.take(row) for row in range(len(samples))]
