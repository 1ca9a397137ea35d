"""Saving and merging by ComfyUI's nodes: a MODEL's recipe and attention form go along with its weights.

Save Model and Save Checkpoint write weights and the graph alone. A MODEL adds two small tensors, the JSON of its recipe
and of its config as bytes, which the core reads as metadata and other loaders ignore.
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
from ..recipe_attachment import KEY, attachment_of
from .kv_cache import ATTENTION_FORM
from .mmdit import ComfyMMDiT

MERGE_WARNED = "unipic_merge_warned"
"""Attachment of a MODEL whose merge gave its warning: merging nodes add patches once for each weight."""


class KeyPatches(list[Any]):
    """One weight as ComfyUI's merging nodes take it from a MODEL, with that MODEL's attention form and recipe."""

    attention_form: str
    recipe: Recipe


def save_with_recipe(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones save recipe and config with the weights, and refuse a merge with weights of
    another attention form."""
    _override(patcher)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, clone: _override(clone))


def _override(patcher: ModelPatcher) -> None:
    """Replace three methods of this one patcher; weakly, or they would keep it alive."""
    weak, plain = weakref.ref(patcher), type(patcher)

    def state_dict_for_saving(*args: object, **kwargs: object) -> dict[str, Any]:
        return plain.state_dict_for_saving(weak(), *args, **kwargs) | metadata_tensors(weak())

    def get_key_patches(*args: object, **kwargs: object) -> dict[str, Any]:
        patches = plain.get_key_patches(weak(), *args, **kwargs)
        return {name: _with_recipe(value, weak()) for name, value in patches.items()}

    def add_patches(patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        if strength_patch:
            _check_merge(weak(), patches)
        return plain.add_patches(weak(), patches, strength_patch, strength_model)

    patcher.state_dict_for_saving = state_dict_for_saving
    patcher.get_key_patches = get_key_patches
    patcher.add_patches = add_patches


def attention_form_of(patcher: ModelPatcher) -> str:
    """The attention form that a MODEL computes, with its LoRAs."""
    network = patcher.model.diffusion_model
    stored = network.config.attention_form if isinstance(network, ComfyMMDiT) else FULL
    form: str = patcher.model_options.get("transformer_options", {}).get(ATTENTION_FORM) or stored
    return form


def metadata_tensors(patcher: ModelPatcher) -> dict[str, Tensor]:
    """Recipe and config of a MODEL as tensors of bytes, for the file that it is saved to."""
    form, network = attention_form_of(patcher), patcher.model.diffusion_model
    tensors = {METADATA_KEY: _bytes(replace(attachment_of(patcher).recipe, attention_form=form).to_json())}
    if isinstance(network, ComfyMMDiT):
        tensors[CONFIG_KEY] = _bytes(json.dumps(network.config.with_attention_form(form).to_dict()))
        if network.config.zero_cond_t:
            tensors[f"model.diffusion_model.{ZERO_COND_MARKER}"] = torch.zeros(0)  # the shape that ComfyUI has
    return tensors


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _with_recipe(value: object, patcher: ModelPatcher) -> Any:
    if not isinstance(value, list):
        return value
    patches = KeyPatches(value)
    patches.attention_form, patches.recipe = attention_form_of(patcher), attachment_of(patcher).recipe
    return patches


def _check_merge(patcher: ModelPatcher, patches: dict[str, Any]) -> None:
    """UniPicError for weights of a MODEL with another attention form; a warning for another recipe."""
    form, recipe = attention_form_of(patcher), attachment_of(patcher).recipe
    for other in (value for value in patches.values() if isinstance(value, KeyPatches)):
        if other.attention_form != form:
            raise UniPicError(
                f"the models to merge have different attention forms ({form} and {other.attention_form}), and a "
                "mixture of their weights fits neither; add Distill LoRA to both, or after the merge"
            )
        if other.recipe != recipe and patcher.get_attachment(MERGE_WARNED) is None:
            patcher.set_attachments(MERGE_WARNED, True)
            logging.warning("UniPic: the merged models have different recipes; the first model's is used")
