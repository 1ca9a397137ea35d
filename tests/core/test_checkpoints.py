"""Every storage form gives the same weights; every broken or hostile one gives one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unipic_core.checkpoints import (
    ZERO_COND_MARKER,
    check_keys,
    find_transformer,
    infer_config,
    load_transformer,
    looks_like,
    read_config,
    rope_axes,
)
from unipic_core.errors import CheckpointError
from unipic_core.mmdit import MMDiTConfig
from unipic_core.weights import Weights, open_weights, strip_prefix

TINY = Path(__file__).parents[1] / "golden" / "tiny"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save_shards(folder: Path, state: State, suffix: str = "safetensors") -> None:
    names = sorted(state)
    stem = "diffusion_pytorch_model"
    weight_map = {}
    for i in range(3):
        part = {name: state[name] for name in names[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_bin(folder: Path, content: object, **how: bool) -> Path:
    torch.save(content, folder / "diffusion_pytorch_model.bin", **how)
    return folder


def make_shards(folder: Path, state: State, suffix: str) -> Path:
    save_shards(folder, state, suffix)
    return folder


def make_file(folder: Path, state: State, prefix: str = "", extra: State | None = None) -> Path:
    save_file({**with_prefix(state, prefix), **(extra or {})}, folder / "model.safetensors")
    return folder / "model.safetensors"


FORMS: dict[str, Callable[[Path, State], Path]] = {
    "folder": lambda d, s: TINY / "transformer",
    "pipeline": lambda d, s: TINY,
    "shards": lambda d, s: make_shards(d, s, "safetensors"),
    "bin": make_bin,
    "old bin": lambda d, s: make_bin(d, s, _use_new_zipfile_serialization=False),
    "nested bin": lambda d, s: make_bin(d, {"state_dict": with_prefix(s, "module."), "step": 3}),
    "parameters": lambda d, s: make_bin(d, {"model": {n: torch.nn.Parameter(t) for n, t in s.items()}}),
    "strided bin": lambda d, s: make_bin(d, {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in s.items()}),
    "sharded bin": lambda d, s: make_shards(d, s, "bin"),
    "bare keys": make_file,
    "comfy keys": lambda d, s: make_file(d, s, "model.diffusion_model.", {"vae.decoder.x": torch.zeros(2)}),
    "diffusion_model keys": lambda d, s: make_file(d, s, "diffusion_model."),
    "transformer keys": lambda d, s: make_file(d, s, "transformer."),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(form: str, tmp_path: Path, state: State) -> None:
    path = FORMS[form](tmp_path, state)
    model = load_transformer(path)
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert model.config == read_config(TINY)
    assert not model.training


def test_mapped_tensors_are_the_same_and_never_reach_the_file(tmp_path: Path, state: State) -> None:
    for path in (make_file(tmp_path, state), make_bin(tmp_path, state) / "diffusion_pytorch_model.bin"):
        weights = open_weights(path)
        for name in state:
            tensor = weights.get(name, mapped=True)
            assert torch.equal(tensor, state[name])
            tensor.add_(1)
        assert torch.equal(open_weights(path).get("img_in.weight"), state["img_in.weight"])


def test_prefixes() -> None:
    for prefix in ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.transformer."):
        assert strip_prefix(prefix + "transformer_blocks.0.attn.to_q.weight") == "transformer_blocks.0.attn.to_q.weight"


def test_types_as_stored_or_as_asked(tmp_path: Path, state: State) -> None:
    half = make_file(tmp_path, {n: t.to(torch.bfloat16) for n, t in state.items()})
    assert load_transformer(half).dtype is torch.bfloat16
    assert load_transformer(half, dtype=torch.float32).dtype is torch.float32
    float16 = make_file(tmp_path, {n: t.to(torch.float16) for n, t in state.items()})
    model = load_transformer(float16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    mixed = make_file(tmp_path, {n: t.to(torch.bfloat16) if t.ndim == 2 else t for n, t in state.items()})
    assert {p.dtype for p in load_transformer(mixed).parameters()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="overflows.*bfloat16"):
        load_transformer(half, dtype=torch.float16)


def scaled(state: State) -> tuple[State, State]:
    """(stored fp8 with scales, what it means in float32)."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        if name.startswith("transformer_blocks.") and tensor.ndim == 2:
            scale = torch.tensor(0.0078125)
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "SCALE"] = scale
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = meant[name] = tensor
    return stored, meant


