"""Tars, parquet, folders of references, text of other programs: every row paired as its maker meant it, or refused."""

import io
import json
import re
import sys
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from trainers.config.run import ConfigError, DataConfig
from trainers.data.checking import check_rows
from trainers.data.rows import BadRow
from trainers.data.sources import open_source
from trainers.data.sources.tars import expanded
from unipic_core.conditioning.picture_files import ENDINGS


def png(colour="red", size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data(path, kind, **values):
    return DataConfig(folder=f"{path}-cache", kind=kind, path=str(path), size=64, reference_budget=64, **values)


def colours(row):
    return [tuple(picture[0, 0]) for picture in (row.target, *row.references)]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


# --- WebDataset -------------------------------------------------------------------------------------------------------


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "a.0.png", "a.1.png"),
        ("a.jpg", "a.1.jpg", "a.2.jpg"),
        ("sub/a.target.png", "sub/a.input_0.png", "sub/a.input_1.png"),
        ("a.output_image.png", "a.ref1.png", "a.ref2.png"),
        ("a.png", "a.reference_01.png", "a.reference_02.png"),
        ("a.png", "a.input_images.0.png", "a.input_images.1.png"),
    ],
    ids=lambda names: names[1],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_row_of_a_tar(tmp_path, names, backwards):
    files = dict(zip(names, (png("red"), png("green"), png("blue")), strict=True))
    stem = names[0].partition(".")[0]
    files[f"{stem}.txt"] = "a prompt\n".encode("utf-16")
    source = open_source(
        data(write_tar(tmp_path / "a.tar", dict(sorted(files.items(), reverse=backwards))), "webdataset")
    )
    row = source[0]
    assert (len(source), row.prompt, colours(row)) == (1, "a prompt", [RED, GREEN, BLUE])
    assert source.check(0)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a.png": png()}, "no instruction"),
        ({"a.txt": b"x"}, "expected one target a.png"),
        ({"a.png": png(), "a.jpg": png(), "a.txt": b"x"}, "expected one target a.png"),
        ({"a.png": png(), "a.depth.png": png(), "a.txt": b"x"}, "a.depth.png is neither target, mask nor numbered"),
        ({"a.png": png(), "a.mask.png": png(), "a.mask.jpg": png(), "a.txt": b"x"}, "expected one mask, got a.mask"),
        ({"a.png": png(), "a.2.png": png(), "a.txt": b"x"}, r"without gaps from 0 or 1, got \[2\]"),
        ({"a.png": png(), "a.0.png": png(), "a.2.png": png(), "a.txt": b"x"}, r"got \[0, 2\]"),
        ({"a.png": png(), "a.1.png": png(), "a.1.jpg": png(), "a.txt": b"x"}, r"got \[1, 1\]"),
        ({"a.png": png(), "a.json": b"{"}, "a.json is not valid JSON"),
        ({"a.png": png(), "a.json": b'{"text": "x"}'}, "expected one of the keys instruction, caption, prompt"),
        ({"a.png": b"no picture", "a.txt": b"x"}, "cannot be read as a picture"),
        ({"a.png": png(), "a.1.jfif": png(), "a.2.psd": b"", "a.txt": b"x"}, "a.2.psd is read neither as a picture"),
        ({"a.png": png(), "a.image_1": png(), "a.txt": b"x"}, "a.image_1 is read neither as a picture nor as a label"),
        ({"a": png(), "a.png": png(), "a.txt": b"x"}, "^a is read neither as a picture nor as a label"),
        ({"a.png": png(), "a.mask.npy": b"", "a.txt": b"x"}, "a.mask.npy is read neither"),
        ({"a.png": png(), "a.ref_1.npz": b"", "a.txt": b"x"}, "a.ref_1.npz is read neither"),
        ({"a.png": png(), "a.depth.avif": png(), "a.txt": b"x"}, "a.depth.avif is neither target, mask nor numbered"),
    ],
    ids=str,
)
def test_rows_of_a_tar_that_are_not_certain_are_refused(tmp_path, files, why):
    source = open_source(data(write_tar(tmp_path / "a.tar", files), "webdataset"))
    assert source.name(0) == "a in a.tar"
    with pytest.raises(BadRow, match=why):
        source.check(0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_of_a_tar_may_have_any_ending_that_is_read(tmp_path, ending):
    files = {"a.png": png("red"), f"a.image_1{ending}": png("green"), f"a.2{ending.upper()}": png("blue")}
    files |= {f"a.mask{ending}": png("white"), "a.txt": b"a prompt"}
    source = open_source(data(write_tar(tmp_path / "a.tar", files), "webdataset"))
    assert colours(source[0]) == [RED, GREEN, BLUE]
    assert source[0].mask is not None


def test_labels_and_arrays_that_tars_carry_are_left_aside(tmp_path):
    extra = ("cls", "json", "xml", "pyd", "clip.npy", "score.cls", "1.json", "mask.json", "0.txt", "mp3", "CLS")
    files = {
        "a.png": png("red"),
        "a.1.png": png("green"),
        "a.txt": b"a prompt",
        **{f"a.{name}": b"1" for name in extra},
    }
    source = open_source(data(write_tar(tmp_path / "a.tar", files), "webdataset"))
    assert colours(source[0]) == [RED, GREEN]


def test_many_tars_by_folder_and_pattern(tmp_path):
    for i in range(12):
        row = {f"{i}.png": png(), f"{i}.json": json.dumps({"caption": f"tar {i}"}).encode()}
        write_tar(tmp_path / f"s-{i:02d}.tar", row)
    everything = open_source(data(tmp_path, "webdataset"))
    assert [everything[i].prompt for i in (0, 11)] == ["tar 0", "tar 11"]
    some = open_source(data(tmp_path / "s-{03..05}.tar", "webdataset"))
    assert [some[i].prompt for i in range(len(some))] == ["tar 3", "tar 4", "tar 5"]
    assert len(open_source(data(tmp_path / "s-0*.tar", "webdataset"))) == 10
    assert len(open_source(data(tmp_path, "webdataset", samples=4))) == 4
    with pytest.raises(ConfigError, match=r"s-12\.tar does not exist"):
        open_source(data(tmp_path / "s-{11..12}.tar", "webdataset"))
    with pytest.raises(ConfigError, match="there is no tar"):
        open_source(data(tmp_path / "x*.tar", "webdataset"))


def test_patterns_count_as_shells_do():
    assert expanded("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expanded("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]


def test_what_is_no_plain_tar_is_refused(tmp_path):
    compressed = write_tar(tmp_path / "a.tar", {"a.png": png()}, "w:gz")
    with pytest.raises(ConfigError, match="not an uncompressed tar"):
        open_source(data(compressed, "webdataset"))


# --- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path, rows, group=2):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def parquet_rows(count):
    picture = {"bytes": png("red"), "path": None}
    references = [{"bytes": png("green"), "path": None}, {"bytes": png("blue"), "path": None}]
    return [
        {"input_images": references[: i % 3], "instruction": f"row {i}", "output_image": picture} for i in range(count)
    ]


def test_rows_of_parquet_files(tmp_path):
    rows = parquet_rows(7)
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "0.parquet", rows[:5])
    write_parquet(tmp_path / "set" / "1.parquet", rows[5:])
    source = open_source(data(tmp_path / "set", "parquet"))
    for i in (6, 2, 0, 5, 4):
        assert source[i].prompt == f"row {i}"
        assert colours(source[i]) == [RED, GREEN, BLUE][: 1 + i % 3]
    checked = check_rows(data(tmp_path / "set", "parquet", workers=0))
    assert len(checked.source) == 7
    assert checked.bad == {}


