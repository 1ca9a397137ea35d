"""Every storage form gives the same weights; every broken or hostile one gives one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import TINY
from unipic_core.errors import CheckpointError
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.convert import convert
from unipic_core.weights.describe import describe
from unipic_core.weights.files import Weights, open_weights, strip_prefix
from unipic_core.weights.formats.quantised import Quantisation
from unipic_core.weights.recipe import RELEASED_FEW_STEP
from unipic_core.weights.transformer import (
    ZERO_COND_MARKER,
    check_keys,
    find_transformer,
    infer_config,
    load_transformer,
    looks_like,
    open_transformer,
    read_config,
    rope_axes,
)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save_shards(folder: Path, state: State, suffix: str = "safetensors") -> None:
    names = sorted(state)
    stem = "diffusion_pytorch_model"
    weight_map: dict[str, str] = {}
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


def with_layer(state: State, settings: object, parts: State, weight: torch.Tensor | None = None) -> State:
    """One layer of the network described as quantised."""
    layer = "transformer_blocks.0.attn.to_q"
    note = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    changed = {} if weight is None else {f"{layer}.weight": weight}
    return {**state, **changed, f"{layer}.comfy_quant": note, **{f"{layer}.{n}": t for n, t in parts.items()}}


def test_quantisations_that_only_comfyui_computes_are_refused_by_name(tmp_path: Path, state: State) -> None:
    shape = state["transformer_blocks.0.attn.to_q.weight"].shape
    packed = torch.zeros(shape[0], shape[1] // 2, dtype=torch.uint8)
    scales = {"weight_scale": torch.zeros(shape[0], shape[1] // 16), "weight_scale_2": torch.ones(())}
    file = make_file(tmp_path, with_layer(state, {"format": "nvfp4"}, scales, packed))
    refused = r"quantises transformer_blocks\.0\.attn\.to_q as nvfp4, which only Load UniPic in ComfyUI reads; use a"
    for use in (load_transformer, open_transformer, lambda f: convert(f, tmp_path / "o.safetensors")):
        with pytest.raises(CheckpointError, match=refused):
            use(file)
    opened = open_transformer(file, any_quantisation=True)
    assert opened.weights.shape("transformer_blocks.0.attn.to_q.weight") == tuple(shape)
    assert opened.parameters == sum(t.numel() for t in state.values())


@pytest.mark.parametrize(
    ("form", "stored", "shape", "fits"),
    [
        ("nvfp4", (64, 40), (60, 72), True),
        ("nvfp4", (64, 40), (20, 72), False),
        ("nvfp4", (64, 40), (60, 40), False),
        ("mxfp8", (64, 96), (40, 72), True),
        ("float8_e4m3fn", (64, 96), (40, 72), False),
        ("convrot_w4a4", (64, 32), (64, 64), True),
        ("int3_future", (64, 12), (64, 64), True),
        ("int3_future", (64,), (64, 64), False),
    ],
)
def test_packed_and_padded_weights_stand_for_smaller_ones(
    form: str, stored: tuple[int, ...], shape: tuple[int, ...], fits: bool
) -> None:
    assert Quantisation(form, {"format": form}, {}).holds(stored, shape) == fits


@pytest.mark.parametrize("scale_shape", [(), (1,), (64,), (64, 1)])
def test_int8_is_multiplied_out(scale_shape: tuple[int, ...], tmp_path: Path, state: State) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    scale = torch.full(scale_shape, 0.01)
    values = torch.randint(-127, 128, state[name].shape, dtype=torch.int8)
    file = make_file(tmp_path, with_layer(state, {"format": "int8_tensorwise"}, {"weight_scale": scale}, values))
    assert torch.equal(open_weights(file).get(name), values.float() * 0.01)
    assert torch.equal(load_transformer(file, dtype=torch.float32).state_dict()[name], values.float() * 0.01)


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ("text", {}, "the quantisation of transformer_blocks.0.attn.to_q cannot be read"),
        ({"format": 3}, {}, "the quantisation of transformer_blocks.0.attn.to_q cannot be read"),
        ({"format": "int8_tensorwise"}, {}, "describes .*to_q as int8_tensorwise and stores it as float32; fetch"),
        ({"format": "float8_e4m3fn"}, {}, "describes .*to_q as float8_e4m3fn and stores it as float32; fetch"),
        ({"format": "x" * 100_000}, {}, "the description of .*to_q is not a short text"),
    ],
)
def test_descriptions_that_do_not_fit(
    settings: object, parts: State, message: str, tmp_path: Path, state: State
) -> None:
    file = make_file(tmp_path, with_layer(state, settings, parts))
    with pytest.raises(CheckpointError, match=message):
        open_weights(file)


def test_scales_that_do_not_fit(tmp_path: Path, state: State) -> None:
    values = torch.zeros(state["transformer_blocks.0.attn.to_q.weight"].shape, dtype=torch.int8)
    for parts, message in (
        ({}, "as int8_tensorwise without its weight_scale; fetch the file again"),
        (
            {"weight_scale": torch.ones(3)},
            r"one per row as the scale of .*to_q, got shape \(3,\)",
        ),
    ):
        file = make_file(tmp_path, with_layer(state, {"format": "int8_tensorwise"}, parts, values))
        with pytest.raises(CheckpointError, match=message):
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
        ({"_class_name": "FluxTransformer2DModel"}, "got one of a FluxTransformer2DModel"),
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


@pytest.mark.parametrize("main", ["0a1b", "../../elsewhere", "absent"])
def test_a_repository_in_the_download_cache(main: str, tmp_path: Path, state: State) -> None:
    """The snapshot of refs/main, else the newest; never a folder outside."""
    repository = tmp_path / "models--Skywork--Unipic3-DMD"
    for i, name in enumerate(("0a1b", "ffff")):
        shutil.copytree(TINY / "transformer", repository / "snapshots" / name / "ema_transformer")
        os.utime(repository / "snapshots" / name, ns=(i, i))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(main)
    wanted = repository / "snapshots" / ("0a1b" if main == "0a1b" else "ffff")
    assert find_transformer(repository) == wanted / "ema_transformer"
    assert open_transformer(repository).recipe == RELEASED_FEW_STEP
    assert describe(repository)["recipe_source"] == "name"
    stored = load_file(convert(repository, tmp_path / "o.safetensors", dtype="fp32"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


def test_gguf_and_nunchaku_name_their_loaders(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "m.safetensors").write_bytes(b"GGUF" + bytes(60))
    for name in ("m.gguf", "m.safetensors"):
        with pytest.raises(CheckpointError, match="is a GGUF file, which only a GGUF loader in ComfyUI reads; use a"):
            load_transformer(tmp_path / name)
    layer = "transformer_blocks.0.attn.to_qkv"
    save_file({f"{layer}.qweight": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "svdq.safetensors")
    for use in (load_transformer, lambda f: open_transformer(f, any_quantisation=True)):
        with pytest.raises(
            CheckpointError, match="is quantised by Nunchaku .*, which only the loader of ComfyUI-nunch"
        ):
            use(tmp_path / "svdq.safetensors")


# --- keys ---


def test_check_keys_counts_and_names() -> None:
    report = check_keys(
        {"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,), ZERO_COND_MARKER: (1,)}
    )
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
    with pytest.raises(CheckpointError, match=f"looks like .*{kind}|is quantised by {kind}"):
        load_transformer(tmp_path / "m.safetensors")


def test_other_parts_of_the_pipeline_are_named() -> None:
    with pytest.raises(CheckpointError, match="AutoencoderKLQwenImage"):
        load_transformer(TINY / "vae")
    with pytest.raises(CheckpointError, match="looks like a VAE"):
        load_transformer(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="looks like a text encoder"):
        load_transformer(TINY / "text_encoder" / "model.safetensors")


# --- reading ---


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
