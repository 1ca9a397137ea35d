"""The cache in miniature: complete, resumable, never stale, read row by row, and what the pipeline would have fed."""

import gc
import json
import multiprocessing
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trainers.cache as cache
from trainers.batches import BucketOrder
from trainers.cache import build, fingerprint, load_image_vae, main, read_cache, read_preview
from trainers.config import ConfigError, DataConfig, PreviewConfig, PreviewSample
from trainers.data import shards
from trainers.data.shards import Shard, text_path
from trainers.data.sources import Compositions
from trainers.nano import write_folder
from trainers.text_cache import UNCOND_PROMPT, encoder_fingerprint, encoder_inputs, text_fingerprint
from trainers.vae import save_vae
from unipic_core.image_vae import ImageVAE, VAEConfig
from unipic_core.pipeline.text import TextEncoder
from unipic_core.sequence import TextCond
from unipic_core.tensor_files import read_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory, subset_only) -> Path:
    """An untrained miniature of a pipeline folder."""
    place = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
    save_vae(vae, torch.randn(4, 3, 64, 64), place / "vae")
    write_folder(place / "vae", place / "init", seed=0, corpus_size=200)
    return place / "init"


@pytest.fixture
def vae(folder) -> ImageVAE:
    return load_image_vae(folder / "vae")


@pytest.fixture(scope="module")
def text(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def nano(folder, text, tmp_path_factory) -> DataConfig:
    """A whole cache of the composition set, which no test changes."""
    place = str(tmp_path_factory.mktemp("nano-cache"))
    data = DataConfig(folder=place, samples=12, samples_per_shard=6, workers=0)
    build(data, load_image_vae(folder / "vae"), text, PreviewConfig(samples=3))
    return data


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_rows(place: Path, count: int) -> Path:
    """JSONL with 0, 1 or 2 references and two shapes of targets."""
    lines = []
    for i in range(count):
        references = [f"images/r{i}_{j}.png" for j in range(i % 3)]
        for j, name in enumerate(references):
            picture(place / name, (64, 64), seed=100 * i + j)
        picture(place / f"images/t{i}.png", (96, 64) if i % 2 else (64, 64), seed=i)
        lines.append({"input_images": references, "instruction": f"row {i}", "output_image": f"images/t{i}.png"})
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "rows.jsonl"


@pytest.fixture
def jsonl(tmp_path) -> DataConfig:
    path = write_rows(tmp_path / "set", 7)
    return DataConfig(
        folder=str(tmp_path / "cache"),
        kind="jsonl",
        path=str(path),
        size=96,
        reference_budget=64,
        samples_per_shard=3,
        workers=0,
    )


def contents(place: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(place).glob("*.safetensors"))}


