"""Conversion: same weights out, ComfyUI's fp8 form, nothing half-written, about one tensor in memory."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.paths import ROOT, TINY
from unipic_core.errors import CheckpointError
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.convert import convert, quantise_fp8
from unipic_core.weights.recipe import RELEASED_FEW_STEP, Recipe
from unipic_core.weights.transformer import (
    CONFIG_KEY,
    ZERO_COND_MARKER,
    expected_shapes,
    is_block_matrix,
    load_transformer,
    read_config,
)
from unipic_core.weights.write import write_safetensors

SOURCE = TINY / "transformer" / "diffusion_pytorch_model.safetensors"


def test_float32_is_the_same_file_of_weights(tmp_path: Path) -> None:
    out = convert(TINY, tmp_path / "out.safetensors", dtype="fp32")
    stored, source = load_file(out), load_file(SOURCE)
    assert set(stored) == set(source)
    assert all(torch.equal(stored[n], source[n]) for n in source)
    assert list(tmp_path.iterdir()) == [out]


def test_a_form_that_other_programs_do_not_know_is_named(tmp_path: Path) -> None:
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "recipe.json").write_text(json.dumps({"attention_form": "reference_causal"}))
    with pytest.warns(UserWarning, match=r"^out\.safetensors: its attention form is reference_causal, which"):
        out = convert(base, tmp_path / "out.safetensors")
    assert read_config(out).attention_form == "reference_causal"
    with pytest.warns(UserWarning, match=r"^again\.safetensors: its attention form is reference_causal"):
        convert(out, tmp_path / "again.safetensors")


@pytest.mark.filterwarnings("error")
def test_of_full_attention_nothing_is_said(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "out.safetensors")


def test_bfloat16_from_every_kind_of_source(tmp_path: Path) -> None:
    source = load_file(SOURCE)
    torch.save(source, tmp_path / "m.bin")
    save_file({f"model.diffusion_model.{n}": t for n, t in source.items()}, tmp_path / "m.safetensors")
    for src in (TINY, TINY / "transformer", tmp_path / "m.bin", tmp_path / "m.safetensors"):
        stored = load_file(convert(src, tmp_path / "out.safetensors", overwrite=True))
        assert set(stored) == set(source)
        assert all(torch.equal(stored[n], source[n].bfloat16()) for n in source)


def test_metadata_brings_config_recipe_and_origin(tmp_path: Path) -> None:
    src = tmp_path / "mine"
    shutil.copytree(TINY / "transformer", src / "transformer")
    (src / "recipe.json").write_text(json.dumps({"steps": 6, "made": {"by": "sft"}, "unknown": 1}))
    out = convert(src, tmp_path / "out.safetensors")
    with safe_open(out, "pt") as f:
        metadata = f.metadata()
    assert metadata["format"] == "pt"
    assert MMDiTConfig.from_dict(json.loads(metadata[CONFIG_KEY])) == read_config(TINY)
    recipe = Recipe.read(out)
    assert recipe is not None
    assert (recipe.steps, recipe.extra) == (6, {"unknown": 1})
    assert recipe.made == {"by": "sft", "convert": {"source": "mine", "dtype": "bf16"}}
    assert str(tmp_path) not in json.dumps(metadata)


def test_released_weights_get_their_recipe_by_name(tmp_path: Path) -> None:
    shutil.copytree(TINY / "transformer", tmp_path / "Unipic3-DMD" / "ema_transformer")
    recipe = Recipe.read(convert(tmp_path / "Unipic3-DMD", tmp_path / "out.safetensors"))
    assert recipe is not None
    assert (recipe.steps, recipe.sampler) == (RELEASED_FEW_STEP.steps, RELEASED_FEW_STEP.sampler)


def test_fp8_is_written_as_comfyui_reads_it_and_reads_back(tmp_path: Path) -> None:
    source = load_file(SOURCE)
    out = convert(TINY, tmp_path / "out.safetensors", dtype="fp8_scaled")
    stored = load_file(out)
    layers = [n.removesuffix(".weight") for n in source if n.startswith("transformer_blocks.") and source[n].ndim == 2]
    assert len(layers) == 2 * 14
    for layer in layers:
        weight, scale = stored[f"{layer}.weight"], stored[f"{layer}.weight_scale"]
        assert weight.dtype is torch.float8_e4m3fn
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        note = json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist()))
        assert note == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        # three mantissa bits: half a step is 1/16 of the number, or of the smallest normal one
        limit = source[f"{layer}.weight"].abs() / 16 + scale * 2**-9
        assert ((weight.float() * scale - source[f"{layer}.weight"]).abs() <= limit).all()
    others = set(stored) - {f"{n}.{part}" for n in layers for part in ("weight", "weight_scale", "comfy_quant")}
    assert others == set(source) - {f"{n}.weight" for n in layers}
    assert {stored[n].dtype for n in others} == {torch.bfloat16}

    model = load_transformer(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        expected = stored[name].float() * stored.get(name + "_scale", torch.ones(()))
        assert torch.equal(parameter, expected.bfloat16())
    again = load_file(convert(out, tmp_path / "again.safetensors", dtype="fp8_scaled"))
    assert all(torch.equal(again[n].float(), stored[n].float()) for n in stored)


def test_fp8_scales_are_exact_in_bfloat16() -> None:
    for seed in range(20):
        weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 3 - 4)
        values, scale = quantise_fp8(weight)
        assert scale.bfloat16().float() == scale
        assert 440 <= values.float().abs().max() <= 448
    values, scale = quantise_fp8(torch.zeros(4, 4))
    assert scale == 1
    assert not values.float().any()
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantise_fp8(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_scaled"])
def test_unscaled_fp8_is_a_source_like_any_other(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """All tensors cast, as files named fp8_e4m3fn hold them, norms and biases too."""
    source = {name: tensor.to(stored) for name, tensor in load_file(SOURCE).items()}
    save_file(source, tmp_path / "fp8.safetensors")
    model = load_transformer(convert(tmp_path / "fp8.safetensors", tmp_path / "o.safetensors", dtype=dtype))
    for name, parameter in model.state_dict().items():
        want, got = source[name].float(), parameter.float()
        if dtype == "fp8_scaled" and is_block_matrix(name, want.shape):
            assert ((got - want).abs() <= want.abs() / 8 + want.abs().max() * 2**-15).all()
        else:
            assert torch.equal(got, want)


def test_every_tensor_is_aligned_for_its_type(tmp_path: Path) -> None:
    out = convert(TINY, tmp_path / "out.safetensors", dtype="fp8_scaled")
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    header.pop("__metadata__")
    assert all((8 + length + e["data_offsets"][0]) % sizes[e["dtype"]] == 0 for e in header.values())


def test_zero_cond_t_survives(tmp_path: Path) -> None:
    shutil.copytree(TINY / "transformer", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text()) | {"zero_cond_t": True}
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    out = convert(tmp_path / "t", tmp_path / "out.safetensors")
    assert load_file(out)[ZERO_COND_MARKER].shape == (0,)  # as ComfyUI's network has it
    assert load_transformer(out).config.zero_cond_t
    assert ZERO_COND_MARKER in load_file(convert(out, tmp_path / "again.safetensors"))


def test_progress_reaches_the_files_size(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = convert(TINY, tmp_path / "o.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (out.stat().st_size,) * 2
    assert seen == sorted(seen)


# --- failures ---


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("o.safetensors", {"dtype": "int4"}, "dtype should be one of bf16, fp8_scaled, fp32, got 'int4'"),
        ("o.bin", {}, "should end in .safetensors"),
        (".", {}, "is a folder"),
        ("absent/o.safetensors", {}, "there is no folder"),
    ],
)
def test_wrong_arguments(name: str, how: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(TINY, tmp_path / name, **how)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    out = convert(TINY, tmp_path / "o.safetensors")
    content = out.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(out)
    for dst in (out, tmp_path / "link.safetensors"):
        with pytest.raises(CheckpointError, match="same file"):
            convert(out, dst)
    assert out.read_bytes() == content


def test_no_file_of_the_source_is_overwritten(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    held = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    for dst in held:
        for src in (folder, folder / "transformer"):
            if dst.is_relative_to(src):
                with pytest.raises(CheckpointError, match="part of the source"):
                    convert(src, dst)
    index = tmp_path / "model.safetensors.index.json"
    shard = shutil.copy(SOURCE, tmp_path / "shard.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(SOURCE), "shard.safetensors")}))
    held[shard] = shard.read_bytes()
    with pytest.raises(CheckpointError, match="same file"):
        convert(index, shard)
    assert all(p.read_bytes() == content for p, content in held.items())


def test_a_file_that_is_there_or_appears_is_not_overwritten_unasked(tmp_path: Path) -> None:
    dst = tmp_path / "o.safetensors"

    def appears(done: int, total: int) -> None:
        dst.write_text("dear")

    with pytest.raises(CheckpointError, match=r"o\.safetensors appeared while this was written, so it stays"):
        convert(TINY, dst, progress=appears)
    with pytest.raises(CheckpointError, match=r"o\.safetensors already exists; choose another name, or overwrite it"):
        convert(TINY, dst)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("o.safetensors", "dear")]
    convert(TINY, dst, overwrite=True)
    assert set(load_file(dst)) == set(load_file(SOURCE))


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), ValueError()]
)
def test_nothing_half_written_is_left_and_the_older_file_stays(failure: BaseException, tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").write_text("older")

    def stop(done: int, total: int) -> None:
        assert [p.name for p in tmp_path.iterdir() if "partial" in p.name]
        if done > total / 2:
            raise failure

    with pytest.raises(CheckpointError if isinstance(failure, OSError) else type(failure)) as error:
        convert(TINY, tmp_path / "o.safetensors", overwrite=True, progress=stop)
    if isinstance(failure, OSError):
        assert ("not enough room" if failure.errno == errno.ENOSPC else "cannot write") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["o.safetensors"]
    assert (tmp_path / "o.safetensors").read_text() == "older"


def test_a_full_disk_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"not enough room for .*GB needed, 0\.0 GB free"):
        convert(TINY, tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_source_cut_short_while_reading(tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path / "m.safetensors")

    def cut(done: int, total: int) -> None:
        with open(tmp_path / "m.safetensors", "r+b") as f:
            f.truncate(SOURCE.stat().st_size // 2)

    with pytest.raises(CheckpointError, match="ends .* bytes too early"):
        convert(tmp_path / "m.safetensors", tmp_path / "o.safetensors", progress=cut)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- memory ---

MEASURE = """
import sys
import torch
from unipic_core.weights.convert import convert
from unipic_core.weights.files import open_weights

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024

