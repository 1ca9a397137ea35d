"""Cache of keys and values for one sampling run: references, and text, whose keys and values no step changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ....unipic_core.caching import TensorCache
from ....unipic_core.conditioning.sequence import PATCH
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.blocks import KeyValues, KeyValueStore
from ....unipic_core.model.config import FULL, REFERENCES, TEXT, fixed_pieces, kv_cache_bytes
from ....unipic_core.run.kv_cache import is_reusable
from ....unipic_core.run.kv_storage import (
    AUTO,
    CACHE_PLACES,
    COMPUTED,
    CPU,
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

KEY = "unipic"

CACHED_TOKENS = "unipic_cached_tokens"
"""Key of a conditioning: its `cached_token_shapes` in the present run."""

SHARED, SEPARATE = "unipic_shared_tokens", "unipic_separate_tokens"
"""Names of cached tokens in ComfyUI's memory estimate: references, counted once for all conditionings that have the
same ones; and tokens that each conditioning caches for itself."""

REFERENCE_SETS = 2
"""Sets of references whose keys and values are cached: a positive and a negative may have different ones."""

NO_ROOM = (
    "the device has no memory left for the keys and values of the condition: they are computed again in every step, "
    "which is slower; use a smaller reference budget, condition_cache cpu, or cache_dtype int8"
)

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
        key, tensors = inputs.cache_key(TEXT)
        bias = inputs.reference_bias  # references attend to the target, which depends on it
        tensors = tensors if bias is None else [*tensors, bias]
        return self.approximate.get((key, bias is None), tensors, ApproximateReferences)


def new_store(inputs: NetworkInputs) -> StoredKeyValues:
    """Empty storage for keys and values, in the place and the dtype of these inputs' options."""
    device = inputs.latents.tokens.device
    place = torch.device("cpu") if inputs.options.get(KV_CACHE) == CPU else device
    return StoredKeyValues(place, inputs.options.get(CACHE_DTYPE) == INT8)


def free_memory(device: torch.device) -> int:
    """Bytes that a cache and the activations may take: main memory that is free; of a GPU all, since ComfyUI moves
    weights away for the memory that a model asks for."""
    if management.is_device_cpu(device):
        return int(management.get_free_memory(device))
    return int(management.get_total_memory(device) - management.extra_reserved_memory())


