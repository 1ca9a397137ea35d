"""Masks of rows: read from every kind of data set, brought to latent tokens, cached, refused where uncertain."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.trainers.cache.small_sets import contents
from trainers.cache import build, cached_samples
from trainers.config.run import ConfigError, DataConfig
from trainers.data.checking import check_rows
from trainers.data.encoding import ShardBuilder
from trainers.data.rows import BadRow, Record, read_record, token_mask
from trainers.data.shards import Rows, Shard
from trainers.data.sources import open_source
from trainers.methods.inputs import joined_masks, make_inputs
from unipic_core.conditioning.sequence import TextCond
from unipic_core.model.vae import ImageVAE, VAEConfig


def left(size=(64, 64)) -> Image.Image:
    """White on the left half."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def png(image=None, size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", size, "red")).save(buffer, "PNG")
    return buffer.getvalue()


LEFT = [[255, 255, 0, 0]] * 4


# --- one place for the size -------------------------------------------------------------------------------------------


def test_a_token_holds_the_share_of_white_in_its_area():
    mask = left((128, 64))
    assert token_mask(mask, (128, 64)).tolist() == [[255] * 4 + [0] * 4] * 4
    assert token_mask(mask, (64, 32)).tolist() == [[255, 255, 0, 0]] * 2  # smaller targets: means over larger areas
    mask.paste(255, (64, 0, 68, 64))
    assert token_mask(mask, (128, 64))[0].tolist() == [255] * 4 + [64] + [0] * 3


def test_the_order_of_a_mask_is_that_of_packed_tokens():
    """A mask of one token lies over the values of its 2x2 latent pixels."""
    latents = torch.zeros(1, 16, 4, 6)
    latents[:, :, 2:, 4:] = 1
    mask = torch.zeros(1, 2, 3)
    mask[0, 1, 2] = 1
    text = TextCond(torch.zeros(1, 1, 4))
    inputs = make_inputs(Rows(latents, (), (), ("a",), text, text, mask))
    assert torch.equal(inputs.x0.mean(-1), inputs.mask)


