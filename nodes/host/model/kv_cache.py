"""Cache of keys and values for one sampling run: references, and text, whose keys and values no step changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from ....unipic_core.model.blocks import BlockKeyValues
from ....unipic_core.model.config import FULL, REFERENCES, TEXT, fixed_pieces
from ....unipic_core.run.kv_cache import is_reusable
from .inputs import NetworkInputs

ATTENTION_FORM, KV_CACHE, TIME_ROUNDING = OPTION_KEYS = (
    "unipic_attention_form",
    "unipic_kv_cache",
    "unipic_time_rounding",
)
"""Keys of transformer_options, and keyword arguments of the network: an attention form in place of the config's, one of
KV_CACHE_MODES, and one of ROUNDINGS (sampling/schedules.py)."""

KV_CACHE_MODES = AUTO, OFF, APPROXIMATE = "auto", "off", "approximate"
"""Causal forms: cache what no step changes, or compute it in every step. Form "full": reuse references' keys and values
while t moves little."""

KEY = "unipic"

CACHED_TOKENS = "unipic_cached_tokens"
"""Key of a conditioning: its `cached_token_shapes` in the present run."""

SHARED, SEPARATE = "unipic_shared_tokens", "unipic_separate_tokens"
"""Names of cached tokens in ComfyUI's memory estimate: references, counted once for all conditionings that have the
same ones; and tokens that each conditioning caches for itself."""

REFERENCE_SETS = 2
"""Sets of references whose keys and values are cached: a positive and a negative may have different ones."""

TEXTS = 4
"""Texts whose keys and values are cached: two with guidance, and a few for conditionings of an area or a time range."""


@dataclass
class ApproximateReferences:
    """References' keys and values of the form "full", as computed at time t."""

    t: float = math.nan
    key_values: BlockKeyValues = ()

    def valid_at(self, t: float) -> bool:
        return bool(self.key_values) and is_reusable(self.t, t)


class KVCache:
    """Keys and values of one run. Outside a run nothing is cached, and every call computes them."""

    def __init__(self) -> None:
        self.exact: dict[str, TensorCache[BlockKeyValues]] = {
            REFERENCES: TensorCache(REFERENCE_SETS),
            TEXT: TensorCache(TEXTS),
        }
        self.approximate: TensorCache[ApproximateReferences] = TensorCache(TEXTS)
        self._patcher: Any = None

    def begin_run(self, patcher: ModelPatcher) -> None:
        """Empty the cache for a run with the weights of this ModelPatcher."""
        self.end_run()
        self._patcher = patcher

    def end_run(self) -> None:
        """Free everything."""
        for cache in self.exact.values():
            cache.clear()
        self.approximate.clear()
        self._patcher = None

    def may_cache(self, inputs: NetworkInputs) -> bool:
        """True during a run whose weights do not change; hooks on weights and TrainLoraNode change them."""
        if self._patcher is None or self._patcher.hook_patches or getattr(management, "in_training", False):
            return False
        return inputs.options.get(KV_CACHE) != OFF

    def get(self, piece: str, inputs: NetworkInputs, compute: Callable[[], BlockKeyValues]) -> BlockKeyValues:
        """Keys and values of REFERENCES or TEXT in every block, from the cache or computed."""
        return self.exact[piece].get(*inputs.cache_key(piece), compute)

    def approximate_references(self, inputs: NetworkInputs) -> ApproximateReferences | None:
        """The reusable references for these inputs, separate for each text; None unless APPROXIMATE was chosen."""
        chosen = inputs.options.get(KV_CACHE) == APPROXIMATE and inputs.attention_form == FULL
        if not chosen or not inputs.has_references or not self.may_cache(inputs):
            return None
        return self.approximate.get(*inputs.cache_key(TEXT), ApproximateReferences)


def cache_during_runs(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones begin and end their network's cache with each run, and count its memory.

    The number of cached tokens is written onto the conditionings before ComfyUI estimates a run's memory.
    """

    def kv_cache(patcher: ModelPatcher) -> KVCache:
        return patcher.model.diffusion_model.kv_cache

    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda p, *_: kv_cache(p).begin_run(p))
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda p, *_: kv_cache(p).end_run())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _count_cached_tokens)


def _count_cached_tokens(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of a guider's whole run: sets CACHED_TOKENS of each conditioning; equal references count once."""
    guider = executor.class_obj
    options = guider.model_options.get("transformer_options", {})
    form = options.get(ATTENTION_FORM) or guider.model_patcher.model.diffusion_model.config.attention_form
    counted: list[Mapping[str, Any]] = []
    for name, conds in guider.conds.items():
        pictures = 0 if name == "negative" and _skips_negative(guider) else len(noise)
        for cond in conds:
            shapes = cond[CACHED_TOKENS] = cached_token_shapes(cond, form, options.get(KV_CACHE, AUTO), pictures)
            if SHARED in shapes and any(_same_references(cond, other) for other in counted):
                del shapes[SHARED]
            elif SHARED in shapes:
                counted.append(cond)
    return executor(noise, *args, **kwargs)


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


def cached_token_shapes(cond: Mapping[str, Any], form: str, mode: str, pictures: int) -> dict[str, list[int]]:
    """SHARED and SEPARATE -> [1, tokens] whose keys and values stay in memory during a run.

    cond: a conditioning with its cross_attn and reference_latents. mode: one of KV_CACHE_MODES. pictures: of the run's
    batch, those for which it is evaluated.
    """
    if mode == OFF or not pictures:
        return {}
    sides = [z.shape[-2:] for z in cond.get("reference_latents") or ()]
    references = sum(math.ceil(height / PATCH) * math.ceil(width / PATCH) for height, width in sides)
    if form == FULL:  # references attend to the target, so their keys and values differ for each picture of the batch
        return {SEPARATE: [1, references * pictures]} if mode == APPROXIMATE else {}
    text = cond.get("cross_attn") if TEXT in fixed_pieces(form) else None
    return {SHARED: [1, references], SEPARATE: [1, 0 if text is None else text.shape[1]]}


def with_kv_cache(model: ModelPatcher, mode: str) -> Any:
    """A clone of a MODEL whose network caches in one of KV_CACHE_MODES.

    UniPicError for APPROXIMATE with a network that has no such cache.
    """
    if mode not in KV_CACHE_MODES:
        raise UniPicError(f"condition_cache must be one of {', '.join(KV_CACHE_MODES)}, got {mode!r}")
    clone = model.clone()
    has_cache = isinstance(getattr(model.model.diffusion_model, "kv_cache", None), KVCache)
    if mode == APPROXIMATE and not has_cache:
        raise UniPicError(
            "condition_cache approximate expects a model from Load UniPic, got ComfyUI's own Qwen-Image network; "
            "choose auto, or load the model with Load UniPic"
        )
    clone.model_options.setdefault("transformer_options", {})[KV_CACHE] = mode
    return clone
