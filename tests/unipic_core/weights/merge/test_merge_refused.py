"""Merging: what is refused, and nothing half-written or lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import TINY
from tests.unipic_core.weights.merge.small_loras import SOURCE, files
from unipic_core import replacing as merging
from unipic_core.errors import CheckpointError, LoRAError
from unipic_core.weights.lora import save_lora
from unipic_core.weights.merge import merge


@pytest.mark.parametrize(
    ("dst", "how", "message"),
    [
        ("o.bin", {}, "should end in .safetensors or be a folder's name, got o.bin"),
        ("o.safetensors", {"dtype": "int4"}, "dtype should be one of bf16, fp8_scaled, fp32, got 'int4'"),
        ("model", {"dtype": "fp8_scaled"}, "which diffusers does not read"),
        ("absent/o.safetensors", {}, "there is no folder"),
        ("absent/model", {}, "there is no folder"),
    ],
)
def test_wrong_destinations(dst: str, how: dict[str, str], message: str, out: Path, lora: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(TINY, out / dst, [(lora, 1.0)], **how)  # type: ignore[arg-type]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("strength", [0, float("nan"), float("inf"), True, "1", pytest.param(10**400, id="huge")])
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
        ({"double_blocks.0.img_attn.qkv": zeros}, "choose a LoRA for Qwen-Image-Edit"),
        ({"img_in": zeros}, "choose a LoRA for a model of these sizes"),
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
        with pytest.raises(CheckpointError, match="already exists; choose another name"):
            merge(TINY, out / name, [(lora, 2.0)])
    assert files(out) == before
    for name in ("o.safetensors", "model"):
        merge(TINY, out / name, [(lora, 2.0)], overwrite=True)
    after = files(out)
    assert set(after) == set(before)
    changed = {n for n in after if after[n] != before[n]}
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert changed == {"o.safetensors", weights, "model/recipe.json", "model/unipic_files.json"}


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
        (TINY, out / "mine", "holds photo.jpg, which merge did not write, so the folder is not overwritten"),
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