def embeddings(cond: TextCond) -> list[torch.Tensor]:
    masks = torch.ones(cond.embeds.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    return [e[m] for e, m in zip(cond.embeds, masks, strict=True)]


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_encoder_inputs_are_what_the_pipeline_would_feed(nano, text):
    """From cached arrays as from pictures, and the cached latents' shapes go with them."""
    scenes = Compositions(nano, 0, 6)
    row = next(r for r in (scenes[i] for i in range(6)) if len(r.references) > 1)
    bucket = read_cache(nano)[row.shapes]
    prompts = bucket.take(range(len(bucket))).prompts
    cached = bucket.take([prompts.index(row.prompt)])
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
    frozen, live = read_cache(nano, encoder_fingerprint(text)), read_cache(nano)
    assert frozen.keys() == live.keys()
    for shapes, bucket in frozen.items():
        rows, pictures = bucket.take(range(len(bucket))), live[shapes].take(range(len(bucket)))
        assert rows.vision == ()
        assert rows.prompts == pictures.prompts
        assert torch.equal(rows.target, pictures.target)
        for cond, prompts in ((rows.cond, rows.prompts), (rows.uncond, [UNCOND_PROMPT] * len(bucket))):
            with torch.no_grad():
                expected = text.forward(encoder_inputs(text, pictures, prompts))
            for ours, theirs in zip(embeddings(cond), embeddings(expected), strict=True):
                assert ours.shape == theirs.shape
                assert torch.allclose(ours, theirs, atol=0.03, rtol=0.01)  # kept in bfloat16


def test_latents_are_those_of_the_vae(nano, vae):
    row = Compositions(nano, 0, 1)[0]
    taken = read_cache(nano)[row.shapes]
    at = taken.take(range(len(taken))).prompts.index(row.prompt)
    rows = taken.take([at])
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


# --- lazy ------------------------------------------------------------------------------------------------------------


def test_opening_reads_no_tensor(nano, text, tmp_path):
    """What is written into the files after they were opened is what `take` gives: nothing had been copied."""
    for path in Path(nano.folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    buckets = read_cache(replace(nano, folder=str(tmp_path)), encoder_fingerprint(text))
    assert sum(len(b) for b in buckets.values()) == nano.samples
    assert all(b.num_target_tokens == 64 for b in buckets.values())
    for path in tmp_path.glob("*.safetensors"):
        first = min(spec.offset for spec in read_safetensors(path)[0].values())
        with open(path, "r+b") as file:
            file.seek(first)
            file.write(b"\0" * (path.stat().st_size - first))
    for bucket in buckets.values():
        rows = bucket.take(range(len(bucket)))
        for tensor in (rows.target, *rows.references, rows.cond.embeds, rows.uncond.embeds):
            assert not tensor.any()


def test_an_open_cache_gives_what_it_held(jsonl, vae, text):
    """Though its files are written again, with other offsets, under a run."""
    build(jsonl, vae, None)
    buckets = read_cache(jsonl)
    before = {name: bucket.take(range(len(bucket))) for name, bucket in read_cache(jsonl).items()}
    build(jsonl, vae, text)
    for name, rows in before.items():
        again = buckets[name].take(range(len(rows.prompts)))
        assert torch.equal(again.target, rows.target)
        assert all(map(torch.equal, again.vision, rows.vision))


def test_rows_come_in_the_order_asked_for_and_from_any_shard(nano):
    buckets = read_cache(nano)
    bucket = max(buckets.values(), key=lambda b: len(b.parts) * 100 + len(b))
    assert len(bucket.parts) == 2
    whole = bucket.take(range(len(bucket)))
    order = np.random.default_rng(0).permutation(len(bucket))
    taken = bucket.take(order)
    assert torch.equal(taken.target, whole.target[torch.from_numpy(order)])
    assert taken.prompts == tuple(whole.prompts[i] for i in order)
    with pytest.raises(IndexError, match="asked for number"):
        bucket.take([len(bucket)])


# --- resumable -------------------------------------------------------------------------------------------------------


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
            read_cache(jsonl, name)
        build(jsonl, vae, text, PreviewConfig(samples=2))
        assert contents(jsonl.folder) == before
    Path(jsonl.folder, "shard-00000.safetensors").write_bytes(before["shard-00000.safetensors"][:200])
    build(jsonl, vae, text, PreviewConfig(samples=2))
    assert contents(jsonl.folder) == before


def _build_and_die(data: DataConfig, folder: Path, writes: int) -> None:
    """Kill -9 in the middle of the file after so many."""
    torch.set_num_threads(1)
    original, done = shards.write_safetensors, []

    def write(path, announced, tensors, metadata):
        if len(done) == writes:
            Path(f"{path}.partial-{os.getpid()}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
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
    build(jsonl, vae, text)
    assert contents(jsonl.folder) == contents(whole.folder)
    assert not list(Path(jsonl.folder).glob("*.partial-*"))


# --- never stale -----------------------------------------------------------------------------------------------------


def test_another_set_or_vae_is_not_mixed_in(nano, vae, text, jsonl):
    with pytest.raises(ConfigError, match="holds another set"):
        build(replace(nano, seed=9), vae, None)
    with pytest.raises(ConfigError, match="seed 0, not 9"):
        read_cache(replace(nano, seed=9))
    with pytest.raises(ConfigError, match="kind nano, not jsonl"):
        read_cache(replace(jsonl, folder=nano.folder))
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    with pytest.raises(ConfigError, match="holds another set"):
        build(nano, vae, None)
    assert read_cache(nano)


def test_another_encoder_has_embeddings_of_its_own(jsonl, vae, folder):
    text = TextEncoder.from_pretrained(folder, dtype=torch.float32)
    build(jsonl, vae, text)
    first, second = encoder_fingerprint(text), ""
    before = read_cache(jsonl, first)["64x64"].take([0])
    text.positions = "sequential"
    second = encoder_fingerprint(text)
    with pytest.raises(ConfigError, match="no text embeddings by this encoder; run python -m trainers.cache"):
        read_cache(jsonl, second)
    with torch.no_grad():
        text.network.get_input_embeddings().weight.mul_(2)
    third = encoder_fingerprint(text)
    build(jsonl, vae, text)  # the pictures had been dropped: the shards are made again
    assert len({first, second, third}) == 3
    after = read_cache(jsonl, third)["64x64"].take([0])
    assert not torch.allclose(before.cond.embeds, after.cond.embeds)
    assert torch.equal(read_cache(jsonl, first)["64x64"].take([0]).cond.embeds, before.cond.embeds)


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
    assert sum(len(b) for b in read_cache(jsonl, name).values()) == (8 if change == "more rows" else 7)


def test_text_of_other_latents_is_refused(jsonl, vae, text):
    """A shard of text that lies beside latents of other prompts or pictures, wherever it came from."""
    build(jsonl, vae, text)
    name = encoder_fingerprint(text)
    first, second = (text_path(Path(jsonl.folder) / f"shard-0000{i}.safetensors", name) for i in range(2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=r"shard-00001.*no text embeddings"):
        read_cache(jsonl, name)
    build(jsonl, vae, text)
    assert read_cache(jsonl, name)


def test_caches_of_the_first_version_remain_readable(nano, vae, text, tmp_path):
    """Their shards say nothing of rows and text; the text is then tied to what they hold."""
    data = replace(nano, folder=str(tmp_path))
    (tmp_path / "set.json").write_text(Path(nano.folder, "set.json").read_text())
    for path in sorted(Path(nano.folder).glob("shard-*")):
        shard = Shard(path)
        tensors = {name: shard.tensors[name] for name in shard.table}
        shards.write_shard(tmp_path / path.name, tensors, {"prompts": shard.prompts})
    before = contents(data.folder)
    assert sum(len(b) for b in read_cache(data).values()) == data.samples
    build(data, vae, text)
    after = contents(data.folder)
    assert {n: after[n] for n in before} == before
    assert {n: after[n] for n in after if n.startswith("text-")} == {
        n: b for n, b in contents(nano.folder).items() if n.startswith("text-") and "preview" not in n
    }


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_pictures_are_kept_for_an_encoder_that_trains_along(jsonl, vae, text):
    build(jsonl, vae, text)
    with pytest.raises(ConfigError, match=r"keeps no pictures.*run python -m trainers.cache"):
        read_cache(jsonl)
    small = sum(map(len, contents(jsonl.folder).values()))
    build(jsonl, vae, None)
    shapes = {name: bucket.take([0]) for name, bucket in read_cache(jsonl).items()}
    assert all(len(rows.vision) == len(rows.references) == name.count("_") for name, rows in shapes.items())
    assert sum(map(len, contents(jsonl.folder).values())) > small
    build(jsonl, vae, text)
    assert sum(map(len, contents(jsonl.folder).values())) == small


def test_mixed_shapes_make_whole_batches(jsonl, vae, text):
    """Samples with 0, 1 and 2 references, of two target shapes: every batch is of one shape, every sample comes up."""
    build(jsonl, vae, text)
    buckets = read_cache(jsonl, encoder_fingerprint(text))
    assert {name.split("_")[0] for name in buckets} == {"64x64", "96x64"}
    assert {name.count("_") for name in buckets} == {0, 1, 2}
    order = BucketOrder({n: len(b) for n, b in buckets.items()}, 2, seed=0)
    seen = set()
    for step in range(40):
        name, rows = order[step]
        taken = buckets[name].take(rows)
        assert taken.target.shape[0] == 2
        assert len(taken.references) == name.count("_")
        assert taken.cond.embeds.shape[0] == taken.uncond.embeds.shape[0] == 2
        seen |= set(taken.prompts)
    assert seen == {f"row {i}" for i in range(7)}


# --- previews --------------------------------------------------------------------------------------------------------


def test_previews_of_the_composition_set(nano, text):
    rows = read_preview(nano, PreviewConfig(samples=3), encoder_fingerprint(text))
    scenes = [Compositions(nano, 0, 2, "train", 3)[i] for i in range(2)] + [Compositions(nano, 0, 1, "heldout", 4)[0]]
    assert [r.rows.prompts for r in rows] == [(s.prompt,) for s in scenes]
    for row, scene in zip(rows, scenes, strict=True):
        assert np.array_equal(np.asarray(row.truth), scene.target)
        assert row.references.size == (128, 128)
        assert (row.shape.height, row.shape.width) == (8, 8)
        assert len(row.rows.references) == len(row.rows.vision) == len(scene.references)
        assert row.rows.cond.embeds.shape[0] == row.rows.uncond.embeds.shape[0] == 1
    live = read_preview(nano, PreviewConfig(samples=3))
    assert live[0].rows.cond is None
    assert live[0].rows.vision
    with pytest.raises(ConfigError, match="not in .*run python -m trainers.cache"):
        read_preview(nano, PreviewConfig(samples=5))
    with pytest.raises(ConfigError, match="no text embeddings by this encoder"):
        read_preview(nano, PreviewConfig(samples=3), "0" * 12)


def test_previews_of_the_users_own(jsonl, vae, text, tmp_path):
    picture(tmp_path / "wide.png", (200, 100))
    picture(tmp_path / "tall.png", (50, 100))
    both = (str(tmp_path / "wide.png"), str(tmp_path / "tall.png"))
    preview = PreviewConfig(own=(PreviewSample(both, "the first with the second"), PreviewSample((), "words alone")))
    build(jsonl, vae, text, preview)
    name = encoder_fingerprint(text)
    wide, alone = read_preview(jsonl, preview, name)
    assert (wide.shape.width, wide.shape.height) == (8, 4)  # 2:1 at 96 x 96 is 136 x 68
    assert (alone.shape.width, alone.shape.height) == (6, 6)
    assert wide.truth.size == (128, 64)
    assert wide.truth.getextrema() == ((255, 255),) * 3
    assert len(wide.rows.references) == 2
    assert alone.rows.references == ()
    path = next(Path(jsonl.folder).glob("preview-*"))
    before = path.read_bytes()
    picture(tmp_path / "tall.png", (50, 100), seed=5)  # other pixels under the same name
    build(jsonl, vae, text, preview)
    assert path.read_bytes() != before
    assert len(read_preview(jsonl, preview, name)) == 2
    for images, prompt, message in [
        ((str(tmp_path / "none.png"),), "a", "no such picture"),
        (both * 4, "a", "8 references"),
        (both, " ", "no instruction"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(jsonl, vae, text, PreviewConfig(own=(PreviewSample(images, prompt),)))


def test_previews_of_other_data_are_its_first_good_rows(jsonl, vae, text):
    Path(jsonl.path).parent.joinpath("images/t0.png").unlink()
    whole = Path(jsonl.path).parent.joinpath("images/t1.png")
    whole.write_bytes(whole.read_bytes()[:-3000])
    build(jsonl, vae, text, PreviewConfig(samples=2))
    rows = read_preview(jsonl, PreviewConfig(samples=2), encoder_fingerprint(text))
    assert [r.rows.prompts for r in rows] == [("row 2",), ("row 3",)]
    assert rows[1].truth.size == (96, 64)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(folder, jsonl, tmp_path) -> Path:
    data = {k: getattr(jsonl, k) for k in ("folder", "kind", "path", "size", "reference_budget", "samples_per_shard")}
    values = {
        "method": "consistency",
        "output": str(tmp_path / "run"),
        "network": {"model": str(folder), "adapter": {}},
        "data": {**data, "workers": 0},
        "preview": {"samples": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return tmp_path / "config.yaml"


def test_the_command_leaves_all_that_training_needs(config, folder, jsonl, monkeypatch, capsys):
    assert main([str(config)]) == 0
    name = text_fingerprint(folder)
    assert sum(len(b) for b in read_cache(jsonl, name).values()) == 7
    assert len(read_preview(jsonl, PreviewConfig(samples=2), name)) == 2

    def never(*args, **kwargs):
        raise AssertionError("the encoder is not needed again")

    monkeypatch.setattr(TextEncoder, "from_pretrained", never)
    assert main([str(config)]) == 0
    assert main([str(config), "data.size=64"]) == 2
    assert "holds another set" in capsys.readouterr().err


def test_one_model_at_a_time(config, monkeypatch):
    """The VAE is gone when the encoder comes, and no model comes before the rows are checked."""
    alive = []
    load_vae, load_text = cache.load_image_vae, TextEncoder.from_pretrained

    def vae(*args):
        made = load_vae(*args)
        alive.append(weakref.ref(made))
        return made

    def encoder(*args):
        gc.collect()
        assert alive
        assert alive[0]() is None
        return load_text(*args)

    monkeypatch.setattr(cache, "load_image_vae", vae)
    monkeypatch.setattr(TextEncoder, "from_pretrained", encoder)
    assert main([str(config)]) == 0


def test_no_good_row_is_an_error_before_anything_loads(config, jsonl, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(cache, "load_image_vae", never)
    monkeypatch.setattr(cache, "text_fingerprint", never)
    Path(jsonl.path).write_text('{"input_images": [], "instruction": "", "output_image": "images/t0.png"}\nno\x1b[2J\n')
    assert main([str(config)]) == 2
    message = capsys.readouterr().err
    assert "no row of" in message
    assert "line 1: no instruction" in message
    assert "report.json" in message
    listed = json.loads(Path(jsonl.folder, "report.json").read_text())
    assert listed["used"] == 0
    assert [s["name"] for s in listed["skipped"]] == ["line 1", "line 2"]
    Path(jsonl.path).write_text("")
    assert main([str(config)]) == 2
    assert "no row of" in capsys.readouterr().err


def test_rows_that_fail_are_left_out_once_and_for_all(jsonl, vae, text, monkeypatch, capsys):
    """One that the header shows, and one that only decoding shows, which is not tried again."""
    images = Path(jsonl.path).parent / "images"
    (images / "t2.png").write_text("no picture")
    (images / "t4.png").write_bytes((images / "t4.png").read_bytes()[:-3000])
    build(jsonl, vae, text)
    assert "2 of 7 rows are left out, first line 3: t2.png cannot be read as a picture" in capsys.readouterr().out
    listed = json.loads(Path(jsonl.folder, "report.json").read_text())
    assert (listed["rows"], listed["used"]) == (7, 5)
    assert [(s["row"], s["name"]) for s in listed["skipped"]] == [(2, "line 3"), (4, "line 5")]
    assert "truncated" in listed["skipped"][1]["reason"]
    assert sum(len(b) for b in read_cache(jsonl, encoder_fingerprint(text)).values()) == 5
    monkeypatch.setattr(cache, "encode_shard", lambda *_: pytest.fail("tried again"))
    build(jsonl, vae, text)
    assert json.loads(Path(jsonl.folder, "report.json").read_text()) == listed
    monkeypatch.undo()
    picture(images / "t2.png", (64, 64))  # mended
    build(jsonl, vae, text)
    assert sum(len(b) for b in read_cache(jsonl, encoder_fingerprint(text)).values()) == 6


def test_all_rows_failing_to_decode_is_an_error(jsonl, vae):
    for path in Path(jsonl.path).parent.glob("images/t*.png"):
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ConfigError, match="no row of"):
        build(jsonl, vae, None)
    with pytest.raises(ConfigError, match="holds no sample"):
        read_cache(jsonl)


def test_workers_make_the_same_cache(jsonl, vae, text, tmp_path):
    Path(jsonl.path).parent.joinpath("images/t4.png").unlink()
    build(jsonl, vae, text)
    two = replace(jsonl, folder=str(tmp_path / "two"), workers=2)
    build(two, vae, text)
    assert contents(two.folder) == contents(jsonl.folder)


def test_fingerprint_of_a_module_ignores_its_type(vae):
    name = fingerprint(vae)
    assert fingerprint(vae.bfloat16()) == name
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    assert fingerprint(vae) != name
