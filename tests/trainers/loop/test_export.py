"""What a finished run leaves: three forms of one student that give the same picture, each with its recipe."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.paths import TINY
from trainers.loop.export import export_adapter, export_network
from unipic_core.cli import main
from unipic_core.errors import CheckpointError, LoRAError
from unipic_core.pipeline import UniPicPipeline
from unipic_core.weights.describe import describe
from unipic_core.weights.lora import LORA_KEY, read_lora
from unipic_core.weights.lora_layers import LoRALayer
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer, read_config

RANK, ALPHA = 4, 8.0
STUDENT = Recipe(
    steps=2, guidance=1.0, sampler="consistency", schedule="few_step", made={"by": "trainers", "method": "dmd"}
)
BASE_RECIPE = Recipe(steps=20, guidance=4.0, reference_budget=64, output_budget=64, made={"by": "sft"})


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA on every matrix of the blocks, in float32, large enough to change the picture."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=g) * 0.25  # noqa: E731
    shapes = {n: p.shape for n, p in load_transformer(TINY).named_parameters() if p.ndim == 2}
    blocks = [n for n in shapes if n.startswith("transformer_blocks.")]
    return {n[:-7]: (draw(RANK, shapes[n][1]), draw(shapes[n][0], RANK)) for n in blocks}


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder with a recipe, its network stored in bf16 or in fp32."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "bf16":
        state = load_transformer(TINY).state_dict()
        export_network(folder, TINY, state, read_config(TINY), Recipe(), "base")
    else:
        shutil.copytree(TINY, folder / "base")
    (folder / "base" / "recipe.json").write_text(BASE_RECIPE.to_json())
    return folder / "base"


def adapter(layers: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, LoRALayer]:
    return {name: LoRALayer({"down": down, "up": up}, alpha) for name, (down, up) in layers.items()}


def latents(folder: Path, transformer: Path | None = None, lora: Path | None = None, seed: int = 3) -> Tensor:
    """Packed latents of one composition in bf16, with the sampler and the budgets that the recipe says."""
    pipe = UniPicPipeline.from_pretrained(folder, transformer=transformer, device="cpu")
    if lora is not None:
        pipe.load_lora(lora)
    made: Any = pipe([Image.new("RGB", (40, 30), "teal")], "a", seed=seed, output_type="latent")
    assert (made.settings.steps, made.settings.sampler, made.settings.reference_budget) == (
        (2, "consistency", 64) if transformer or lora or folder.name.startswith("unipic") else (20, "euler", 64)
    )
    return made.images


def test_three_forms_give_the_same_latents(
    base: Path, layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    export_adapter(tmp_path, base, adapter(layers, ALPHA), STUDENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "unipic_distill",
        "unipic_distill.safetensors",
        "unipic_distill_merged.safetensors",
    ]
    merged_file = tmp_path / "unipic_distill_merged.safetensors"
    in_folder = latents(tmp_path / "unipic_distill")
    in_file = latents(base, transformer=merged_file)
    added = latents(base, lora=tmp_path / "unipic_distill.safetensors")
    assert torch.equal(in_folder, in_file)
    if base.parent.name.startswith("bf16"):
        assert torch.equal(in_folder, added)  # one sum in float32, rounded once, on both ways
    else:
        # the file rounds fp32 + LoRA once; the pipeline rounds the base to bf16 first: 2**-9 of a weight
        assert (in_folder - added).norm() / added.norm() < 0.01
    undistilled = Recipe.read(base)
    assert undistilled is not None
    plain = UniPicPipeline.from_pretrained(base, device="cpu")
    plain.base_recipe = undistilled.merge(STUDENT)
    without: Any = plain([Image.new("RGB", (40, 30), "teal")], "a", seed=3, output_type="latent")
    assert (in_folder - without.images).norm() / added.norm() > 0.1  # the LoRA changes the picture


def test_each_form_says_its_recipe(
    base: Path, layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_adapter(tmp_path, base, adapter(layers, ALPHA), STUDENT)
    lora = read_lora(tmp_path / "unipic_distill.safetensors")
    assert lora.recipe == STUDENT
    said = json.loads(lora.metadata[LORA_KEY])
    assert said == {"ranks": [RANK], "alpha": ALPHA, "alpha_is_in_the_weights": True}
    how = {"source": "base", "dtype": "bf16", "loras": [{"name": "unipic_distill.safetensors", "strength": 1.0}]}
    expected = BASE_RECIPE.merge(STUDENT)
    expected = replace(expected, made={"base": {"by": "sft"}, **STUDENT.made, "merge": how})
    for name in ("unipic_distill", "unipic_distill_merged.safetensors"):
        assert Recipe.read(tmp_path / name) == expected
    for name in ("unipic_distill", "unipic_distill.safetensors", "unipic_distill_merged.safetensors"):
        assert main(["info", str(tmp_path / name)]) == 0
        assert "steps 2, guidance 1.0, sampler consistency, schedule few_step" in capsys.readouterr().out
        dtypes = describe(tmp_path / name)
        dtypes = dtypes["parts"]["transformer"] if "parts" in dtypes else dtypes
        assert set(dtypes["dtypes"]) == {"bfloat16"}


def test_ema_and_raw_lie_beside_each_other_and_a_second_export_replaces_them(
    layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    for steps, scale in ((2, 1.0), (4, 2.0)):
        for name in ("unipic_distill", "unipic_distill_raw"):
            export_adapter(tmp_path / "run", TINY, adapter(layers, scale * ALPHA), replace(STUDENT, steps=steps), name)
    assert len(list((tmp_path / "run").iterdir())) == 6
    for made in (tmp_path / "run").iterdir():
        recipe = Recipe.read(made)
        assert recipe is not None
        assert recipe.steps == 4


def test_a_full_student_is_a_file_and_a_folder(tmp_path: Path, base: Path) -> None:
    g = torch.Generator().manual_seed(0)
    state = {n: w + 0.05 * torch.randn(w.shape, generator=g) for n, w in load_transformer(TINY).state_dict().items()}
    for value in state.values():
        value.requires_grad_()
    export_network(tmp_path, base, state, read_config(TINY), STUDENT)
    file, folder = tmp_path / "unipic_distill.safetensors", tmp_path / "unipic_distill"
    for path in (file, folder):
        assert Recipe.read(path) == BASE_RECIPE.merge(STUDENT)
        stored = load_transformer(path).state_dict()
        assert all(torch.equal(stored[n], value.bfloat16()) for n, value in state.items())
    assert torch.equal(latents(folder), latents(base, transformer=file))
    assert (folder / "vae" / "config.json").read_bytes() == (TINY / "vae" / "config.json").read_bytes()


def test_what_does_not_fit_leaves_nothing(layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    config = read_config(TINY)
    state = load_transformer(TINY).state_dict()
    state["strange"] = state.pop("img_in.weight")
    with pytest.raises(CheckpointError, match=r"do not fit their config \(1 missing: img_in.weight; 1 unexpected"):
        export_network(tmp_path, TINY, state, config, STUDENT)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LoRAError, match="choose a LoRA for a model of these sizes"):
        export_adapter(tmp_path, TINY, adapter({"img_in": (torch.zeros(2, 8), torch.zeros(64, 2))}, ALPHA), STUDENT)
    assert [p.name for p in tmp_path.iterdir()] == ["unipic_distill.safetensors"]


def test_the_base_is_never_replaced(layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    state, config = load_transformer(TINY).state_dict(), read_config(TINY)
    export_network(tmp_path, TINY, state, config, STUDENT)
    held = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for base in (tmp_path / "unipic_distill", tmp_path / "unipic_distill.safetensors"):
        with pytest.raises(CheckpointError, match="source"):
            export_adapter(tmp_path, base, adapter(layers, ALPHA), STUDENT)
        with pytest.raises(CheckpointError, match="source"):
            export_network(tmp_path, base, state, config, STUDENT)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == held


def test_a_disk_that_fills_up_leaves_the_lora_and_what_was_there(
    layers: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_adapter(tmp_path, TINY, adapter(layers, ALPHA), STUDENT)
    before = {p: p.read_bytes() for p in (tmp_path / "unipic_distill").rglob("*") if p.is_file()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(CheckpointError, match=f"not enough room for {tmp_path / 'unipic_distill'}:"):
        export_adapter(tmp_path, TINY, adapter(layers, 2 * ALPHA), STUDENT)
    assert {p: p.read_bytes() for p in (tmp_path / "unipic_distill").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "unipic_distill",
        "unipic_distill.safetensors",
        "unipic_distill_merged.safetensors",
    ]
