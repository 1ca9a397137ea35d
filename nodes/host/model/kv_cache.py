"""What no step of a run changes: references and text, and where their keys and values are kept while it lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ....unipic_core.caching import TensorCache
from ....unipic_core.conditioning.sequence import PATCH, PackedLatents
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.blocks import KeyValue
from ....unipic_core.model.config import FULL, REFERENCES, TARGET, TEXT, fixed_pieces
from ....unipic_core.run.kv_cache import still_serves

FORM, CACHE, ROUNDING = OWN_OPTIONS = "unipic_attention_form", "unipic_condition_cache", "unipic_time_rounding"
"""Keys of transformer_options, and arguments of the network: the attention form in the place of its own, one of CACHES,
and one of ROUNDINGS (sampling/schedules.py)."""

CACHES = AUTO, OFF, APPROXIMATE = "auto", "off", "approximate"
"""Keep what no step changes; compute it in every step; for the full form, use references again while t moves little."""

KEY = "unipic"

HELD = "unipic_held"
"""Key of a conditioning: `held_shapes` of it in the run that has begun."""

ONCE, EACH = "unipic_held_once", "unipic_held_each"
"""Names by which held tokens reach the memory estimate: references', named by the first of the conditionings that bring
the same ones, and each conditioning's own."""

REFERENCE_SETS = 2
"""How many sets of references keep their keys and values: a positive and a negative may bring different ones."""

Kept = tuple[KeyValue, ...]
"""Keys and values in every block."""


@dataclass(frozen=True)
class Fixed:
    """The condition of one call of the network, batch B.

    key: what else decides about the numbers. context: [B, L, D]; ids: positions [B, L + S, 3], text first; bias: [B, L]
    or None; options: transformer_options without patches, which are for what hooks can see.
    """

    form: str
    key: Hashable
    latents: PackedLatents
    context: Tensor
    ids: Tensor
    bias: Tensor | None
    additional: Tensor | None
    options: dict[str, Any]

    @property
    def references(self) -> Tensor:
        """[B, N, 4C]."""
        return self.latents.tokens[:, self.latents.num_target_tokens :]

    @cached_property
    def rows(self) -> dict[str, int]:
        """How many samples of REFERENCES and of TEXT to compute: one, if all of the batch are alike, as seeds are."""
        references = [self.references, self.additional]
        decide = {REFERENCES: references, TEXT: [*references, self.context, self.bias]}
        return {piece: 1 if _alike(tensors) else len(self.context) for piece, tensors in decide.items()}

    def identity(self, piece: str) -> tuple[Hashable, Sequence[Tensor]]:
        """All that a piece's keys and values depend on beside the weights; text also on what stands before it."""
        rows = self.rows[piece]
        tensors = [t[:rows] for t in (self.references, self.additional) if t is not None]
        shapes = self.latents.shapes[0]
        if piece == REFERENCES:
            return (self.key, shapes[1:]), tensors
        tensors += [t[:rows] for t in (self.context, self.bias) if t is not None]
        return (self.key, shapes, self.bias is None), tensors

    def mask(self, segments: Sequence[tuple[str, ...]], images: int) -> Tensor | None:
        """Bias [B, 1, keys] over the keys of these segments, the last of which has `images` image tokens."""
        pieces = [piece for segment in segments for piece in segment]
        if self.bias is None or TEXT not in pieces:
            return None
        text = pieces.index(TEXT)
        before = self.references.shape[1] if REFERENCES in pieces[:text] else 0
        after = images if TARGET in pieces else 0
        return F.pad(self.bias, (before, after))[:, None]


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    return all(torch.equal(t, t[:1].expand_as(t)) for t in tensors if t is not None)


@dataclass
class Reused:
    """References' keys and values of the full form, as they were at t."""

    t: float = math.nan
    kept: Kept = ()

    def serves(self, t: float) -> bool:
        return bool(self.kept) and still_serves(self.t, t)