def cache_during_runs(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones begin and end their network's cache with each run, and count its memory.

    The number of cached tokens is written onto the conditionings before ComfyUI estimates a run's memory.
    """

    def kv_cache(patcher: ModelPatcher) -> KVCache:
        return patcher.model.diffusion_model.kv_cache

    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda p, *_: kv_cache(p).begin_run(p))
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda p, *_: kv_cache(p).end_run())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _plan_cache)


def _plan_cache(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of a guider's whole run: resolves the place of its cache and sets CACHED_TOKENS of each conditioning."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})  # ComfyUI's copy for this run
    counts = _cached_tokens(guider, options, len(noise))
    place = resolved_mode(guider.model_patcher, options, counts)
    options[KV_CACHE] = place
    ratio = (
        0.0
        if place in (CPU, OFF)
        else _itemsize(guider.model_patcher, options, stored=True) / _itemsize(guider.model_patcher, options)
    )
    for cond, tokens in counts:
        cond[CACHED_TOKENS] = {name: [1, math.ceil(count * ratio)] for name, count in tokens.items()} if ratio else {}
    return executor(noise, *args, **kwargs)


def _cached_tokens(guider: CFGGuider, options: Mapping[str, Any], pictures: int) -> list[tuple[Any, dict[str, int]]]:
    """Each conditioning of a run with its `cached_tokens`; equal references count once."""
    form = options.get(ATTENTION_FORM) or guider.model_patcher.model.diffusion_model.config.attention_form
    counted: list[Mapping[str, Any]] = []
    result = []
    for name, conds in guider.conds.items():
        evaluated = 0 if name == "negative" and _skips_negative(guider) else pictures
        for cond in conds:
            tokens = cached_tokens(cond, form, options.get(KV_CACHE, AUTO), evaluated)
            if SHARED in tokens and any(_same_references(cond, other) for other in counted):
                del tokens[SHARED]
            elif SHARED in tokens:
                counted.append(cond)
            result.append((cond, tokens))
    return result


def resolved_mode(
    patcher: ModelPatcher, options: Mapping[str, Any], counts: Sequence[tuple[Any, Mapping[str, int]]]
) -> str:
    """The mode for a run: AUTO becomes GPU, CPU or OFF by the memory that its tokens need; OFF too, with a line in the
    log, where they do not fit."""
    mode = options.get(KV_CACHE, AUTO)
    storage = CacheStorage(AUTO if mode == APPROXIMATE else mode, options.get(CACHE_DTYPE, COMPUTED))
    config = patcher.model.diffusion_model.config
    tokens = total_tokens(tokens for _, tokens in counts)
    size = kv_cache_bytes(tokens, config.num_layers, config.width, _itemsize(patcher, options, stored=True))
    if not size or mode == OFF:
        return mode
    place = storage.resolve(size, patcher.load_device, free_memory)
    if place == OFF:
        logging.warning("UniPic: %s", storage.no_room(size, patcher.load_device, free_memory))
    return place if mode != APPROXIMATE or place == OFF else mode


def total_tokens(counts: Iterable[Mapping[str, int]]) -> int:
    """Tokens whose keys and values are in memory at once: the largest sets of references, and all separate tokens."""
    counts = list(counts)
    shared = sorted(tokens.get(SHARED, 0) for tokens in counts)
    return sum(shared[-REFERENCE_SETS:]) + sum(tokens.get(SEPARATE, 0) for tokens in counts)


def _itemsize(patcher: ModelPatcher, options: Mapping[str, Any], stored: bool = False) -> float:
    """Bytes of one key or value as the network computes it, or as it is stored."""
    dtype = patcher.model.get_dtype_inference()
    head_dim = patcher.model.diffusion_model.config.attention_head_dim
    storage = CacheStorage(dtype=options.get(CACHE_DTYPE, COMPUTED) if stored else COMPUTED)
    return storage.itemsize(dtype, head_dim)


def _same_references(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """True if two conditionings have equal references."""

    def equal(x: Tensor, y: Tensor) -> bool:
        return x is y or (x.shape == y.shape and x.device == y.device and torch.equal(x, y))

    if a.get("reference_latents_method") != b.get("reference_latents_method"):
        return False
    first, second = (cond.get("reference_latents") or () for cond in (a, b))
    return len(first) == len(second) and all(equal(x, y) for x, y in zip(first, second, strict=True))


def _skips_negative(guider: CFGGuider) -> bool:
    """True if ComfyUI leaves out the negative, as it does at guidance 1."""
    stock = type(guider).predict_noise is CFGGuider.predict_noise
    return stock and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization")


def cached_tokens(cond: Mapping[str, Any], form: str, mode: str, pictures: int) -> dict[str, int]:
    """SHARED and SEPARATE -> number of tokens whose keys and values are cached during a run.

    cond: a conditioning with its cross_attn and reference_latents. mode: one of KV_CACHE_MODES. pictures: of the run's
    batch, those for which it is evaluated.
    """
    if mode == OFF or not pictures:
        return {}
    sides = [z.shape[-2:] for z in cond.get("reference_latents") or ()]
    references = sum(math.ceil(height / PATCH) * math.ceil(width / PATCH) for height, width in sides)
    if form == FULL:  # references attend to the target, so their keys and values differ for each picture of the batch
        return {SEPARATE: references * pictures} if mode == APPROXIMATE else {}
    text = cond.get("cross_attn") if TEXT in fixed_pieces(form) else None
    return {SHARED: references, SEPARATE: 0 if text is None else text.shape[1]}


def with_kv_cache(model: ModelPatcher, mode: str, dtype: str = COMPUTED) -> Any:
    """A clone of a MODEL whose network caches in one of KV_CACHE_MODES, in one of CACHE_DTYPES.

    UniPicError for unknown names, and for APPROXIMATE with a network that has no such cache.
    """
    if mode not in KV_CACHE_MODES:
        raise UniPicError(f"condition_cache must be one of {', '.join(KV_CACHE_MODES)}, got {mode!r}")
    CacheStorage(dtype=dtype)  # checks the name
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