def peak(work):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

torch.set_num_threads(1)
tiny, out, *sources = sys.argv[1:]
convert(tiny, out, dtype="fp8_scaled")
for source in sources:
    print(peak(lambda: convert(source, out, dtype="fp8_scaled", overwrite=True)))
weights = open_weights(sources[0])
print(peak(lambda: [weights.get(name) for name in weights]))
"""


def big_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes.items():
        yield name, torch.full(shape, 0.25, dtype=torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_conversion_needs_about_one_tensor_of_memory(tmp_path: Path) -> None:
    config = MMDiTConfig(num_layers=4, num_attention_heads=4, joint_attention_dim=512)
    shapes = expected_shapes(config)
    source, pickled = tmp_path / "big.safetensors", tmp_path / "big.bin"
    described = {n: (torch.bfloat16, s) for n, s in shapes.items()}
    write_safetensors(source, described, big_tensors(shapes), {})
    torch.save(dict(big_tensors(shapes)), pickled)
    size = source.stat().st_size
    assert size > 70e6
    command = [sys.executable, "-c", MEASURE, str(TINY), str(tmp_path / "o.safetensors"), str(source), str(pickled)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    streamed, streamed_pickle, whole = map(int, done.stdout.split())
    assert whole > 0.6 * size, "the measurement does not see memory"
    assert streamed < 30e6
    assert streamed_pickle < 30e6
