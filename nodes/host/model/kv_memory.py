"""Memory of the kv cache in a run: its place, and its tokens in ComfyUI's memory estimate."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH
from ....unipic_core.model.config import FULL, TEXT, fixed_pieces, kv_cache_bytes
from ....unipic_core.run.kv_storage import AUTO, COMPUTED, CPU, GPU, OFF, CacheStorage
from .kv_cache import APPROXIMATE, ATTENTION_FORM, CACHE_DTYPE, KV_CACHE, REFERENCE_SETS, KVCache

KEY = "unipic"

CACHED_TOKENS = "unipic_cached_tokens"
"""Key of a conditioning: its `cached_token_shapes` in the present run."""

SHARED, SEPARATE = "unipic_shared_tokens", "unipic_separate_tokens"
"""Names of cached tokens in ComfyUI's memory estimate: references, counted once for all conditionings that have the
same ones; and tokens that each conditioning caches for itself."""


def free_memory(device: torch.device) -> int:
    """Bytes that a cache and the activations may take: main memory that is free; of a GPU all, since ComfyUI moves
    weights away for the memory that a model asks for."""
    if management.is_device_cpu(device):
        return int(management.get_free_memory(device))
    return int(management.get_total_memory(device) - management.extra_reserved_memory())


def cache_during_runs(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones begin and end their network's cache with each run, and plan its memory.

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
    """The mode for a run: AUTO becomes GPU, CPU or OFF by the memory that its tokens need; others become OFF, with a
    line in the log, where they do not fit. APPROXIMATE caches on the device alone."""
    mode = options.get(KV_CACHE, AUTO)
    storage = CacheStorage(GPU if mode == APPROXIMATE else mode, options.get(CACHE_DTYPE, COMPUTED))
    config = patcher.model.diffusion_model.config
    tokens = total_tokens(tokens for _, tokens in counts)
    size = kv_cache_bytes(tokens, config.num_layers, config.width, _itemsize(patcher, options, stored=True))
    if not size or mode == OFF:
        return mode
    place = storage.resolve(size, patcher.load_device, free_memory)
    if place == OFF:
        advised = replace(storage, place=AUTO) if mode == APPROXIMATE else storage  # it has no cache in main memory
        logging.warning("UniPic: %s", advised.no_room(size, patcher.load_device, free_memory))
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
