"""LoRAs in the pipeline and its command: weights, recipes, and strengths that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unipic_core.small_runs import SMALL, picture
from unipic_core.cli import commands as cli
from unipic_core.cli import compose as command
from unipic_core.errors import LoRAError, UniPicError
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.plan import resolve
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import Recipe


def lora_file(path: Path, weight: str, tiny: UniPicPipeline, recipe: Recipe | None = None) -> Path:
    out, into = tiny.transformer.get_parameter(f"{weight}.weight").shape
    generator = torch.Generator().manual_seed(0)
    layers = {weight: (torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator))}
    save_lora(path, layers, recipe=recipe)
    return path


def test_lora(golden: Path, tmp_path: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", torch_dtype=torch.float32, device="cpu")
    layer = "transformer_blocks.0.attn.to_q"
    before = pipe.transformer.get_parameter(f"{layer}.weight").clone()
    plain = pipe([picture()], "a", **SMALL).images
    path = lora_file(tmp_path / "a.safetensors", layer, pipe, Recipe(steps=4, sampler="consistency"))
    assert pipe.load_lora(path, 0.5).matched == 1
    assert not torch.allclose(pipe([picture()], "a", **SMALL).images, plain)
    assert resolve(pipe.recipe).steps == 4  # the LoRA's over the checkpoint's
    pipe.load_lora(path, -0.5)
    assert pipe.recipe == pipe.base_recipe
    torch.testing.assert_close(pipe.transformer.get_parameter(f"{layer}.weight"), before)
    strange = {
        "transformer.other.lora_A.weight": torch.zeros(2, 4),
        "transformer.other.lora_B.weight": torch.zeros(4, 2),
    }
    save_file(strange, tmp_path / "b.safetensors")
    with pytest.raises(LoRAError):
        pipe.load_lora(tmp_path / "b.safetensors")


def test_recipes_of_loras_come_and_go(golden: Path, tmp_path: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", torch_dtype=torch.float32, device="cpu")
    base, layer = pipe.recipe, "transformer_blocks.0.attn.to_q"
    first = lora_file(tmp_path / "a.safetensors", layer, pipe, Recipe(steps=4, sampler="consistency"))
    second = lora_file(tmp_path / "b.safetensors", layer, pipe, Recipe(steps=2))
    before = pipe.transformer.get_parameter(f"{layer}.weight").clone()
    assert pipe.load_lora(first, 0.0).matched == 1
    assert pipe.recipe == base
    assert torch.equal(pipe.transformer.get_parameter(f"{layer}.weight"), before)
    pipe.load_lora(first, 0.3)
    pipe.load_lora(second, 1.0)
    assert (pipe.recipe.steps, pipe.recipe.sampler) == (2, "consistency")
    pipe.load_lora(first, 0.4)
    pipe.load_lora(second, -1.0)
    assert (pipe.recipe.steps, pipe.recipe.sampler) == (4, "consistency")
    pipe.load_lora(first, -0.7)  # 0.3 + 0.4 - 0.7 is not quite 0
    assert pipe.recipe == base
    pipe.load_lora(first, np.float32(0.5))
    pipe.load_lora(first, -0.5)
    assert pipe.recipe == base
    for strength in (float("nan"), "1", True, 10**400):
        with pytest.raises(UniPicError, match=f"strength of a LoRA must be a finite number, got {strength!r}"):
            pipe.load_lora(first, strength)


def compose(model: Path, *loras: str) -> Any:
    """The arguments of `unipic compose` with these LoRAs."""
    named = [x for lora in loras for x in ("--lora", lora)]
    return cli.parser().parse_args(["compose", "--prompt", "a", "--model", str(model), "--device", "cpu", *named])


@pytest.mark.parametrize(
    ("strengths", "steps"),
    [(("1",), 3), (("0",), 50), (("0.3", "0.4", "-0.7"), 50), (("0.5", "0.5", "-0.7"), 3)],
)
def test_loras_that_cancel_decide_nothing(golden: Path, tmp_path: Path, strengths: tuple[str, ...], steps: int) -> None:
    """What is said before loading is what the loaded pipeline does, by whatever path the file is named."""
    recipe = Recipe(steps=3, output_budget=64)
    save_lora(tmp_path / "a.safetensors", {"img_in": (torch.ones(2, 16), torch.ones(64, 2))}, recipe=recipe)
    ways = (tmp_path / "a.safetensors", tmp_path / ".." / tmp_path.name / "a.safetensors")
    args = compose(golden / "tiny", *(f"{ways[i % 2]}={strength}" for i, strength in enumerate(strengths)))
    opened = command.open_checked(args, [(20, 10)])
    assert opened.plan.settings.steps == steps
    assert resolve(command.load_pipeline(args, opened).recipe).steps == steps
    args.size = (512, 512)
    if steps == 50:
        command.open_checked(args, [(20, 10)])
        return
    with pytest.raises(UniPicError, match="over this model's 64x64 pixels"):
        command.open_checked(args, [(20, 10)])


def test_a_strength_that_is_no_number_is_found_before_loading(golden: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", {"img_in": (torch.ones(2, 16), torch.ones(64, 2))})
    with pytest.raises(UniPicError, match="strength of a LoRA must be a finite number, got nan"):
        command.open_checked(compose(golden / "tiny", f"{tmp_path / 'a.safetensors'}=nan"), [(20, 10)])
