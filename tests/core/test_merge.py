"""Merging: the sums, both forms, what the recipe says, nothing half-written or lost, a few tensors in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unipic_core import merge as merging
from unipic_core.checkpoints import expected_shapes, load_transformer, read_config
from unipic_core.cli import main
from unipic_core.convert import convert, quantise_fp8
from unipic_core.errors import CheckpointError, LoRAError
from unipic_core.inspect import describe
from unipic_core.lora import save_lora
from unipic_core.merge import merge, plan_shards
from unipic_core.mmdit import MMDiTConfig
from unipic_core.recipe import Recipe
from unipic_core.saving import write_safetensors

TINY = Path(__file__).parents[1] / "golden" / "tiny"
SOURCE = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
LAYERS = ("img_in", "transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2")
STUDENT = Recipe(steps=4, guidance=1.0, sampler="consistency", made={"by": "dmd"})
CAUSAL = Recipe(attention_form="prefix_causal")
CAUTION = (
    "its attention is prefix_causal, which only unipic and the node LoadUniPic compute; "
    "other programs read it as full and make wrong pictures without an error"
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(SOURCE)


def make_lora(path: Path, seed: int, recipe: Recipe | None = None) -> dict[str, Tensor]:
    """Writes a LoRA; returns what strength 1 adds, by parameter."""
    shapes, g = expected_shapes(read_config(TINY)), torch.Generator().manual_seed(seed)
    draw = lambda *size: (torch.randn(size, generator=g) * 0.1).bfloat16()  # noqa: E731
    pairs = {n: (draw(4, shapes[f"{n}.weight"][1]), draw(shapes[f"{n}.weight"][0], 4)) for n in LAYERS}
    save_lora(path, pairs, recipe=recipe)
    return {f"{n}.weight": up.float() @ down.float() for n, (down, up) in pairs.items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    make_lora(folder / "student.safetensors", 1, STUDENT)
    return folder / "student.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is written ---


def test_two_loras_at_their_strengths_are_summed_and_rounded_once(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    first = make_lora(tmp_path / "a.safetensors", 1)
    second = make_lora(tmp_path / "b.safetensors", 2)
    loras = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -1.5)]
    expected = {n: w + 0.5 * first[n] - 1.5 * second[n] if n in first else w for n, w in weights.items()}
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        reports = merge(TINY, tmp_path / f"{dtype}.safetensors", loras, dtype=dtype)
        stored = load_file(tmp_path / f"{dtype}.safetensors")
        assert [r.matched for r in reports] == [3, 3]
        assert set(stored) == set(weights)
        for name, tensor in stored.items():
            assert tensor.dtype is kind
            torch.testing.assert_close(tensor.float(), expected[name], atol=1e-6, rtol=2**-8 if dtype == "bf16" else 0)
    whole, rounded = load_file(tmp_path / "fp32.safetensors"), load_file(tmp_path / "bf16.safetensors")
    assert all(torch.equal(rounded[n], whole[n].bfloat16()) for n in whole)


def test_the_form_is_the_sources_own_unless_said(tmp_path: Path, lora: Path) -> None:
    for form, dtypes in (("fp32", {"float32"}), ("bf16", {"bfloat16"}), ("fp8_scaled", {"float8_e4m3fn", "bfloat16"})):
        source = convert(TINY, tmp_path / f"{form}.safetensors", dtype=form)
        merge(source, tmp_path / f"{form}-merged.safetensors", [(lora, 1.0)])
        assert set(describe(tmp_path / f"{form}-merged.safetensors")["dtypes"]) == dtypes
    merge(source, tmp_path / "folder", [(lora, 1.0)])
    assert set(describe(tmp_path / "folder")["dtypes"]) == {"bfloat16"}


def test_scaled_fp8_is_multiplied_out_merged_in_float32_and_quantised_again(tmp_path: Path) -> None:
    delta = make_lora(tmp_path / "l.safetensors", 1)
    before = load_file(convert(TINY, tmp_path / "fp8.safetensors", dtype="fp8_scaled"))
    merge(tmp_path / "fp8.safetensors", tmp_path / "o.safetensors", [(tmp_path / "l.safetensors", 1.0)])
    after = load_file(tmp_path / "o.safetensors")
    assert set(after) == set(before)
    for name, scale in before.items():
        if name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            whole = before[weight].float() * scale + delta.get(weight, torch.zeros(()))
            values, new_scale = quantise_fp8(whole)
            assert torch.equal(after[name], new_scale)
            # products may be summed in another order: at most one number in a thousand rounds the other way
            assert (after[weight].float() != values.float()).float().mean() <= 1e-3


def test_a_folder_holds_the_whole_pipeline(out: Path, lora: Path, weights: dict[str, Tensor]) -> None:
    diffusers = pytest.importorskip("diffusers")
    merge(TINY, out / "model", [(lora, 1.0)])
    merge(TINY, out / "one.safetensors", [(lora, 1.0)])
    made, source, one = files(out / "model"), files(TINY), load_file(out / "one.safetensors")
    assert set(made) == {*source, "recipe.json"}
    assert all(made[n] == source[n] for n in source if not n.startswith("transformer/"))
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(out / "model" / "transformer")
    ours = load_transformer(out / "model").state_dict()
    assert set(ours) == set(theirs.state_dict()) == set(one)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, one[name])
        assert torch.equal(ours[name], one[name])
    assert not torch.equal(one["img_in.weight"], weights["img_in.weight"])
    assert [p.name for p in out.iterdir() if "partial" in p.name or "replaced" in p.name] == []


def test_a_file_becomes_a_transformer_folder(out: Path, lora: Path) -> None:
    merge(SOURCE, out / "model", [(lora, 1.0)])
    assert sorted(files(out / "model")) == [
        "recipe.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert load_transformer(out / "model").config == read_config(TINY)


def test_large_networks_are_written_in_shards(out: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    merge(TINY, out / "whole", [(lora, 1.0)])
    monkeypatch.setattr(merging, "SHARD_BYTES", 300_000)
    seen: list[tuple[int, int]] = []
    merge(TINY, out / "model", [(lora, 1.0)], progress=lambda done, total: seen.append((done, total)))
    shards = sorted((out / "model" / "transformer").glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"diffusion_pytorch_model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    assert sum(sum(t.nbytes for t in load_file(p).values()) <= 300_000 for p in shards) == len(shards)
    index = json.loads((out / "model" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {n: load_file(out / "model" / "transformer" / f)[n].shape for n, f in index["weight_map"].items()}
    whole = load_transformer(out / "whole").state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(out / "model" / "transformer").state_dict()
    ours = load_transformer(out / "model").state_dict()
    assert all(torch.equal(ours[n], whole[n]) and torch.equal(theirs[n], whole[n]) for n in whole)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert describe(out / "model")["recipe"]["steps"] == 4


def test_shards_keep_order_and_size_and_one_large_tensor() -> None:
    sizes = {"a": 4, "b": 4, "c": 20, "d": 1, "e": 9}
    shards = plan_shards({n: (torch.uint8, (s,)) for n, s in sizes.items()}, 10)
    assert [list(s) for s in shards.values()] == [["a", "b"], ["c"], ["d", "e"]]


def test_the_recipe_and_how_it_was_made(tmp_path: Path, out: Path, lora: Path) -> None:
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "recipe.json").write_text(json.dumps({"steps": 50, "reference_budget": 64, "made": {"by": "sft"}}))
    how = {"source": "base", "dtype": "fp32", "loras": [{"name": "student.safetensors", "strength": 0.5}]}
    expected = Recipe(
        steps=4,
        guidance=1.0,
        sampler="consistency",
        reference_budget=64,
        made={"base": {"by": "sft"}, "by": "dmd", "merge": how},
    )
    for name in ("model", "o.safetensors"):
        merge(base, out / name, [(lora, 0.5)])
        assert Recipe.read(out / name) == expected
    # a part taken out of the folder still says what it is
    assert Recipe.read(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors") == expected
    style = tmp_path / "style.safetensors"
    make_lora(style, 2)
    merge(out / "o.safetensors", out / "p.safetensors", [(style, 1.0)])
    again = Recipe.read(out / "p.safetensors")
    assert again is not None
    assert again.steps == 4
    assert again.made["merge"]["loras"] == [{"name": "style.safetensors", "strength": 1.0}]
    assert again.made["merge"]["after"] == how
    assert str(tmp_path) not in again.to_json()


def test_keys_that_are_not_known_are_named(tmp_path: Path, lora: Path) -> None:
    save_file({**load_file(lora), "strange": torch.zeros(1)}, lora)
    with pytest.warns(UserWarning, match=r"student\.safetensors: 1 keys not known here \(strange\)"):
        merge(TINY, tmp_path / "o.safetensors", [(lora, 1.0)])


@pytest.mark.parametrize("dst", ["o.safetensors", "model"])
def test_a_form_that_other_programs_do_not_know_is_named(dst: str, tmp_path: Path) -> None:
    make_lora(tmp_path / "causal.safetensors", 1, CAUSAL)
    with pytest.warns(UserWarning, match=CAUTION) as caught:
        merge(TINY, tmp_path / dst, [(tmp_path / "causal.safetensors", 1.0)])
    assert [str(warning.message) for warning in caught] == [f"{dst}: {CAUTION}"]
    assert caught[0].filename == __file__
    assert load_transformer(tmp_path / dst).config.attention_form == "prefix_causal"
    make_lora(tmp_path / "style.safetensors", 2)  # says nothing of the form: it is the base's
    with pytest.warns(UserWarning, match=f"again.safetensors: {CAUTION}"):
        merge(tmp_path / dst, tmp_path / "again.safetensors", [(tmp_path / "style.safetensors", 1.0)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dst", ["o.safetensors", "model"])
def test_of_full_attention_nothing_is_said(dst: str, out: Path, lora: Path) -> None:
    merge(TINY, out / dst, [(lora, 1.0)])


# --- what is refused ---


@pytest.mark.parametrize(
    ("dst", "how", "message"),
    [
        ("o.bin", {}, "should end in .safetensors or be a folder's name, got o.bin"),
        ("o.safetensors", {"dtype": "int4"}, "dtype should be one of bf16, fp8_scaled, fp32, got 'int4'"),
        ("model", {"dtype": "fp8_scaled"}, "diffusers does not read fp8_scaled"),
        ("absent/o.safetensors", {}, "there is no folder"),
        ("absent/model", {}, "there is no folder"),
    ],
)
def test_wrong_destinations(dst: str, how: dict[str, str], message: str, out: Path, lora: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(TINY, out / dst, [(lora, 1.0)], **how)  # type: ignore[arg-type]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("strength", [0, float("nan"), float("inf"), True, "1"])
def test_strengths_that_change_nothing_or_everything(strength: Any, out: Path, lora: Path) -> None:
    with pytest.raises(LoRAError, match="should be a number other than 0"):
        merge(TINY, out / "o.safetensors", [(lora, strength)])
    with pytest.raises(LoRAError, match="at least one LoRA"):
        merge(TINY, out / "o.safetensors", [])


@pytest.mark.parametrize("dst", ["o.safetensors", "model"])
def test_loras_that_do_not_fit_or_are_damaged(dst: str, tmp_path: Path, out: Path, lora: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    zeros = (torch.zeros(2, 8), torch.zeros(8, 2))
    for layers, message in (
        ({"double_blocks.0.img_attn.qkv": zeros}, "made for another architecture"),
        ({"img_in": zeros}, "made for a model of other sizes"),
        ({"img_in": (torch.full((2, 16), float("nan")), torch.ones(64, 2))}, "img_in.weight holds NaN or infinity"),
    ):
        save_lora(bad, layers)
        with pytest.raises(LoRAError, match=message):
            merge(TINY, out / dst, [(lora, 1.0), (bad, 1.0)])
    bad.write_bytes(lora.read_bytes()[:-10])
    with pytest.raises(LoRAError, match="truncated or damaged"):
        merge(TINY, out / dst, [(lora, 1.0), (bad, 1.0)])
    assert list(out.iterdir()) == []


def test_what_is_there_stays_unless_overwriting_is_asked_for(out: Path, lora: Path) -> None:
    for name in ("o.safetensors", "model"):
        merge(TINY, out / name, [(lora, 1.0)])
    before = files(out)
    for name in ("o.safetensors", "model"):
        with pytest.raises(CheckpointError, match="is there already; choose another name"):
            merge(TINY, out / name, [(lora, 2.0)])
    assert files(out) == before
    for name in ("o.safetensors", "model"):
        merge(TINY, out / name, [(lora, 2.0)], overwrite=True)
    after = files(out)
    assert set(after) == set(before)
    changed = {n for n in after if after[n] != before[n]}
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert changed == {"o.safetensors", weights, "model/recipe.json"}


def test_overwriting_takes_no_source_and_nothing_that_is_no_model(tmp_path: Path, out: Path, lora: Path) -> None:
    base = shutil.copytree(TINY, out / "base")
    inner = shutil.copy(lora, base / "vae" / "lora.safetensors")
    (out / "mine").mkdir()
    (out / "mine" / "photo.jpg").write_text("dear")
    (out / "file").write_text("dear")
    (out / "folder.safetensors").mkdir()
    held = files(out)
    for src, dst, message in (
        (base, base, "part of the source"),
        (base, base / "vae", "part of the source"),
        (base / "transformer", base, "holds the source transformer"),
        (TINY, base, "holds the source lora.safetensors"),
        (TINY, inner, "same file"),
        (TINY, out / "mine", "holds photo.jpg, which is no part of a model, and is not overwritten"),
        (TINY, out / "file", "is a file; name a folder"),
        (TINY, out / "folder.safetensors", "is a folder; name a file in it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge(src, dst, [(inner, 1.0)], overwrite=True)
    assert files(out) == held


@pytest.mark.parametrize("dst", ["o.safetensors", "model"])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad")])
def test_nothing_half_written_is_left(failure: BaseException, older: bool, dst: str, out: Path, lora: Path) -> None:
    if older:
        merge(TINY, out / dst, [(lora, 1.0)])
    before = files(out)

    def stop(done: int, total: int) -> None:
        assert any("partial" in p.name for p in out.iterdir())
        if done > total / 2:
            raise failure

    with pytest.raises(CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        merge(TINY, out / dst, [(lora, 2.0)], overwrite=True, progress=stop)
    if isinstance(failure, OSError):
        what = "not enough room for" if failure.errno == errno.ENOSPC else "cannot write"
        assert f"{what} {out / dst}" in str(error.value)
    assert files(out) == before
    assert [p.name for p in out.iterdir()] == ([dst] if older else [])


def test_an_interrupt_between_the_two_renames_keeps_the_older_folder(
    out: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(TINY, out / "model", [(lora, 1.0)])
    before, replace = files(out), merging.os.replace

    def interrupted(src: Path, dst: Path) -> None:
        replace(src, dst)
        if ".replaced-" in str(dst):
            raise KeyboardInterrupt

    monkeypatch.setattr(merging.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(TINY, out / "model", [(lora, 2.0)], overwrite=True)
    assert files(out) == before


@pytest.mark.parametrize("dst", ["o.safetensors", "model"])
def test_a_full_disk_is_known_before_writing(dst: str, out: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(p.stat().st_size for p in TINY.rglob("*.safetensors")) if dst == "model" else SOURCE.stat().st_size
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 10_000))
    with pytest.raises(CheckpointError, match=r"not enough room for .*GB needed, 0\.0 GB free"):
        merge(TINY, out / dst, [(lora, 1.0)])
    assert list(out.iterdir()) == []


# --- the command ---


def test_the_command(out: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = out / "o.safetensors"
    command = ["merge", str(TINY), str(target), "--lora", f"{lora}=0.5", "--lora", str(lora), "--dtype", "fp8"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert "student.safetensors: 3 layers added at strength 0.5\n" in said.err
    assert "student.safetensors: 3 layers added at strength 1\n" in said.err
    assert main(["info", str(target)]) == 0
    told = capsys.readouterr().out
    assert "float8_e4m3fn" in told
    assert "steps 4, guidance 1.0, sampler consistency" in told
    for arguments, message in (
        (command, f"unipic: {target} is there already; choose another name, or overwrite it with --overwrite"),
        (["merge", str(TINY), str(out / "a"), "--lora", str(out / "no.safetensors")], "there is no file"),
        (["merge", str(out / "no"), str(out / "a"), "--lora", str(lora)], "no file or folder"),
        (["merge", str(TINY / "vae"), str(out / "a"), "--lora", str(lora)], "AutoencoderKLQwenImage, expected"),
        (["merge", str(TINY), str(out / "a"), "--lora", str(SOURCE)], "holds no LoRA layer"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main([*command, "--overwrite"]) == 0
    assert [p.name for p in out.iterdir()] == ["o.safetensors"]


def test_the_command_warns_of_the_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_lora(tmp_path / "causal.safetensors", 1, CAUSAL)
    target = tmp_path / "o.safetensors"
    assert main(["merge", str(TINY), str(target), "--lora", str(tmp_path / "causal.safetensors")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert said.err.count(f"warning: o.safetensors: {CAUTION}\n") == 1


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_the_help_says_who_computes_a_causal_form(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "only unipic and the node LoadUniPic compute it: other programs read the result as full attention" in said


# --- memory ---

MEASURE = """
import sys
import torch
from unipic_core.merge import merge

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024