def test_what_is_no_parquet(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ConfigError, match=r"a\.parquet is not a parquet file"):
        open_source(data(tmp_path / "a.parquet", "parquet"))
    write_parquet(tmp_path / "a.parquet", [{"image": b"", "instruction": ""}])
    with pytest.raises(ConfigError, match="has no column input_images, output_image"):
        open_source(data(tmp_path / "a.parquet", "parquet"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="which has none"):
        open_source(data(tmp_path / "none", "parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"comfyui-unipic\[parquet\]"):
        open_source(data(tmp_path / "a.parquet", "parquet"))


# --- folders of references --------------------------------------------------------------------------------------------


def folder_of(place, names, **values):
    for i, name in enumerate(names):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("a prompt")
        else:
            path.write_bytes(png((i, 0, 0)))
    return open_source(data(place, "folder", **values))


@pytest.mark.parametrize(
    ("references", "values"),
    [
        (["control/s.png"], {}),
        (["controls/s_0.png", "controls/s_1.png"], {}),
        (["control_1/s.png", "control_2/s.png"], {}),
        (["References/s_1.png", "References/s_2.png", "References/s_3.png"], {}),
        (["../other/s.png"], {"controls": ("../other",)}),
        (["b/s.png", "a/s.png"], {"controls": ("b", "a")}),
    ],
    ids=str,
)
def test_references_in_folders_of_their_own(tmp_path, references, values):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt", *references], **values)
    assert [source.name(i) for i in range(len(source))] == ["s"]
    pictures = [p.resolve().relative_to(tmp_path.resolve()) for p in source.read(0).references]
    assert pictures == [(tmp_path / "set" / r).resolve().relative_to(tmp_path.resolve()) for r in references]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["control/other.png"], "expected one picture named s in control, got 0"),
        (["control/s.png", "control/s.jpg"], "expected one picture named s in control, got 2"),
        (["control/s.png", "control/s_1.png"], "control has s and s_1; keep the one or the numbered ones"),
        (["control/s_1.png", "control/s_3.png"], "number 2 is missing"),
        (["control_1/s.png", "control_2/t.png"], "expected one picture named s in control_2, got 0"),
        (["control/s.png", "s_1.png"], r"references beside it \(s_1\) and a folder of references \(control\)"),
        (["control/s_1.png", "s_1.txt", "s_1.webp"], "s_1 has a caption"),
        (["s-masklabel.png"], "s-masklabel has no caption and no number, so it may belong to s"),
        (["s_control.png"], "s_control has no caption and no number, so it may belong to s"),
        (["s_1.psd"], "s_1.psd is not read as a picture; save it as PNG or JPEG, or remove it"),
        (["s_1.png", "s-2.JXL"], "s-2.JXL is not read as a picture"),
        (["s_1"], "s_1 is not read as a picture"),
        (["s_mask.npy"], "s_mask.npy is not read as a picture"),
        (["masks/s.json"], "s.json is not read as a picture"),
        (["control/s_1.png", "control/s_2.psd"], "s_2.psd is not read as a picture"),
        (["s.heic"], "expected one picture named s, got 2"),
    ],
    ids=str,
)
def test_references_that_are_not_certain_leave_their_target_out(tmp_path, more, why):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt", *more])
    bad = []
    for i in range(len(source)):
        with pytest.raises(BadRow) as error:
            source.check(i)
        bad.append(str(error.value))
    assert any(re.search(why, reason) for reason in bad), bad


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_of_a_folder_may_have_any_ending_that_is_read(tmp_path, ending):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt", f"s_1{ending}", f"s_2{ending.upper()}", f"s_mask{ending}"])
    record = source.read(0)
    assert [path.stem for path in record.references] == ["s_1", "s_2"]
    assert record.mask.stem == "s_mask"