@pytest.mark.parametrize("style", ["comfy_quant", "metadata", "scaled_fp8", "per row"])
def test_scaled_fp8_of_comfyui_is_multiplied_out(style: str, tmp_path: Path, state: State) -> None:
    stored, meant = scaled(state)
    name = "scale_weight" if style == "scaled_fp8" else "weight_scale"
    layers = [n.removesuffix(".SCALE") for n in stored if n.endswith("SCALE")]
    stored = {n.replace("SCALE", name): t for n, t in stored.items()}
    metadata = {}
    if style == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    elif style == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": {n: {"format": "float8_e4m3fn"} for n in layers}})
    else:
        note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        stored |= {f"{n}.comfy_quant": note.clone() for n in layers}
    if style == "per row":
        stored |= {f"{n}.weight_scale": torch.full((len(stored[f"{n}.weight"]), 1), 0.0078125) for n in layers}
    file = tmp_path / "fp8.safetensors"
    save_file(with_prefix(stored, "model.diffusion_model."), file, metadata)
    loaded = load_transformer(file, dtype=torch.float32).state_dict()
    assert set(loaded) == set(meant)
    assert all(torch.equal(loaded[n], meant[n]) for n in meant)


def test_other_quantisations_are_refused_by_name(tmp_path: Path, state: State) -> None:
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    file = make_file(tmp_path, state, extra={"transformer_blocks.0.attn.to_q.comfy_quant": note})
    with pytest.raises(CheckpointError, match=r"quantises transformer_blocks\.0\.attn\.to_q as nvfp4"):
        open_weights(file)


# --- finding and sizes ---


@pytest.mark.parametrize("name", ["transformer", "ema_transformer"])
def test_find_transformer_in_repositories(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY / "transformer", tmp_path / name)
    assert find_transformer(tmp_path) == tmp_path / name
    assert find_transformer(tmp_path / name) == tmp_path / name
    file = tmp_path / name / "diffusion_pytorch_model.safetensors"
    assert find_transformer(file) == file
    assert load_transformer(tmp_path).config.num_layers == 2


def test_a_transformer_folder_without_weights_yields_to_the_ema(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    shutil.copytree(TINY / "transformer", tmp_path / "ema_transformer")
    assert find_transformer(tmp_path).name == "ema_transformer"


def test_sizes_from_shapes_match_the_config(tmp_path: Path, state: State) -> None:
    weights = open_weights(TINY / "transformer")
    assert infer_config(weights) == read_config(TINY)
    marked = make_file(tmp_path, state, "diffusion_model.", {f"diffusion_model.{ZERO_COND_MARKER}": torch.ones(1)})
    assert read_config(marked).zero_cond_t
    assert load_transformer(marked).config.zero_cond_t


def test_the_released_sizes_have_the_released_axes() -> None:
    assert rope_axes(128) == MMDiTConfig().axes_dims_rope == (16, 56, 56)
    assert rope_axes(32) == (8, 12, 12)
    assert rope_axes(64) == (16, 24, 24)
    for head in range(8, 130, 2):
        assert sum(rope_axes(head)) == head
        assert all(n >= 0 and n % 2 == 0 for n in rope_axes(head))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "2"}, "num_layers should be a whole number"),
        ({"num_layers": 10**9}, "num_layers should be a whole number"),
        ({"attention_head_dim": -32}, "attention_head_dim"),
        ({"axes_dims_rope": [8, 8, 8]}, "must add up"),
        ({"axes_dims_rope": "abc"}, "axes_dims_rope"),
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        ({"guidance_embeds": True}, "another architecture"),
        ({"surprise": 1}, "unknown keys.*surprise"),
    ],
)
def test_wrong_configs(change: dict[str, object], message: str, tmp_path: Path) -> None:
    shutil.copytree(TINY / "transformer", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text()) | change
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "t")


# --- keys ---