torch.set_num_threads(1)
tiny, small, source, lora, out = sys.argv[1:]
merge(tiny, out + "/warm.safetensors", [(small, 1.0)], dtype="bf16")
for dst in ("/o.safetensors", "/model"):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    merge(source, out + dst, [(lora, 1.0)], dtype="bf16")
    print(status("VmHWM") - before)
"""


def big_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, torch.full(shape, 0.25, dtype=torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_merging_needs_a_few_tensors_of_memory(tmp_path: Path, out: Path, lora: Path) -> None:
    shapes = expected_shapes(MMDiTConfig(num_layers=6, num_attention_heads=4, joint_attention_dim=512))
    source, large = tmp_path / "big.safetensors", tmp_path / "large.safetensors"
    write_safetensors(source, {n: (torch.bfloat16, s) for n, s in shapes.items()}, big_tensors(shapes), {})
    names = [
        n for n, s in shapes.items() if n.startswith("transformer_blocks.") and n.endswith("weight") and len(s) > 1
    ]
    save_lora(large, {n[:-7]: (torch.zeros(16, shapes[n][1]), torch.zeros(shapes[n][0], 16)) for n in names})
    biggest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    assert source.stat().st_size > 100e6
    command = [sys.executable, "-c", MEASURE, str(TINY), str(lora), str(source), str(large), str(out)]
    root = Path(__file__).parents[2]
    # glibc would keep freed blocks of this size (not those of a 20B network), and they would be counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=root, env=env)
    for peak in map(int, done.stdout.split()):
        assert peak < 5 * biggest + large.stat().st_size, (peak, biggest)
