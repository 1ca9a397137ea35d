"""The index of a cache: it gives the rows that the shards hold, notices changes, and opens a large set quickly."""

import os
from pathlib import Path

import pytest
import torch

from trainers.cache import build, cached_shards, read_cache
from trainers.data import index as index_module
from trainers.data.index import index_path, open_index
from trainers.data.text_embeddings import encoder_fingerprint
from unipic_core.errors import CheckpointError


@pytest.fixture
def built(jsonl, vae, text):
    build(jsonl, vae, text)
    return jsonl


def opened(data, name):
    return open_index(Path(data.folder), cached_shards(data), name)


def test_rows_are_those_of_the_buckets(built, text):
    name = encoder_fingerprint(text)
    samples, row = opened(built, name), 0
    for bucket in read_cache(built, name).values():
        for i in range(len(bucket)):
            mine, theirs = samples.take(row), bucket.take([i])
            assert mine.prompts == theirs.prompts
            for a, b in zip((mine.target, *mine.references), (theirs.target, *theirs.references), strict=True):
                assert torch.equal(a, b)
            assert torch.equal(mine.cond.embeds, theirs.cond.embeds)
            assert torch.equal(mine.uncond.embeds, theirs.uncond.embeds)
            assert samples.lengths.target[row] == bucket.num_target_tokens
            assert samples.lengths.pictures[row] == bucket.num_picture_tokens
            assert samples.lengths.text[row] == bucket.text_lengths[i]
            assert samples.num_references[row] == len(theirs.references)
            row += 1
    assert len(samples) == row == 7
    with pytest.raises(IndexError):
        samples.take(7)


def test_rows_for_an_encoder_that_trains_bring_pictures(nano):
    samples, row = opened(nano, None), 0
    for bucket in read_cache(nano).values():
        for i in range(len(bucket)):
            mine, theirs = samples.take(row), bucket.take([i])
            assert all(torch.equal(a, b) for a, b in zip(mine.vision, theirs.vision, strict=True))
            assert len(mine.vision) == len(theirs.references)
            row += 1


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


def test_a_shard_that_became_shorter_is_named(built, text):
    samples = opened(built, encoder_fingerprint(text))
    for path in cached_shards(built):
        os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="shorter than when it was indexed"):
        samples.take(0)