def test_check_keys_counts_and_names() -> None:
    report = check_keys({"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,), ZERO_COND_MARKER: (1,)})
    assert report.missing == ("a",)
    assert report.unexpected == ("d",)
    assert report.wrong_shape == {"b": ((2, 3), (3, 2))}
    assert not report.fits
    assert str(report) == "1 missing: a; 1 unexpected: d; 1 wrong shape: b (expected [2, 3], got [3, 2])"
    assert check_keys({"a": (1,)}, {"a": (1,)}).fits


def test_missing_unexpected_and_wrong_shapes_are_counted(tmp_path: Path, state: State) -> None:
    changed = {n: t for n, t in state.items() if ".attn.norm_added_q" not in n}
    changed |= {"extra.one": torch.zeros(1), "proj_out.bias": torch.zeros(3)}
    shutil.copy(TINY / "transformer" / "config.json", tmp_path)
    make_file(tmp_path, changed)
    with pytest.raises(CheckpointError) as error:
        load_transformer(tmp_path)
    text = str(error.value)
    assert "2 missing: transformer_blocks.0.attn.norm_added_q.weight" in text
    assert "1 unexpected: extra.one" in text
    assert "1 wrong shape: proj_out.bias (expected [16], got [3])" in text
    assert "a Qwen-Image transformer" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.0.0.weight", "U-Net"),
        ("joint_blocks.0.x_block.weight", "Stable Diffusion 3"),
        ("model.layers.0.embed_tokens.weight", "text encoder"),
        ("decoder.conv_in.weight", "VAE"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA"),
        ("transformer_blocks.0.attn.to_qkv.qweight", "Nunchaku"),
        ("blocks.0.self_attn.q.weight", "Wan"),
        ("nonsense", "unknown weights"),
    ],
)
def test_other_architectures_are_named(name: str, kind: str, tmp_path: Path) -> None:
    assert kind in looks_like([name])
    save_file({name: torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"looks like .*{kind}"):
        load_transformer(tmp_path / "m.safetensors")


def test_other_parts_of_the_pipeline_are_named() -> None:
    with pytest.raises(CheckpointError, match="AutoencoderKLQwenImage"):
        load_transformer(TINY / "vae")
    with pytest.raises(CheckpointError, match="looks like a VAE"):
        load_transformer(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="looks like a text encoder"):
        load_transformer(TINY / "text_encoder" / "model.safetensors")


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


@pytest.mark.parametrize("header", [b"[1, 2]", b"not json", b"[" * 50_000, b'{"__metadata__": {"a": 1}}', b"{}", b"\xff\xff"])
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


@pytest.mark.parametrize("where", ["../out.safetensors", "/etc/passwd", "a/../../out.safetensors", "C:\\x", "..\\out", "", "link"])
def test_an_index_never_leads_out_of_its_folder(where: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    if where == "link":
        (folder / "link").symlink_to(tmp_path)
        where = "link/out.safetensors"
    assert "outside its folder; refused" in one_line(index(folder, {"a": where}))


def test_links_into_the_download_cache_are_followed(tmp_path: Path, state: State) -> None:
    """The Hugging Face cache keeps files under blobs/ and links to them from snapshots/."""
    blobs, folder = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1" / "transformer"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_shards(folder, state)
    for i, file in enumerate(folder.glob("*.safetensors")):
        os.replace(file, blobs / f"{i}")
        file.symlink_to(os.path.relpath(blobs / f"{i}", folder))
    assert len(open_weights(folder)) == len(state)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_an_index_of_the_wrong_form(weight_map: object, tmp_path: Path) -> None:
    assert "not an index" in one_line(index(tmp_path, weight_map))


def test_missing_shards_and_tensors(tmp_path: Path) -> None:
    assert "download is incomplete" in one_line(index(tmp_path, {"a": "absent.safetensors"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    assert "promises 1 tensors that no shard holds, first 'b'" in one_line(index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"}))


def test_weights_describe_without_loading(state: State) -> None:
    weights = open_weights(TINY / "transformer")
    assert isinstance(weights, Weights)
    assert weights.shape("img_in.weight") == (64, 16)
    assert weights.dtype("img_in.weight") is torch.float32
    assert weights.nbytes == sum(t.nbytes for t in state.values())
    with pytest.raises(CheckpointError, match="holds no tensor 'absent'"):
        weights.get("absent")


def test_no_second_copy_is_made(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stored tensor is read once, and becomes the parameter itself when type and place fit."""
    read: list[torch.Tensor] = []
    get = Weights.get

    def recording(self: Weights, name: str, **how: bool) -> torch.Tensor:
        read.append(get(self, name, **how))
        return read[-1]

    monkeypatch.setattr(Weights, "get", recording)
    model = load_transformer(TINY)
    assert len(read) == len(state)
    assert {t.data_ptr() for t in read} == {p.data_ptr() for p in model.parameters()}
