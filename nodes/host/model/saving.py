"""Saving by ComfyUI's nodes: the recipe and the attention form of a MODEL go into the file beside its weights.

Save Model and Save Checkpoint write weights and the graph alone. A MODEL adds two small tensors, the JSON of its recipe
and of its sizes as bytes, which the core reads as metadata and other loaders leave aside.
"""

from __future__ import annotations

import json
import logging
import weakref
from dataclasses import replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ....unipic_core.errors import UniPicError
from ....unipic_core.model.config import FULL
from ....unipic_core.weights.recipe import METADATA_KEY, Recipe
from ....unipic_core.weights.transformer import CONFIG_KEY, ZERO_COND_MARKER
from ..recipe_attachment import KEY, facts_of
from .kv_cache import FORM
from .mmdit import ComfyMMDiT

WARNED = "unipic_merge_warned"
"""Attachment of a MODEL whose merge was warned of: merging nodes come once for each weight."""


class KeyPatches(list[Any]):
    """One weight as ComfyUI's merging nodes take it from a MODEL, with what that MODEL's weights are for."""

    form: str
    recipe: Recipe


def save_with_facts(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones add recipe and sizes to the weights that are saved, and refuse to be merged
    with weights of another attention form."""
    _override(patcher)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, clone: _override(clone))


def _override(patcher: ModelPatcher) -> None:
    """Methods of this one patcher, which must not keep it alive."""
    weak, plain = weakref.ref(patcher), type(patcher)

    def state_dict_for_saving(*args: object, **kwargs: object) -> dict[str, Any]:
        return plain.state_dict_for_saving(weak(), *args, **kwargs) | notes(weak())

    def get_key_patches(*args: object, **kwargs: object) -> dict[str, Any]:
        patches = plain.get_key_patches(weak(), *args, **kwargs)
        return {name: _marked(value, weak()) for name, value in patches.items()}

    def add_patches(patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        if strength_patch:
            _check_merge(weak(), patches)
        return plain.add_patches(weak(), patches, strength_patch, strength_model)

    patcher.state_dict_for_saving = state_dict_for_saving
    patcher.get_key_patches = get_key_patches
    patcher.add_patches = add_patches


def form_of(patcher: ModelPatcher) -> str:
    """The attention form that a MODEL computes, with its LoRAs."""
    network = patcher.model.diffusion_model
    own = network.config.attention_form if isinstance(network, ComfyMMDiT) else FULL
    form: str = patcher.model_options.get("transformer_options", {}).get(FORM) or own
    return form


def notes(patcher: ModelPatcher) -> dict[str, Tensor]:
    """Tensors that say in a saved file what the weights are for."""
    form, network = form_of(patcher), patcher.model.diffusion_model
    tensors = {METADATA_KEY: _bytes(replace(facts_of(patcher).recipe, attention_form=form).to_json())}
    if isinstance(network, ComfyMMDiT):
        tensors[CONFIG_KEY] = _bytes(json.dumps(network.config.with_attention_form(form).to_dict()))
        if network.config.zero_cond_t:
            tensors[f"model.diffusion_model.{ZERO_COND_MARKER}"] = torch.zeros(0)  # the shape that ComfyUI has
    return tensors


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _marked(value: object, patcher: ModelPatcher) -> Any:
    if not isinstance(value, list):
        return value
    marked = KeyPatches(value)
    marked.form, marked.recipe = form_of(patcher), facts_of(patcher).recipe
    return marked


def _check_merge(patcher: ModelPatcher, patches: dict[str, Any]) -> None:
    """UniPicError for weights of a MODEL that attends in another form than this one; a warning for another recipe."""
    form, recipe = form_of(patcher), facts_of(patcher).recipe
    for other in (value for value in patches.values() if isinstance(value, KeyPatches)):
        if other.form != form:
            raise UniPicError(
                f"the models to merge attend in different forms ({form} and {other.form}), and no mixture of their "
                "weights fits either; add Distill LoRA to both, or after merging"
            )
        if other.recipe != recipe and patcher.get_attachment(WARNED) is None:
            patcher.set_attachments(WARNED, True)
            logging.warning("UniPic: the models to merge have different recipes; the first model's is kept")
