"""Merging: the sums, both forms, what the recipe says, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.paths import TINY
from tests.unipic_core.weights.merge.small_loras import SOURCE, files, make_lora
from unipic_core.cli import main
from unipic_core.weights import merge as merging
from unipic_core.weights.convert import convert, quantise_fp8
from unipic_core.weights.describe import describe
from unipic_core.weights.merge import merge, plan_shards
from unipic_core.weights.model_files import MANIFEST
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer, read_config

CAUSAL = Recipe(attention_form="prefix_causal")
CAUTION = (
    "its attention form is prefix_causal, which only unipic and the node Load UniPic compute; "
    "other programs compute full attention and give wrong pictures without an error"
)


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
    assert set(made) == {*source, "recipe.json", MANIFEST}
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
        MANIFEST,
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
    with pytest.warns(UserWarning, match=r"student\.safetensors: 1 keys match no layer of the network \(strange\)"):
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
        (command, f"unipic: {target} already exists; choose another name, or overwrite it with --overwrite"),
        (["merge", str(TINY), str(out / "a"), "--lora", str(out / "no.safetensors")], "there is no file"),
        (["merge", str(out / "no"), str(out / "a"), "--lora", str(lora)], "no file or folder"),
        (["merge", str(TINY / "vae"), str(out / "a"), "--lora", str(lora)], "got one of a AutoencoderKLQwenImage"),
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
    assert "only unipic and the node Load UniPic compute it: other programs compute full attention" in said