def test_files_that_are_no_references_leave_their_target_in(tmp_path):
    names = ["s.png", "s.txt", "s_1.png", "s_1.json", "s.npz", "s_note.psd", "t_2.psd", "._s_2.psd", "s_1.png.part"]
    source = folder_of(tmp_path / "set", names)
    assert len(source.read(0).references) == 1


def test_captions_of_references_are_not_targets(tmp_path):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt", "control/s.png", "control/s.txt"])
    assert [source.name(i) for i in range(len(source))] == ["s"]
    assert len(source.read(0).references) == 1


def test_pictures_that_nobody_reads_are_told(tmp_path):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt", "control/s.png", "control/lost.png", "elsewhere/t.png"])
    assert "the subfolder elsewhere is not read" in source.note
    assert "1 pictures of control belong to no target, first lost" in source.note
    with pytest.raises(ConfigError, match="data.controls: expected folders of references"):
        folder_of(tmp_path / "set", [], controls=("nowhere",))


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_of_other_programs(tmp_path, encoding):
    """A caption and a JSONL in each encoding; without a mark UTF-16 is refused, not guessed."""
    line = {"input_images": [], "instruction": "grün 绿", "output_image": "t.png"}
    (tmp_path / "t.png").write_bytes(png())
    (tmp_path / "t.txt").write_bytes("grün 绿\r\n".encode(encoding))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes("\n".join(json.dumps(line, ensure_ascii=False) for _ in range(3)).encode(encoding))
    captioned = open_source(data(tmp_path, "folder"))
    if encoding == "utf-16-le":
        with pytest.raises(BadRow, match="UTF-16 without a byte order mark; save it as UTF-8"):
            captioned.read(0)
        return
    listed = open_source(data(rows, "jsonl"))
    assert captioned.read(0).prompt == listed.read(2).prompt == "grün 绿"
    assert (len(listed), listed.name(2)) == (3, "line 3")


def test_other_encodings_are_not_guessed(tmp_path):
    source = folder_of(tmp_path / "set", ["s.png", "s.txt"])
    (tmp_path / "set" / "s.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(BadRow, match=r"s.txt is not UTF-8 .* save it as UTF-8"):
        source.read(0)


def test_paths_with_backslashes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "t.png").write_bytes(png())
    lines = [{"input_images": [r"images\t.png"], "instruction": "a", "output_image": r"images\t.png"}]
    lines.append({**lines[0], "output_image": r"..\secret.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(data(tmp_path / "rows.jsonl", "jsonl"))
    assert len(source[0].references) == 1
    with pytest.raises(BadRow, match="leaves the folder of the pictures"):
        source.check(1)
    (tmp_path / r"images\t.png").write_bytes(png("blue"))  # a name of its own where the system allows it
    assert colours(source[0])[0] == BLUE
