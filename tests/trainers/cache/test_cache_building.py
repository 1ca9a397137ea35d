"""Building a cache: resumable, never stale, bad rows left out once."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trainers.cache as cache
from tests.trainers.cache.small_sets import contents, opened, picture, write_rows
from trainers.cache import build, load_image_vae
from trainers.config.run import ConfigError, DataConfig, PreviewConfig
from trainers.data import shards
from trainers.data.shards import Shard, text_path
from trainers.data.text_embeddings import encoder_fingerprint
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.weights import write as writing

# --- resumable --------------------------------------------------------------------------------------------------------


def test_building_again_makes_what_is_missing_and_nothing_else(jsonl, vae, text):
    build(jsonl, vae, text, PreviewConfig(samples=2))
    before = contents(jsonl.folder)
    assert len(before) == 3 + 3 + 2
    stamps = {p: p.stat().st_mtime_ns for p in Path(jsonl.folder).glob("*.safetensors")}
    build(jsonl, vae, text, PreviewConfig(samples=2))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    name = encoder_fingerprint(text)
    for gone in ("shard-00001.safetensors", f"text-{name}-00002.safetensors"):
        (Path(jsonl.folder) / gone).unlink()
        with pytest.raises(ConfigError, match="run python -m trainers.cache"):
            opened(jsonl, name)
        build(jsonl, vae, text, PreviewConfig(samples=2))
        assert contents(jsonl.folder) == before
    Path(jsonl.folder, "shard-00000.safetensors").write_bytes(before["shard-00000.safetensors"][:200])
    build(jsonl, vae, text, PreviewConfig(samples=2))
    assert contents(jsonl.folder) == before


def _build_and_die(data: DataConfig, folder: Path, writes: int) -> None:
    """Kill -9 in the middle of the file after so many."""
    torch.set_num_threads(1)
    original, done = shards.write_safetensors, []

    def half(partial, *_):
        partial.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path, announced, tensors, metadata):
        if len(done) == writes:
            writing.write_tensors = half
        done.append(path)
        original(path, announced, tensors, metadata)

    shards.write_safetensors = write
    build(data, load_image_vae(folder / "vae"), TextEncoder.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("writes", [1, 4, 6])
def test_goes_on_after_kill_9(jsonl, folder, vae, text, tmp_path, writes):
    """Between latents, between texts, and while the pictures are taken out of a shard."""
    whole = replace(jsonl, folder=str(tmp_path / "whole"))
    build(whole, vae, text)
    process = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(jsonl, folder, writes))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(Path(jsonl.folder).glob("*.partial-*"))) == 1
    build(jsonl, vae, text)
    assert contents(jsonl.folder) == contents(whole.folder)
    assert not list(Path(jsonl.folder).glob("*.partial-*"))


def test_workers_make_the_same_cache(jsonl, vae, text, tmp_path):
    Path(jsonl.path).parent.joinpath("images/t4.png").unlink()
    build(jsonl, vae, text)
    two = replace(jsonl, folder=str(tmp_path / "two"), workers=2)
    build(two, vae, text)
    assert contents(two.folder) == contents(jsonl.folder)


# --- never stale ------------------------------------------------------------------------------------------------------


def test_another_set_or_vae_is_not_mixed_in(nano, vae, text, jsonl):
    with pytest.raises(ConfigError, match="holds another data set"):
        build(replace(nano, seed=9), vae, None)
    with pytest.raises(ConfigError, match="seed: expected 9, got 0"):
        opened(replace(nano, seed=9))
    with pytest.raises(ConfigError, match="kind: expected jsonl, got nano"):
        opened(replace(jsonl, folder=nano.folder))
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    with pytest.raises(ConfigError, match="holds another data set"):
        build(nano, vae, None)
    assert opened(nano)


def test_training_on_rows_that_the_cache_was_not_made_of_is_refused(jsonl, vae, tmp_path):
    """Another file, or another number of rows; building again with what is asked for mends it."""
    build(jsonl, vae, None)
    other = replace(jsonl, path=str(write_rows(tmp_path / "other", 4)))
    for asked, message in ((other, "was made with data.path"), (replace(jsonl, samples=2), "data.samples 0, not 2")):
        with pytest.raises(ConfigError, match=rf"{message}.*run python -m trainers.cache"):
            opened(asked)
        build(asked, vae, None)
        assert len(opened(asked)) == (asked.samples or 4)


def first_sample(data, text):
    samples = opened(data, text)
    return samples.take(samples.first_row("64x64"))


def test_another_encoder_has_embeddings_of_its_own(jsonl, vae, folder):
    text = TextEncoder.from_pretrained(folder, dtype=torch.float32)
    build(jsonl, vae, text)
    first, second = encoder_fingerprint(text), ""
    before = first_sample(jsonl, first)
    text.positions = "sequential"
    second = encoder_fingerprint(text)
    with pytest.raises(ConfigError, match="no text embeddings of this encoder; run python -m trainers.cache"):
        opened(jsonl, second)
    with torch.no_grad():
        text.network.get_input_embeddings().weight.mul_(2)
    third = encoder_fingerprint(text)
    build(jsonl, vae, text)  # the pictures had been dropped: the shards are made again
    assert len({first, second, third}) == 3
    after = first_sample(jsonl, third)
    assert not torch.allclose(before.cond.embeds, after.cond.embeds)
    assert torch.equal(first_sample(jsonl, first).cond.embeds, before.cond.embeds)


@pytest.mark.parametrize("change", ["prompt", "picture", "more rows"])
def test_changed_rows_are_encoded_again_and_only_they(jsonl, vae, text, change):
    build(jsonl, vae, text)
    before, name = contents(jsonl.folder), encoder_fingerprint(text)
    path = Path(jsonl.path)
    if change == "prompt":
        path.write_text(path.read_text().replace("row 4", "another"))
    elif change == "picture":
        picture(path.parent / "images/t4.png", (64, 128), seed=77)
    else:
        write_rows(path.parent, 8)
    build(jsonl, vae, text)
    after = contents(jsonl.folder)
    index = "00002" if change == "more rows" else "00001"
    assert {n for n in after if after[n] != before.get(n)} == {
        f"shard-{index}.safetensors",
        f"text-{name}-{index}.safetensors",
    }
    assert len(opened(jsonl, name)) == (8 if change == "more rows" else 7)


def test_text_of_other_latents_is_refused(jsonl, vae, text):
    """A shard of text that lies beside latents of other prompts or pictures, wherever it came from."""
    build(jsonl, vae, text)
    name = encoder_fingerprint(text)
    first, second = (text_path(Path(jsonl.folder) / f"shard-0000{i}.safetensors", name) for i in range(2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=r"shard-00001.*no text embeddings"):
        opened(jsonl, name)
    build(jsonl, vae, text)
    assert opened(jsonl, name)


def test_caches_of_the_first_version_remain_readable(nano, vae, text, tmp_path):
    """Their shards say nothing of rows and text; the text is then tied to what they hold."""
    data = replace(nano, folder=str(tmp_path))
    (tmp_path / "set.json").write_text(Path(nano.folder, "set.json").read_text())
    for path in sorted(Path(nano.folder).glob("shard-*")):
        shard = Shard(path)
        tensors = {name: shard.tensors[name] for name in shard.table}
        shards.write_shard(tmp_path / path.name, tensors, {"prompts": shard.prompts})
    before = contents(data.folder)
    assert len(opened(data)) == data.samples
    build(data, vae, text)
    after = contents(data.folder)
    assert {n: after[n] for n in before} == before
    assert {n: after[n] for n in after if n.startswith("text-")} == {
        n: b for n, b in contents(nano.folder).items() if n.startswith("text-") and "preview" not in n
    }


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_rows_that_fail_are_left_out_once_and_for_all(jsonl, vae, text, monkeypatch, capsys):
    """One that the header shows, and one that only decoding shows, which is not tried again."""
    images = Path(jsonl.path).parent / "images"
    (images / "t2.png").write_text("no picture")
    (images / "t4.png").write_bytes((images / "t4.png").read_bytes()[:-3000])
    build(jsonl, vae, text)
    assert "2 of 7 rows are skipped, first line 3: t2.png cannot be read as a picture" in capsys.readouterr().out
    listed = json.loads(Path(jsonl.folder, "report.json").read_text())
    assert (listed["rows"], listed["used"]) == (7, 5)
    assert [(s["row"], s["name"]) for s in listed["skipped"]] == [(2, "line 3"), (4, "line 5")]
    assert "truncated" in listed["skipped"][1]["reason"]
    assert len(opened(jsonl, encoder_fingerprint(text))) == 5
    monkeypatch.setattr(cache, "encode_shard", lambda *_: pytest.fail("tried again"))
    build(jsonl, vae, text)
    assert json.loads(Path(jsonl.folder, "report.json").read_text()) == listed
    monkeypatch.undo()
    picture(images / "t2.png", (64, 64))  # mended
    build(jsonl, vae, text)
    assert len(opened(jsonl, encoder_fingerprint(text))) == 6


def test_all_rows_failing_to_decode_is_an_error(jsonl, vae):
    for path in Path(jsonl.path).parent.glob("images/t*.png"):
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ConfigError, match="no row of"):
        build(jsonl, vae, None)
    with pytest.raises(ConfigError, match="holds no sample"):
        opened(jsonl)
