"""Data sets of every kind become rows; whatever is wrong with a row is found, named and left out."""

import io
import json
import struct
import sys
import types
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.config.run import ConfigError, DataConfig
from trainers.data.checking import DecodedRows, check_rows, load_rows
from trainers.data.rows import LONGEST_INSTRUCTION, BadRow, target_size
from trainers.data.sources import open_source
from trainers.data.sources.folder import natural


def picture(path: Path, size=(64, 48), seed=0, **how) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def png(size=(64, 48), seed=0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def config(tmp_path, path, kind="jsonl", **values) -> DataConfig:
    given = {"size": 128, "reference_budget": 64, "workers": 0, **values}
    return DataConfig(folder=str(tmp_path / "cache"), kind=kind, path=str(path), **given)


def write_lines(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


GOOD = {"input_images": ["a.png", "b.png"], "instruction": "put a on b", "output_image": "t.png"}


@pytest.fixture
def images(tmp_path) -> Path:
    """a.png, b.png and t.png, and broken ones of every kind."""
    folder = tmp_path / "set"
    for i, name in enumerate(("a.png", "b.png", "t.png")):
        picture(folder / name, (64 + 32 * i, 48), seed=i)
    picture(folder / "long.png", (330, 32))
    picture(tmp_path / "secret.png")
    (folder / "torn.png").write_bytes((folder / "t.png").read_bytes()[:-3000])
    (folder / "head.png").write_bytes((folder / "t.png").read_bytes()[:20])
    (folder / "text.png").write_text("no picture at all")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return folder


# --- JSONL -----------------------------------------------------------------------------------------------------------


def test_rows_of_the_release(tmp_path, images):
    source = open_source(
        config(tmp_path, write_lines(images / "rows.jsonl", [GOOD, b"", {**GOOD, "input_images": []}]))
    )
    assert len(source) == 2
    assert source.name(1) == "line 3"
    row, alone = source[0], source[1]
    assert row.prompt == "put a on b"
    assert row.target.shape == (64, 128, 3)
    assert row.target.dtype == np.uint8
    assert row.shapes == "128x64_32x32_64x32"  # 64 x 48 and 96 x 48 share 64 x 64 pixels
    assert [v.shape for v in row.vision] == [(28, 28, 3), (28, 56, 3)]
    assert alone.shapes == "128x64"
    assert alone.references == alone.vision == ()


def test_images_may_lie_elsewhere_and_samples_limits_them(tmp_path, images):
    path = write_lines(tmp_path / "lists" / "rows.jsonl", [GOOD] * 3)
    data = config(tmp_path, path, images=str(images), samples=2)
    source = open_source(data)
    assert len(source) == 2
    assert source[1].shapes == "128x64_32x32_64x32"
    assert source.identity == {"kind": "jsonl", "rows": 2, "path": str(path), "samples": 2, "images": str(images)}
    with pytest.raises(BadRow, match=r"the picture t\.png does not exist"):
        open_source(replace(data, images=None)).check(0)


BAD_ROWS = [
    ({**GOOD, "output_image": "none.png"}, "the picture none.png does not exist"),
    ({**GOOD, "input_images": ["a.png", "none.png"]}, "the picture none.png does not exist"),
    ({**GOOD, "output_image": "text.png"}, "text.png cannot be read as a picture"),
    ({**GOOD, "output_image": "empty.png"}, "empty.png cannot be read as a picture"),
    ({**GOOD, "output_image": "head.png"}, "head.png cannot be read as a picture"),
    ({**GOOD, "output_image": "folder.png"}, "folder.png cannot be read as a picture"),
    ({**GOOD, "output_image": "long.png"}, "long.png is 330x32, an aspect ratio over 10"),
    ({**GOOD, "input_images": ["long.png"]}, "an aspect ratio over 10"),
    ({**GOOD, "instruction": ""}, "no instruction"),
    ({**GOOD, "instruction": " \n"}, "no instruction"),
    ({**GOOD, "instruction": 7}, "no instruction"),
    ({"input_images": [], "output_image": "t.png"}, "no instruction"),
    ({**GOOD, "instruction": "a <|image_pad|> b"}, "a mark of the template"),
    ({**GOOD, "instruction": "ü" * LONGEST_INSTRUCTION}, "longer than"),
    ({**GOOD, "instruction": "lone \ud800"}, "not valid Unicode"),
    ({**GOOD, "input_images": ["a.png"] * 7}, "at most 6 references, got 7"),
    ({**GOOD, "input_images": "a.png"}, "no input_images"),
    ({"instruction": "a", "output_image": "t.png"}, "no input_images"),
    ({"instruction": "a", "input_images": []}, "no output_image"),
    ({**GOOD, "input_images": [3]}, "expected the path of a picture, got int"),
    ({**GOOD, "output_image": "../secret.png"}, "leaves the folder"),
    ({**GOOD, "output_image": "/etc/passwd"}, "leaves the folder"),
    ({**GOOD, "output_image": "../set2/t.png"}, "leaves the folder"),
    ({**GOOD, "output_image": "t.png\0.png"}, "leaves the folder"),
    (b"{not json", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (["a", "list"], "expected an object"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_bad_rows_are_found_without_decoding(tmp_path, images, monkeypatch, line, reason):
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("the check decodes nothing"))
    data = config(tmp_path, write_lines(images / "rows.jsonl", [GOOD, line]))
    checked = check_rows(data)
    assert list(checked.bad) == [1]
    assert reason in checked.bad[1]


def test_a_torn_picture_is_found_when_it_is_decoded(tmp_path, images):
    rows = [GOOD, {**GOOD, "input_images": ["torn.png"]}, GOOD]
    checked = check_rows(config(tmp_path, write_lines(images / "rows.jsonl", rows)))
    assert checked.bad == {}
    ((_, first), (number, why), (_, last)) = (DecodedRows(checked.source, range(3))[i] for i in range(3))
    assert (first.shapes, last.shapes) == ("128x64_32x32_64x32",) * 2
    assert number == 1
    assert "torn.png is damaged or truncated" in why


def test_pictures_of_more_pixels_than_memory_are_refused(tmp_path, images):
    picture(images / "bomb.png", (8, 8))
    content = bytearray((images / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (images / "bomb.png").write_bytes(content)
    checked = check_rows(
        config(tmp_path, write_lines(images / "rows.jsonl", [GOOD, {**GOOD, "output_image": "bomb.png"}]))
    )
    assert "bomb.png" in checked.bad[1]
    assert "pixels" in checked.bad[1]


def test_rows_that_failed_the_check_are_not_decoded(tmp_path, images):
    rows = [GOOD, {**GOOD, "instruction": ""}, GOOD]
    checked = check_rows(config(tmp_path, write_lines(images / "rows.jsonl", rows)))
    ((first, second),) = load_rows(checked, range(3), 0)
    assert (first[0], second[0]) == (0, 2)


def test_transparency_depth_and_orientation(tmp_path, images):
    """As everywhere: alpha on white, 16 bit scaled, upright by EXIF; and the aspect is checked the right way up."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(images / "clear.png")
    Image.fromarray(np.full((64, 64), 32896, dtype=np.uint16)).save(images / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(images / "turned.jpg", (96, 64), exif=exif)
    rows = [
        {"input_images": [], "instruction": "a", "output_image": n} for n in ("clear.png", "deep.png", "turned.jpg")
    ]
    source = open_source(config(tmp_path, write_lines(images / "rows.jsonl", rows)))
    assert (source[0].target == 255).all()
    assert (abs(source[1].target.astype(int) - 128) <= 1).all()
    assert source[2].target.shape == (96, 64, 3)


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((2048, 2048), 1024, (1024, 1024)),
        ((3000, 1000), 1024, (1760, 576)),  # 1773 x 591
        ((300, 200), 1024, (288, 192)),  # not enlarged
        ((10, 10), 1024, (32, 32)),
        ((1000, 100), 128, (416, 32)),
    ],
)
def test_targets_keep_their_aspect_within_the_budget(size, budget, expected):
    assert target_size(size, budget) == expected


def test_the_digest_of_a_row_changes_with_it(tmp_path, images):
    def digest(**values):
        return open_source(config(tmp_path, write_lines(images / "rows.jsonl", [{**GOOD, **values}]))).check(0)

    digests = {digest(), digest(instruction="another"), digest(input_images=["a.png"]), digest(output_image="a.png")}
    picture(images / "a.png", (80, 80))
    digests.add(digest())
    assert len(digests) == 5
    assert digest() == digest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "nowhere.jsonl"}, "does not exist"),
        ({"path": "set"}, "expected a JSONL file"),
        ({"path": "set/a.png", "kind": "folder"}, "expected a folder"),
        ({"path": "set/a.png", "images": "nowhere"}, "data.images: expected the folder"),
    ],
)
def test_data_that_are_not_there(tmp_path, images, values, message):
    values = {k: str(tmp_path / v) if k != "kind" else v for k, v in values.items()}
    with pytest.raises(ConfigError, match=message):
        open_source(config(tmp_path, values.pop("path"), **values))


# --- a folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path) -> Path:
    folder = tmp_path / "album"
    for i, name in enumerate(("2.png", "2_1.png", "2_2.jpg", "10.webp", "shot_1.png", "shot_2.png")):
        picture(folder / name, (64, 64 + 32 * i), seed=i)
    for name in ("2", "10", "shot_1", "shot_2"):
        (folder / f"{name}.txt").write_text(f"\ufeffcaption {name}\n", encoding="utf-8")
    (folder / "notes.md").write_text("not read")
    picture(folder / "deeper" / "3.png")
    return folder


def test_a_folder_of_captioned_pictures(tmp_path, album):
    source = open_source(config(tmp_path, album, "folder"))
    assert [source.name(i) for i in range(len(source))] == ["2", "10", "shot_1", "shot_2"]
    assert [source[i].prompt for i in range(4)] == ["caption 2", "caption 10", "caption shot_1", "caption shot_2"]
    assert [len(source[i].references) for i in range(4)] == [2, 0, 0, 0]
    record = source.read(0)
    assert [p.name for p in record.pictures] == ["2.png", "2_1.png", "2_2.jpg"]
    assert all(source.check(i) for i in range(4))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (lambda f: (f / "2.txt").unlink(), "2", "no instruction: 2.txt does not exist"),
        (lambda f: (f / "2.txt").write_text(" "), "2", "no instruction"),
        (lambda f: (f / "2.txt").write_bytes(b"\xff\xfe\xfa"), "2", "2.txt is not UTF-16"),
        (lambda f: (f / "2.png").unlink(), "2", "expected one picture named 2, got 0"),
        (lambda f: picture(f / "2.jpg"), "2", "expected one picture named 2, got 2"),
        (lambda f: picture(f / "2_2.png"), "2", "expected one picture named 2_2, got 2"),
        (lambda f: (f / "2_1.png").unlink(), "2", "number 1 is missing"),
        (lambda f: [picture(f / f"2_{n}.png") for n in range(3, 8)], "2", "at most 6 references, got 7"),
        (lambda f: picture(f / "2_04.png"), "2", "number 3 is missing"),
        (lambda f: (f / "10.webp").write_bytes(b"RIFF"), "10", "10.webp cannot be read as a picture"),
    ],
)
def test_bad_samples_of_a_folder(tmp_path, album, change, name, reason):
    change(album)
    checked = check_rows(config(tmp_path, album, "folder"))
    assert {checked.source.name(i): reason in why for i, why in checked.bad.items()} == {name: True}


def test_names_are_ordered_by_their_numbers():
    assert sorted(["10", "9b", "9", "a2", "a10", "02"], key=natural) == ["02", "9", "9b", "10", "a2", "a10"]


# --- a saved data set ------------------------------------------------------------------------------------------------


class FakeTable:
    """One row of a data set in the format "arrow": a table that gives plain Python values."""

    def __init__(self, row):
        self.row = row

    def to_pylist(self):
        return [self.row]


class FakeDataset:
    def __init__(self, rows, arrow=False):
        self.rows, self.arrow = rows, arrow
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def with_format(self, name):
        assert name == "arrow"
        return FakeDataset(self.rows, arrow=True)

    def __getitem__(self, i):
        assert self.arrow, "pictures must be read as they are stored"
        return FakeTable(self.rows[i])


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """datasets.load_from_disk, giving what it is told to."""
    folder = tmp_path / "saved"
    picture(folder / "pictures" / "p.png")
    module = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)

    def give(found):
        module.load_from_disk = lambda path: found if path == str(folder) else pytest.fail(path)
        return config(tmp_path, folder, "datasets")

    return give


def rows_of_kinds():
    feature = {"bytes": png(seed=1), "path": "/somewhere/else.png"}
    return [
        {"input_images": [feature, png(seed=2)], "instruction": "stored", "output_image": feature},
        {"input_images": [], "instruction": "a path", "output_image": {"bytes": None, "path": "pictures/p.png"}},
        {"input_images": ["../outside.png"], "instruction": "leaves", "output_image": feature},
        {"input_images": [], "instruction": None, "output_image": feature},
        {"input_images": [png()[:-2000]], "instruction": "torn", "output_image": feature},
        {"input_images": [b"no picture"], "instruction": "broken", "output_image": feature},
    ]


def test_a_saved_data_set(saved):
    checked = check_rows(saved(FakeDataset(rows_of_kinds())))
    assert sorted(checked.bad) == [2, 3, 5]
    assert "leaves the folder" in checked.bad[2]
    assert "no instruction" in checked.bad[3]
    assert "a picture of the data set cannot be read" in checked.bad[5]
    source = checked.source
    assert source[0].shapes.count("_") == 2
    assert source[1].prompt == "a path"
    assert source[1].references == ()
    with pytest.raises(BadRow, match="truncated"):
        source[4]
    assert checked.digests[0] != checked.digests[1]


def test_splits_of_a_saved_data_set(saved):
    rows = FakeDataset(rows_of_kinds()[:1])
    assert len(open_source(saved({"train": rows, "test": FakeDataset(rows_of_kinds())}))) == 1
    with pytest.raises(ConfigError, match="has the splits a, b and no train"):
        open_source(saved({"a": rows, "b": rows}))
    with pytest.raises(ConfigError, match="has no column input_images, output_image"):
        open_source(saved(FakeDataset([{"instruction": "a", "image": b""}])))


def test_what_is_not_a_saved_data_set(saved, monkeypatch):
    data = saved(None)

    def fails(path):
        raise FileNotFoundError("Directory is neither a `Dataset` directory nor a `DatasetDict` directory.")

    monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", fails)
    with pytest.raises(ConfigError, match="is not a saved data set: Directory is neither"):
        open_source(data)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        open_source(data)


def folder_of(place, names):
    for name in names:
        path = place / name
        if path.suffix == ".txt":
            path.write_text("a prompt")
        else:
            Image.new("RGB", (64, 64), "red").save(path)
    return open_source(DataConfig(folder="c", kind="folder", path=str(place), size=64, reference_budget=64))


@pytest.mark.parametrize(
    "references", [("s_0", "s_1"), ("s_1", "s_2"), ("s_01", "s_02"), ("s-1", "s-2"), ("s_0001", "s_0002")], ids=str
)
def test_references_by_other_trainers_names(tmp_path, references):
    source = folder_of(tmp_path, ["s.png", "s.txt", *(f"{name}.png" for name in references)])
    assert len(source) == 1
    assert tuple(path.stem for path in source.read(0).references) == references


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["s_1.png", "s_1.txt"], "s_1 has a caption, so it may be a reference or a target"),
        (["s_2.png"], "number 1 is missing"),
        (["s_1.png", "s-1.png"], "a number occurs twice"),
        (["s_0.png", "s_2.png"], "number 1 is missing"),
        (["s_1.png", "s_1_2.png"], "s_1_2 may belong to s or to s_1, itself a reference"),
    ],
    ids=str,
)
def test_references_that_could_be_paired_wrongly_leave_their_target_out(tmp_path, more, why):
    source = folder_of(tmp_path, ["s.png", "s.txt", *more])
    assert len(source) == 1
    with pytest.raises(BadRow, match=why):
        source.check(0)


def test_another_picture_of_equal_name_and_byte_count_is_noticed(tmp_path):
    """Written in place, or under another data.images; equal ones in another folder need not be encoded again."""
    digests = []
    (tmp_path / "rows.jsonl").write_text('{"input_images": [], "instruction": "a", "output_image": "t.bmp"}')
    for folder, colour in (("a", "red"), ("a", "blue"), ("b", "blue")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / folder / "t.bmp")
        data = DataConfig(
            folder="c", kind="jsonl", path=str(tmp_path / "rows.jsonl"), images=str(tmp_path / folder), size=64
        )
        digests.append(open_source(data).check(0))
    assert digests[0] != digests[1] == digests[2]
