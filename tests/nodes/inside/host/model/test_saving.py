"""Save Model and the merging nodes: recipe and attention form go with the weights, or one sentence says why not."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_tools import run
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave, ModelSubtract
from safetensors import safe_open
from safetensors.torch import load_file
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import RecipeAttachment, attach, attachment_of
from unipic_pack.nodes.lora import add_lora, read_lora
from unipic_pack.unipic_core.errors import CheckpointError, UniPicError
from unipic_pack.unipic_core.weights.recipe import Recipe
from unipic_pack.unipic_core.weights.transformer import ZERO_COND_MARKER, load_transformer, open_transformer

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save Model as a function from a MODEL to the file."""
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))

    def saved(model: Any) -> Path:
        ModelSave().save(model, "saved")
        return max(tmp_path.glob("*.safetensors"))

    return saved


@pytest.fixture(scope="module")
def causal(nano_model: Any, causal_lora: Path) -> Any:
    return add_lora(nano_model, read_lora(causal_lora), 1.0)[0]


def test_a_causal_lora_is_saved_with_its_form_and_recipe(causal: Any, save: Any) -> None:
    again = load_model(save(causal))
    assert again.model.diffusion_model.config.attention_form == "prefix_causal"
    recipe = attachment_of(causal).recipe
    assert attachment_of(again).recipe == replace(recipe, attention_form="prefix_causal")
    torch.testing.assert_close(run(again), run(causal), rtol=0, atol=2e-5)


def test_a_clone_is_saved_with_what_it_carries(nano_model: Any, save: Any) -> None:
    recipe, clone = Recipe(steps=3, guidance=2.0, sampler="euler", made={"by": "hand"}), nano_model.clone().clone()
    attach(clone, RecipeAttachment(recipe))
    assert attachment_of(load_model(save(clone))).recipe == recipe
    assert attachment_of(load_model(save(nano_model))).recipe == attachment_of(nano_model).recipe


def test_the_core_and_other_readers(causal: Any, save: Any) -> None:
    """Other programs see two small tensors more under names that are no part of the network."""
    file = save(causal)
    assert open_transformer(file).config.attention_form == "prefix_causal"
    assert load_transformer(file).config.attention_form == "prefix_causal"
    tensors = load_file(file)
    others = [name for name in tensors if not name.startswith("model.diffusion_model.")]
    assert sorted(others) == ["unipic_config", "unipic_recipe"]
    assert json.loads(bytes(tensors["unipic_recipe"].tolist()))["attention_form"] == "prefix_causal"


def test_a_damaged_note(causal: Any, save: Any) -> None:
    file = save(causal)
    with safe_open(file, "pt") as tensors:
        offset = file.read_bytes().index(bytes(tensors.get_tensor("unipic_recipe").tolist()))
    with file.open("r+b") as f:
        f.seek(offset)
        f.write(b"\xff")
    with pytest.raises(CheckpointError, match="'unipic_recipe' is not text; fetch it again"):
        open_transformer(file)


def test_zero_cond_t_has_comfyuis_marker(nano: Path, save: Any) -> None:
    model = load_model(nano)
    network = model.model.diffusion_model
    network.config = replace(network.config, zero_cond_t=True)
    file = save(model)
    with safe_open(file, "pt") as tensors:
        assert tensors.get_slice(f"model.diffusion_model.{ZERO_COND_MARKER}").get_shape() == [0]
    assert open_transformer(file).config.zero_cond_t


@pytest.mark.parametrize("node", [ModelMergeSimple, ModelSubtract])
def test_models_of_two_forms_do_not_merge(node: Any, nano_model: Any, causal: Any) -> None:
    function = getattr(node(), node.FUNCTION)
    for pair, forms in (
        ((nano_model, causal), "full and prefix_causal"),
        ((causal, nano_model), "prefix_causal and full"),
    ):
        with pytest.raises(UniPicError, match=f"different attention forms .{forms}."):
            function(*pair, 0.5)


def test_models_of_one_form_merge(nano_model: Any, causal: Any, caplog: pytest.LogCaptureFixture) -> None:
    [whole] = ModelMergeSimple().merge(causal, nano_model, 1.0)  # nothing of the second
    torch.testing.assert_close(run(whole), run(causal), rtol=0, atol=2e-5)
    [half] = ModelMergeSimple().merge(nano_model, nano_model.clone(), 0.5)
    torch.testing.assert_close(run(half), run(nano_model), rtol=0, atol=2e-4)
    assert "recipes" not in caplog.text
    other = nano_model.clone()
    attach(other, RecipeAttachment(Recipe(steps=3)))
    with caplog.at_level(logging.WARNING):
        ModelMergeSimple().merge(nano_model, other, 0.0)
    assert caplog.text.count("different recipes; the first model's is used") == 1


def test_a_clone_is_freed_with_its_last_name(nano_model: Any) -> None:
    gc.disable()
    clone = nano_model.clone()
    alive = weakref.ref(clone)
    del clone
    assert alive() is None
    gc.enable()