class Conditions:
    """Keys and values of one run. Closed, it keeps nothing, and every step computes them."""

    def __init__(self) -> None:
        # guided runs have two texts; a few more serve conditionings of areas or times of their own
        self.kept: dict[str, TensorCache[Kept]] = {REFERENCES: TensorCache(REFERENCE_SETS), TEXT: TensorCache(4)}
        self.reused: TensorCache[Reused] = TensorCache(4)
        self._patcher: Any = None

    def open(self, patcher: ModelPatcher) -> None:
        """A run begins, with the weights of this ModelPatcher."""
        self.close()
        self._patcher = patcher

    def close(self) -> None:
        """Free everything."""
        for cache in self.kept.values():
            cache.clear()
        self.reused.clear()
        self._patcher = None

    def keeps(self, fixed: Fixed) -> bool:
        """Whether a run has begun and may keep something: hooks may change the weights while it goes on."""
        return self._patcher is not None and not self._patcher.hook_patches and fixed.options.get(CACHE) != OFF

    def get(self, piece: str, fixed: Fixed, make: Callable[[], Kept]) -> Kept:
        """A piece's keys and values in every block, made if they are not kept."""
        return self.kept[piece].get(*fixed.identity(piece), make)

    def approximate(self, fixed: Fixed) -> Reused | None:
        """What is used again for this condition, if that was asked for; each text has its own."""
        asked = fixed.options.get(CACHE) == APPROXIMATE and fixed.form == FULL
        if not asked or not self.keeps(fixed) or not fixed.latents.shapes[0][1:]:
            return None
        return self.reused.get(*fixed.identity(TEXT), Reused)


def keep_during_runs(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones open their network's conditions for each run, and free them after it.

    And count their memory: what a run keeps is written onto its conditionings before ComfyUI estimates.
    """

    def conditions(patcher: ModelPatcher) -> Conditions:
        return patcher.model.diffusion_model.conditions

    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda p, *_: conditions(p).open(p))
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda p, *_: conditions(p).close())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _note_held)


def _note_held(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around a guider's whole run: HELD for each of its conditionings, equal references with the first alone."""
    guider = executor.class_obj
    options = guider.model_options.get("transformer_options", {})
    form = options.get(FORM) or guider.model_patcher.model.diffusion_model.config.attention_form
    counted: list[Mapping[str, Any]] = []
    for name, conds in guider.conds.items():
        pictures = 0 if name == "negative" and _leaves_negative(guider) else len(noise)
        for cond in conds:
            shapes = cond[HELD] = held_shapes(cond, form, options.get(CACHE, AUTO), pictures)
            if ONCE in shapes and any(_same_references(cond, other) for other in counted):
                del shapes[ONCE]
            elif ONCE in shapes:
                counted.append(cond)
    return executor(noise, *args, **kwargs)


def _same_references(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two conditionings bring the same references, by their values."""

    def equal(x: Tensor, y: Tensor) -> bool:
        return x is y or (x.shape == y.shape and x.device == y.device and torch.equal(x, y))

    if a.get("reference_latents_method") != b.get("reference_latents_method"):
        return False
    first, second = (cond.get("reference_latents") or () for cond in (a, b))
    return len(first) == len(second) and all(equal(x, y) for x, y in zip(first, second, strict=True))


def _leaves_negative(guider: CFGGuider) -> bool:
    """Whether the negative is never evaluated, as ComfyUI has it at guidance 1."""
    stock = type(guider).predict_noise is CFGGuider.predict_noise
    return stock and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization")


def held_shapes(cond: Mapping[str, Any], form: str, cache: str, pictures: int) -> dict[str, list[int]]:
    """ONCE and EACH -> [1, tokens] whose keys and values stay in memory while a run lasts.

    cond: a conditioning with its cross_attn and reference_latents; pictures: for how many of the run it is evaluated.
    """
    if cache == OFF or not pictures:
        return {}
    sides = [z.shape[-2:] for z in cond.get("reference_latents") or ()]
    references = sum(math.ceil(height / PATCH) * math.ceil(width / PATCH) for height, width in sides)
    if form == FULL:  # references see the target then: each picture has its own
        return {EACH: [1, references * pictures]} if cache == APPROXIMATE else {}
    text = cond.get("cross_attn") if TEXT in fixed_pieces(form) else None
    return {ONCE: [1, references], EACH: [1, 0 if text is None else text.shape[1]]}


def with_cache(model: ModelPatcher, cache: str) -> Any:
    """A clone of a MODEL whose network treats its conditions in one of the ways of CACHES.

    UniPicError if references are to be used again by a network that cannot.
    """
    clone = model.clone()
    known = isinstance(getattr(model.model.diffusion_model, "conditions", None), Conditions)
    if cache == APPROXIMATE and not known:
        raise UniPicError(
            "condition_cache approximate needs a model from Load UniPic; ComfyUI's own Qwen-Image network does not "
            "have it: choose auto"
        )
    clone.model_options.setdefault("transformer_options", {})[CACHE] = cache
    return clone
