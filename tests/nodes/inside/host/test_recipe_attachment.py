"""Models of other loaders: the recipe and the name of the file that ComfyUI keeps, and nothing where none is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
import toy
from safetensors.torch import save_file
from unipic_pack.nodes import sample
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.recipe import METADATA_KEY, RELEASED_BASE, RELEASED_FEW_STEP, Recipe


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """ComfyUI's own loader on a file of this name and metadata, with the toy in the place of the network."""
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *_, **__: toy.model())

    def load(name: str, metadata: dict[str, str] | None = None) -> Any:
        save_file({"x": torch.zeros(2)}, tmp_path / name, metadata)
        return comfy.sd.load_diffusion_model(str(tmp_path / name))

    return load


def test_the_name_of_the_file_is_read(load: Any) -> None:
    assert attachment_of(load("unipic3dmd.safetensors")).recipe == RELEASED_FEW_STEP
    assert attachment_of(load("unipic3-base.safetensors").clone()).recipe == RELEASED_BASE
    assert attachment_of(load("mine.safetensors")).recipe == Recipe()


def test_the_recipe_in_the_file_is_read_and_read_again_when_it_changes(load: Any, tmp_path: Path) -> None:
    model = load("mine.safetensors", {METADATA_KEY: Recipe(steps=5).to_json()})
    assert attachment_of(model).recipe.steps == 5
    save_file({"x": torch.zeros(3)}, tmp_path / "mine.safetensors", {METADATA_KEY: Recipe(steps=6).to_json()})
    assert attachment_of(model).recipe.steps == 6
    os.remove(tmp_path / "mine.safetensors")
    assert attachment_of(model).recipe == Recipe()


def test_a_few_step_model_of_the_stock_loader_runs_few_steps(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = load("Unipic3_8step_DMD.safetensors")
    with caplog.at_level("INFO"):
        sample.FewStepSampler.execute(model, toy.text(), toy.text(), toy.latent(), 7, 0, 0.0, "auto", 1.0)
    assert "8 steps, consistency, no guidance" in caplog.text
    assert len(toy.network(model).calls) == 8


def test_a_causal_form_is_refused_since_stock_loaders_do_not_have_it(load: Any) -> None:
    model = load("mine.safetensors", {METADATA_KEY: Recipe(attention_form="prefix_causal").to_json()})
    with pytest.raises(UniPicError, match=r"mine.safetensors has the attention form prefix_causal, .* load it with"):
        sample.UniPicSigmas.execute(model, toy.latent(), 0, 1.0)


def test_loaders_that_keep_no_path(caplog: pytest.LogCaptureFixture) -> None:
    """As GGUF loaders, which hand tensors to load_diffusion_model_state_dict."""
    with caplog.at_level("WARNING"):
        sample.UniPicSigmas.execute(toy.model(), toy.latent(), 0, 1.0)
        sample.FewStepSampler.execute(toy.model(), toy.text(), toy.text(), toy.latent(), 7, 2, 0.0, "auto", 1.0)
    assert "UniPic Sigmas: no recipe: 50 steps, schedule base; for few-step weights choose the sampler" in caplog.text
    assert "no recipe: 2 steps, euler, guidance 4; for few-step weights choose the sampler consistency" in caplog.text
