"""A cache by many processes on one folder, embeddings in fp8 or made while training, and the space it will take."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.trainers.cache.small_sets import contents, write_rows
from tests.trainers.data.test_several_sources import plain
from tests.trainers.processes import launch
from trainers.cache import build, cached_samples, cached_shards, main, read_preview
from trainers.config.run import ConfigError, DataConfig, PreviewConfig, parse_run, to_dict
from trainers.data import cost, text_embeddings
from trainers.data.index import index_path
from trainers.data.parts import CachePart, part_named
from trainers.data.shards import Shard, write_shard
from trainers.data.text_embeddings import encoder_fingerprint, in_fp8, text_fingerprint
from trainers.loop.checkpointing import TrainingError
from trainers.loop.loop import train
from trainers.methods.sft import SFTTraining
from unipic_core.errors import CheckpointError
from unipic_core.pipeline.text_encoder import TextEncoder


def test_a_part_is_named_or_taken_from_the_launcher(monkeypatch):
    assert part_named("2/3") == CachePart(1, 3)
    assert part_named("2/3").of(range(8)) == [1, 4, 7]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert part_named(None) == CachePart(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert part_named(None) == CachePart(1, 4)
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="--part: expected i/n"):
            part_named(wrong)


@pytest.fixture
def configured(changed, tmp_path):
    """A config file over 9 rows in shards of 2, in a cache folder of this name."""

    def make(folder, **values):
        if not (tmp_path / "set").exists():
            write_rows(tmp_path / "set", 9)
        data = {"folder": str(tmp_path / folder), "kind": "jsonl", "path": str(tmp_path / "set" / "rows.jsonl")}
        data |= {"size": 64, "reference_budget": 64, "samples_per_shard": 2, "samples": 0, "workers": 2, **values}
        config = changed(sections={"sft": {"train_text_encoder": False}, "data": data}, batch_size=2, steps=2)
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(plain(to_dict(config))))
        return config, str(path)

    return make


def test_parts_make_what_one_process_makes(configured, tmp_path, capsys):
    _, whole = configured("whole")
    config, path = configured("parts")
    assert main([whole]) == 0
    assert main([path, "--part", "3/3"]) == 0
    assert main([path, "--part", "1/3"]) == 0
    assert not list(Path(config.data.folder).glob("index-*"))
    stray = tmp_path / "parts" / f".unipic.partial-{'f' * 8}{'0' * 24}.safetensors"
    stray.write_text("being written by another machine")
    assert main([path, "--part", "2/3"]) == 0
    assert stray.exists()
    stray.unlink()
    expected, found = contents(str(tmp_path / "whole")), contents(str(tmp_path / "parts"))
    indices = {name for name in expected if name.startswith("index-")}
    assert expected.keys() == found.keys()
    assert len(indices) == 1
    assert all(expected[name] == found[name] for name in expected.keys() - indices)
    assert sorted(p.name for p in (tmp_path / "parts").glob("report*")) == [
        f"report-part-{i}-of-3.json" for i in (1, 2, 3)
    ]
    assert main([path, "--part", "4/3"]) == 2
    assert "expected i/n" in capsys.readouterr().err


def test_a_part_that_is_started_twice_is_made_once(configured, tmp_path, monkeypatch):
    """The second run goes through all of it while the first has just loaded its text encoder."""
    _, path = configured("twice")
    load = TextEncoder.from_pretrained
    monkeypatch.setattr(TextEncoder, "from_pretrained", once(load, lambda: main([path])))
    assert main([path]) == 0
    _, alone = configured("alone")
    assert main([alone]) == 0
    expected, found = contents(str(tmp_path / "alone")), contents(str(tmp_path / "twice"))
    shards = [name for name in expected if not name.startswith("index-")]
    assert all(expected[name] == found[name] for name in shards)


def test_a_shard_that_is_replaced_while_it_is_read_is_never_mixed(configured, capsys, monkeypatch):
    """Its header says where tensors lie, and in the new file they lie elsewhere."""
    config, path = configured("mixed")
    encode = text_embeddings.encode_shard

    def late(text, shard, *rest):
        other = Shard(shard.path)
        write_shard(shard.path, {name: other.tensors[name] for name in other.table}, other.metadata)
        return encode(text, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(text_embeddings, "encode_shard", late)
        assert main([path]) == 2
    assert re.search(r"preview-\w+\.safetensors was replaced while it was read", capsys.readouterr().err)
    assert main([path]) == 0
    samples = cached_samples(config.data, text_fingerprint(Path(config.network.model)))[0]
    for shard in cached_shards(config.data):
        os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match="was written again since this run began"):
        samples.take(0)


def once(function, before):
    """The function, which calls `before` at its first call."""
    calls = []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            before()
        return function(*args, **kwargs)

    return called


def test_processes_of_a_launcher_take_their_parts(configured, tmp_path):
    _, whole = configured("whole")
    config, path = configured("launched")
    assert main([whole]) == 0
    launch(2, "-m", "trainers.cache", path)
    assert len(cached_shards(config.data)) == 5
    expected, found = contents(str(tmp_path / "whole")), contents(str(tmp_path / "launched"))
    shards = [name for name in expected if not name.startswith("index-")]
    assert all(expected[name] == found[name] for name in shards)


def test_size_and_hours_are_said_first(configured, capsys, monkeypatch):
    monkeypatch.setattr(cost, "LEAST_ROWS", 4)
    monkeypatch.setattr("trainers.cache.LEAST_ROWS", 4)
    config, path = configured("said")
    assert main([path]) == 0
    said = capsys.readouterr().out
    assert re.search(r"9 rows: at most 0\.0\d\d GB in .*said, where .* are free", said)
    assert re.search(r"latents: 9 rows at [\d.]+ rows a second, measured, take 0\.00 hours", said)
    used = sum(p.stat().st_size for p in Path(config.data.folder).glob("*-0*.safetensors"))
    width = cost.text_width(Path(config.network.model))
    assert used < 9 * cost.row_bytes(config.data, width) + 5 * 4096  # headers aside
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    cost.announce(config.data, 9, width)
    assert "warning: that may not fit" in capsys.readouterr().out


def test_a_million_rows_of_the_released_size_take_terabytes(configured):
    config, _ = configured("large", size=1024, reference_budget=1024)
    one = cost.row_bytes(config.data, cost.RELEASED_TEXT_WIDTH)
    assert one == 2 * 2 * 16 * 128**2 + (1024 + 256) * 2 * 3584
    rounded = replace(config.data, reference_budget=1000)  # references have sides of multiples of 32
    assert cost.row_bytes(rounded, 1) == cost.row_bytes(replace(config.data, reference_budget=992), 1)
    assert cost.row_bytes(replace(config.data, text_storage="fp8"), cost.RELEASED_TEXT_WIDTH) < 0.56 * one


# --- fp8 and live ----------------------------------------------------------------------------------------------------


def test_embeddings_in_fp8_and_their_error(jsonl, vae, text, capsys):
    data = replace(jsonl, text_storage="fp8")
    build(jsonl, vae, text, PreviewConfig(samples=2))
    exact_samples = cached_samples(jsonl, encoder_fingerprint(text))[0]
    exact = [exact_samples.take(row) for row in range(len(exact_samples))]  # the second build writes shards again
    build(data, vae, text, PreviewConfig(samples=2))
    said = re.search(r"fp8 changes the text embeddings by ([\d.]+)% of their norm", capsys.readouterr().out)
    assert 0 < float(said[1]) < 4
    stored = cached_samples(data, encoder_fingerprint(text))[0]
    for row, a in enumerate(exact):
        b = stored.take(row)
        for x, y in ((a.cond, b.cond), (a.uncond, b.uncond)):
            assert float((x.embeds - y.embeds).norm() / x.embeds.norm()) < 0.04
    assert len(read_preview(data, PreviewConfig(samples=2), encoder_fingerprint(text))) == 2


def test_the_error_of_fp8_is_measured():
    embeds = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    tensors = {"a/embeds": embeds.clone(), "a/uncond": torch.zeros(2, 3, 64)}
    error = in_fp8(tensors)
    restored = tensors["a/embeds"].float() * tensors["a/embeds_scale"]
    assert error == pytest.approx(float((restored - embeds).norm() / embeds.norm()), rel=1e-5)
    assert 0.005 < error < 0.04


def test_text_that_is_encoded_live_trains_the_same(configured, metrics, tmp_path):
    cached, path = configured("cached")
    live, live_path = configured("live", text_storage="live")
    assert main([path]) == main([live_path]) == 0
    assert not list(Path(live.data.folder).glob("text-*"))
    runs = [parse_run({**to_dict(c), "output": str(tmp_path / name)}) for c, name in ((cached, "a"), (live, "b"))]
    for run in runs:
        train(run, SFTTraining(run))
    for a, b in zip(*(metrics(run.output) for run in runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # the cache rounds to bfloat16


# --- other rows ------------------------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_rows(configured, tmp_path):
    config, path = configured("other")
    assert main([path]) == 0
    train(config, SFTTraining(config))
    more = parse_run({**to_dict(config), "steps": 4})
    picture = tmp_path / "set" / "images" / "t0.png"
    os.replace(tmp_path / "set" / "images" / "t2.png", picture)
    (tmp_path / "set" / "images" / "t2.png").write_bytes((tmp_path / "set" / "images" / "t4.png").read_bytes())
    assert main([path]) == 0
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    assert report["rows"] == 9
    with pytest.raises(TrainingError, match="was trained on other rows than its cache holds now"):
        train(more, SFTTraining(more), ["steps"])
    train(more, SFTTraining(more), ["steps", "data"])


def test_duplicates_are_counted(configured, tmp_path, capsys):
    config, path = configured("twice")
    rows = tmp_path / "set" / "rows.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    assert main([path]) == 0
    assert "1 of 10 rows are the same as an earlier one" in capsys.readouterr().out
    assert json.loads((Path(config.data.folder) / "report.json").read_text())["duplicates"] == 1


def test_another_root_of_pictures_is_noticed(configured, tmp_path):
    config, path = configured("root")
    assert main([path]) == 0
    moved = replace(config.data, images=str(tmp_path / "set"))
    with pytest.raises(ConfigError, match=r"was made with data.images None, not .*set"):
        cached_shards(moved)
    assert index_path(Path(config.data.folder), "x").name == "index-x.safetensors"


def test_other_folders_of_references_are_noticed(tmp_path, vae):
    for name in ("set/a.png", "set/one/a.png", "set/two/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "set" / "a.txt").write_text("a prompt")
    data = DataConfig(str(tmp_path / "cache"), "folder", str(tmp_path / "set"), size=64, controls=("one",))
    build(data, vae, None)
    assert cached_shards(data)
    for other in (("two",), ("one", "two"), ()):
        with pytest.raises(ConfigError, match=r"was made with data.controls \['one'\], not"):
            cached_shards(replace(data, controls=other))