def test_rows_without_a_mask_count_fully_beside_one_with():
    text = TextCond(torch.zeros(1, 1, 4))
    rows = [Rows(torch.zeros(1, 16, 4, 4), (), (), ("a",), text, text, m) for m in (None, torch.zeros(1, 2, 2))]
    inputs = [make_inputs(row) for row in rows]
    assert joined_masks(inputs[:1]) is None
    assert joined_masks(inputs).tolist() == [[1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (png(left((32, 64))), "expected a mask of the target's size, 64x64, got 32x64"),
        (png(Image.new("L", (64, 64))), "its mask is black everywhere"),
        (png(Image.new("LA", (64, 64), (255, 0))), "has transparent parts"),
        (b"no picture", "is not a picture that can be read"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(mask, why):
    with pytest.raises(BadRow, match=why):
        read_record(Record(png(), (), "a prompt", mask), 64, 64)


def test_an_opaque_mask_in_colour_is_read():
    assert read_record(Record(png(), (), "a", png(left().convert("RGBA"))), 64, 64).mask.tolist() == LEFT


# --- sources ----------------------------------------------------------------------------------------------------------


def data(path, kind, **values):
    return DataConfig(
        folder=f"{path}-cache", kind=kind, path=str(path), size=64, reference_budget=64, workers=0, **values
    )


def masks_of(source):
    return [None if (mask := source[i].mask) is None else mask.tolist() for i in range(len(source))]


def jsonl_set(folder, mask):
    lines = [
        {"input_images": [], "instruction": "a", "output_image": "a.png", "mask": "a-mask.png"},
        {"input_images": [], "instruction": "b", "output_image": "b.png"},
    ]
    (folder / "a-mask.png").write_bytes(mask)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in "ab":
        (folder / f"{name}.png").write_bytes(png())
    return data(folder / "rows.jsonl", "jsonl")


def parquet_set(folder, mask):
    columns = {"input_images": [[], []], "instruction": ["a", "b"], "output_image": [png(), png()]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "mask": [mask, None]}), folder / "rows.parquet")
    return data(folder / "rows.parquet", "parquet")


def tar_set(folder, mask):
    files = {"a.png": png(), "a.mask.png": mask, "a.txt": b"a", "b.png": png(), "b.txt": b"b"}
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data(folder / "rows.tar", "webdataset")


def folder_set(folder, mask, name="a_mask.png"):
    for row in "ab":
        (folder / f"{row}.png").write_bytes(png())
        (folder / f"{row}.txt").write_text(row)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(mask)
    return data(folder, "folder")


def masks_folder_set(folder, mask):
    return folder_set(folder, mask, "masks/a.png")


@pytest.mark.parametrize("make", [jsonl_set, parquet_set, tar_set, folder_set, masks_folder_set])
def test_every_kind_of_data_set_may_have_masks(tmp_path, make):
    place = tmp_path / "set"
    place.mkdir()
    config = make(place, png(left()))
    checked = check_rows(config)
    assert masks_of(checked.source) == [LEFT, None]
    assert not checked.bad
    changed = check_rows(make(place, png(left().transpose(Image.Transpose.FLIP_LEFT_RIGHT))))
    assert changed.digests[0] != checked.digests[0]
    assert changed.digests[1] == checked.digests[1]


def test_a_mask_of_another_size_is_found_by_the_headers(tmp_path):
    config = jsonl_set(tmp_path, png(left((32, 32))))
    assert "expected a mask of the target's size" in check_rows(config).bad[0]
    with pytest.raises(ConfigError, match="expected a mask of the target's size"):
        check_rows(replace(config, bad_rows="stop"))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a_mask.txt": b"x"}, "a_mask has a caption, so it may be a mask or a target"),
        ({"masks/a.png": png(left())}, "it has several masks: a in masks, a_mask; keep one"),
        ({"a_mask_1.png": png()}, "a_mask has a numbered picture beside it"),
        ({"a-mask.png": png()}, "has no caption and no number"),
        ({"a_1.png": png(), "a_1_mask.png": png()}, "has no caption and no number"),  # masks of references: none
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_masks_in_a_folder_that_are_not_certain_are_refused(tmp_path, files, why):
    config = folder_set(tmp_path, png(left()))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = open_source(config)
    with pytest.raises(BadRow, match=why):
        source.check([source.name(i) for i in range(len(source))].index("a"))


def test_a_masks_folder_of_other_names_is_noted(tmp_path):
    assert (
        "1 masks in masks belong to no target, first c"
        in open_source(folder_set(tmp_path, png(left()), "masks/c.png")).note
    )


# --- cache ------------------------------------------------------------------------------------------------------------


class MeanVAE:
    """Encodes any picture as zeros, so that only the masks matter."""

    class quant_conv:
        weight = torch.zeros(1)

    def encode(self, pictures):
        return torch.zeros(len(pictures), 16, 1, pictures.shape[-2] // 8, pictures.shape[-1] // 8)


def test_a_bucket_without_masks_stores_none(tmp_path):
    plain, masked = (read_record(Record(png(), (), "a", mask), 64, 64) for mask in (None, png(left())))
    for rows, stored in (([plain, plain], False), ([plain, masked], True)):
        shard = ShardBuilder()
        shard.add(MeanVAE(), rows)
        shard.write(tmp_path / "shard-00000.safetensors", {"rows": ""})
        assert ("64x64/mask" in Shard(tmp_path / "shard-00000.safetensors").table) == stored


def test_the_cache_keeps_masks_and_notices_changed_ones(tmp_path, small_vae):
    place = tmp_path / "set"
    place.mkdir()
    config = jsonl_set(place, png(left()))
    build(config, small_vae, None)
    (samples,) = cached_samples(config, None)
    assert samples.num_masked == 1
    masks = [samples.take(i).mask for i in range(2)]
    assert torch.equal(masks[0], torch.tensor(np.array([LEFT]) / 255, dtype=torch.float32))
    assert torch.equal(masks[1], torch.ones(1, 4, 4))
    before, first = samples.contents, contents(config.folder)
    build(config, small_vae, None)
    assert contents(config.folder) == first
    jsonl_set(place, png(Image.new("L", (64, 64), 255)))
    build(config, small_vae, None)
    (samples,) = cached_samples(config, None)
    assert samples.contents != before
    assert torch.equal(samples.take(0).mask, torch.ones(1, 4, 4))


@pytest.fixture
def small_vae():
    torch.manual_seed(0)
    return ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
