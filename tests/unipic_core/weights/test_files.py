"""Broken and hostile weight files: one clear sentence each, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import TINY
from unipic_core.errors import CheckpointError
from unipic_core.weights.files import open_weights
from unipic_core.weights.transformer import find_transformer, load_transformer

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")


def make_bin(folder: Path, content: object) -> Path:
    torch.save(content, folder / "diffusion_pytorch_model.bin")
    return folder


def make_file(folder: Path, state: State) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


# --- broken files ---


def one_line(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_weights(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1000, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path, state: State) -> None:
    file = make_file(tmp_path, state)
    file.write_bytes(file.read_bytes()[:keep])
    assert "fetch it again" in one_line(file)


def test_safetensors_with_bytes_behind(tmp_path: Path, state: State) -> None:
    file = make_file(tmp_path, state)
    file.write_bytes(file.read_bytes() + b"1234")
    assert "4 bytes behind" in one_line(file)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_length_lies(length: int, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}1234')
    assert "header should be" in one_line(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1]},
        "tensor",
        None,
    ],
)
def test_header_entries_lie(entry: object, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"12345678")
    one_line(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "header", [b"[1, 2]", b"not json", b"[" * 50_000, b'{"__metadata__": {"a": 1}}', b"{}", b"\xff\xff"]
)
def test_headers_that_are_none(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    one_line(tmp_path / "m.safetensors")


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    assert "'b' does not start where" in one_line(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
    ],
)
def test_files_that_are_none(suffix: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / f"m.{suffix}").write_bytes(content)
    assert message in one_line(tmp_path / f"m.{suffix}")


def test_wrong_paths(tmp_path: Path) -> None:
    assert "no file" in one_line(tmp_path / "absent.safetensors")
    assert "found nothing" in one_line(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in one_line(tmp_path)
    assert "not a weight file" in one_line(tmp_path / "notes.txt")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert "2 weight files (a.safetensors, b.safetensors" in one_line(tmp_path)
    with pytest.raises(CheckpointError, match="no transformer in .*expected transformer/"):
        find_transformer(TINY / "scheduler")
    with pytest.raises(CheckpointError, match="no file or folder"):
        find_transformer(tmp_path / "absent")


# --- hostile pickles ---


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not(zipped: bool, tmp_path: Path, state: State) -> None:
    marker = tmp_path / "ran"
    torch.save({**state, "x": Runs(marker)}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    text = one_line(tmp_path / "m.bin")
    assert not marker.exists()
    assert "run code" in text
    assert "mkdir" in text
    with pytest.raises(CheckpointError):
        load_transformer(tmp_path / "m.bin")
    assert not marker.exists()
    torch.load(tmp_path / "m.bin", weights_only=False)
    assert marker.exists(), "the pickle is not hostile, so the test proves nothing"


def test_a_plain_hostile_pickle(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"x": Runs(marker)}))
    one_line(tmp_path / "m.bin")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [3, 100, 5000, -200, -5])
def test_truncated_pickles(keep: int, tmp_path: Path, state: State) -> None:
    make_bin(tmp_path, state)
    file = tmp_path / "diffusion_pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    one_line(file)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.zeros(3), {"a": {"b": {"c": {"d": torch.zeros(1)}}}}])
def test_pickles_without_a_table_of_tensors(content: object, tmp_path: Path) -> None:
    make_bin(tmp_path, content)
    one_line(tmp_path)


def test_a_pickled_tensor_that_reaches_beyond_its_data(tmp_path: Path) -> None:
    make_bin(tmp_path, {"a": torch.arange(16.0), "b": torch.ones(1)})
    source, target = tmp_path / "diffusion_pytorch_model.bin", tmp_path / "short.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, data[:8] if info.filename.endswith("data/0") else data)
    one_line(target)


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 2, 1], [0, 1, 2]])
def test_a_repacked_zip_still_gives_the_right_tensors(order: list[int], tmp_path: Path) -> None:
    """torch guesses where tensors lie from the order it writes them in; the zip's own directory decides."""
    state = {name: torch.full((64,), float(i)) for i, name in enumerate("abc")}
    make_bin(tmp_path, state)
    source, target = tmp_path / "diffusion_pytorch_model.bin", tmp_path / "repacked.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        data = [info for info in old.infolist() if "/data/" in info.filename]
        rest = [info for info in old.infolist() if info not in data]
        for info in (*rest, *(data[i] for i in order)):
            new.writestr(info, old.read(info))
    weights = open_weights(target)
    assert all(torch.equal(weights.get(name), state[name]) for name in state)


# --- shards ---


def index(folder: Path, weight_map: object) -> Path:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "where", ["../out.safetensors", "/etc/passwd", "a/../../out.safetensors", "C:\\x", "..\\out", "", "link"]
)
def test_an_index_never_leads_out_of_its_folder(where: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    if where == "link":
        (folder / "link").symlink_to(tmp_path)
        where = "link/out.safetensors"
    assert "outside its folder; refused" in one_line(index(folder, {"a": where}))


@pytest.mark.parametrize("where", ["a\0.safetensors", "a\ud800.safetensors", "a" * 300 + ".safetensors"])
def test_an_index_of_names_that_no_file_can_have(where: str, tmp_path: Path) -> None:
    said = one_line(index(tmp_path, {"a": where}))
    assert f"index.json names {where[:60]!r}, which no file can be called; fetch it again" in said


def test_links_into_the_download_cache_are_followed(tmp_path: Path, state: State) -> None:
    """The Hugging Face cache keeps files under blobs/ and links to them from snapshots/."""
    blobs, folder = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1" / "transformer"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file(state, blobs / "0123")
    (folder / "1.safetensors").symlink_to(os.path.relpath(blobs / "0123", folder))
    assert len(open_weights(index(folder, dict.fromkeys(state, "1.safetensors")))) == len(state)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_an_index_of_the_wrong_form(weight_map: object, tmp_path: Path) -> None:
    assert "not an index" in one_line(index(tmp_path, weight_map))


def test_missing_shards_and_tensors(tmp_path: Path) -> None:
    assert "download is incomplete" in one_line(index(tmp_path, {"a": "absent.safetensors"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    assert "lists 1 tensors that no shard holds, first 'b'" in one_line(
        index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    )
