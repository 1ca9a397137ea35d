"""Cache of keys and values for one sampling run: references, and text, whose keys and values no step changes.

Its memory in a run: kv_memory.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher

from ....unipic_core.caching import TensorCache
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.blocks import KeyValues, KeyValueStore
from ....unipic_core.model.config import FULL, REFERENCES, TEXT
from ....unipic_core.run.kv_cache import is_reusable
from ....unipic_core.run.kv_storage import (
    AUTO,
    CACHE_PLACES,
    COMPUTED,
    CPU,
    GPU,
    INT8,
    OFF,
    CacheStorage,
    StoredKeyValues,
)
from .inputs import NetworkInputs

ATTENTION_FORM, KV_CACHE, TIME_ROUNDING, CACHE_DTYPE = OPTION_KEYS = (
    "unipic_attention_form",
    "unipic_kv_cache",
    "unipic_time_rounding",
    "unipic_cache_dtype",
)
"""Keys of transformer_options, and keyword arguments of the network: an attention form in place of the config's, one of
KV_CACHE_MODES, one of ROUNDINGS (sampling/schedules.py), and one of CACHE_DTYPES (run/kv_storage.py)."""

APPROXIMATE = "approximate"
KV_CACHE_MODES = (*CACHE_PLACES, APPROXIMATE)
"""Causal forms: place of what no step changes, or off to compute it in every step. Form "full": reuse references' keys
and values while t moves little."""

REFERENCE_SETS = 2
"""Sets of references whose keys and values are cached: a positive and a negative may have different ones."""

NO_ROOM = CacheStorage(GPU).computed_again("do not fit into the device's memory")

TEXTS = 4
"""Texts whose keys and values are cached: two with guidance, and a few for conditionings of an area or a time range."""


@dataclass
class ApproximateReferences:
    """References' keys and values of the form "full", as computed at time t."""

    t: float = math.nan
    key_values: KeyValues = ()

    def valid_at(self, t: float) -> bool:
        return bool(self.key_values) and is_reusable(self.t, t)


class KVCache:
    """Keys and values of one run. Outside a run nothing is cached, and every call computes them."""

    def __init__(self) -> None:
        self.exact: dict[str, TensorCache[KeyValues]] = {
            REFERENCES: TensorCache(REFERENCE_SETS),
            TEXT: TensorCache(TEXTS),
        }
        self.approximate: TensorCache[ApproximateReferences] = TensorCache(TEXTS)
        self._patcher: Any = None
        self._full = False

    def begin_run(self, patcher: ModelPatcher) -> None:
        """Empty the cache for a run with the weights of this ModelPatcher."""
        self.end_run()
        self._patcher = patcher

    def end_run(self) -> None:
        """Free everything."""
        for cache in self.exact.values():
            cache.clear()
        self.approximate.clear()
        self._patcher, self._full = None, False

    def may_cache(self, inputs: NetworkInputs) -> bool:
        """True during a run whose weights do not change; hooks on weights and TrainLoraNode change them."""
        if self._patcher is None or self._patcher.hook_patches or getattr(management, "in_training", False):
            return False
        return inputs.options.get(KV_CACHE) != OFF

    def get(self, piece: str, inputs: NetworkInputs, compute: Callable[[KeyValueStore], None]) -> KeyValues | None:
        """Keys and values of REFERENCES or TEXT in every block, from the cache or computed into it.

        None if they do not fit into the device's memory; then nothing more is cached in this run.
        """

        def stored() -> KeyValues:
            store = new_store(inputs)
            compute(store)
            return store

        if self._full:
            return None
        try:
            return self.exact[piece].get(*inputs.cache_key(piece), stored)
        except management.OOM_EXCEPTION:
            self._full = True
        for cache in self.exact.values():
            cache.clear()
        management.soft_empty_cache()
        logging.warning("UniPic: %s", NO_ROOM)
        return None

    def approximate_references(self, inputs: NetworkInputs) -> ApproximateReferences | None:
        """The reusable references for these inputs, separate for each text; None unless APPROXIMATE was chosen."""
        chosen = inputs.options.get(KV_CACHE) == APPROXIMATE and inputs.attention_form == FULL
        if not chosen or not inputs.has_references or not self.may_cache(inputs):
            return None
        return self.approximate.get(*inputs.approximate_key(), ApproximateReferences)


def new_store(inputs: NetworkInputs) -> StoredKeyValues:
    """Empty storage for keys and values, in the place and the dtype of these inputs' options."""
    device = inputs.latents.tokens.device
    place = torch.device("cpu") if inputs.options.get(KV_CACHE) == CPU else device
    return StoredKeyValues(place, inputs.options.get(CACHE_DTYPE) == INT8)


def with_kv_cache(model: ModelPatcher, mode: str, dtype: str = COMPUTED) -> Any:
    """A clone of a MODEL whose network caches in one of KV_CACHE_MODES, in one of CACHE_DTYPES; the MODEL itself for
    AUTO and COMPUTED.

    UniPicError for unknown names, and for APPROXIMATE with a network that has no such cache.
    """
    if mode not in KV_CACHE_MODES:
        raise UniPicError(f"condition_cache must be one of {', '.join(KV_CACHE_MODES)}, got {mode!r}")
    CacheStorage(dtype=dtype)  # checks the name
    if (mode, dtype) == (AUTO, COMPUTED):
        return model
    clone = model.clone()
    has_cache = isinstance(getattr(model.model.diffusion_model, "kv_cache", None), KVCache)
    if mode == APPROXIMATE and not has_cache:
        raise UniPicError(
            "condition_cache approximate expects a model from Load UniPic, got ComfyUI's own Qwen-Image network; "
            "choose auto, or load the model with Load UniPic"
        )
    options = clone.model_options.setdefault("transformer_options", {})
    options |= {KV_CACHE: mode, CACHE_DTYPE: dtype}
    return clone
