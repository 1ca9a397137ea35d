"""What no step of a run changes: references and text, and where their keys and values are kept while it lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..unipic_core.blocks import KeyValue
from ..unipic_core.caching import TensorCache
from ..unipic_core.conditions import still_serves
from ..unipic_core.errors import UniPicError
from ..unipic_core.segments import FULL, REFERENCE_CAUSAL, REFERENCES, TARGET, TEXT
from ..unipic_core.sequence import PackedLatents

FORM, CACHE = "unipic_attention_form", "unipic_condition_cache"
"""Keys of transformer_options: the attention form in the place of the network's own, and one of CACHES."""

CACHES = AUTO, OFF, APPROXIMATE = "auto", "off", "approximate"
"""Keep what no step changes; compute it in every step; for the full form, use references again while t moves little."""

KEY = "unipic"

Kept = tuple[KeyValue, ...]
"""Keys and values in every block."""

Past = tuple[Kept, ...]
"""Of the segments before the target's, in order."""


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
    def alike(self) -> bool:
        """All samples have the same condition, as those of a batch of seeds have."""
        tensors = (t for t in (self.references, self.context, self.bias, self.additional) if t is not None)
        return all(torch.equal(t, t[:1].expand_as(t)) for t in tensors)

    def identity(self, piece: str) -> tuple[Hashable, Sequence[Tensor]]:
        """All that a piece's keys and values depend on beside the weights; text also on what stands before it."""
        rows = 1 if self.alike else len(self.context)
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


@dataclass
class Reused:
    """References' keys and values of the full form, as they were at t."""

    t: float = math.nan
    kept: Kept = ()

    def serves(self, t: float) -> bool:
        return bool(self.kept) and still_serves(self.t, t)


class Conditions:
    """Keys and values of one run. Closed, it keeps nothing and every call computes them."""

    def __init__(self) -> None:
        # guided runs have two texts; a few more serve conditionings of areas or times of their own
        self.kept: dict[str, TensorCache[Kept]] = {REFERENCES: TensorCache(2), TEXT: TensorCache(4)}
        self.reused: TensorCache[Reused] = TensorCache(4)
        self._patcher: Any = None

    def open(self, patcher: Any) -> None:
        """A run begins, with the weights of this ModelPatcher."""
        self.close()
        self._patcher = patcher

    def close(self) -> None:
        """Free everything."""
        for cache in (*self.kept.values(), self.reused):
            cache.clear()
        self._patcher = None

    @property
    def keeps(self) -> bool:
        """Hooks change the weights while a run goes on: nothing may be kept then."""
        return self._patcher is not None and not self._patcher.hook_patches

    def get(self, piece: str, fixed: Fixed, make: Callable[[], Kept]) -> Kept:
        if not self.keeps or fixed.options.get(CACHE) == OFF:
            return make()
        return self.kept[piece].get(*fixed.identity(piece), make)

    def approximate(self, fixed: Fixed) -> Reused | None:
        """What is used again for this condition, if that was asked for; each text has its own."""
        asked = fixed.options.get(CACHE) == APPROXIMATE and fixed.form == FULL
        if not asked or not self.keeps or not fixed.latents.shapes[0][1:]:
            return None
        return self.reused.get(*fixed.identity(TEXT), Reused)


def keep_during_runs(patcher: Any) -> None:
    """Let a ModelPatcher and its clones open their network's conditions for each run, and free them after it."""

    def conditions(patcher: Any) -> Conditions:
        return patcher.model.diffusion_model.conditions

    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda p, *_: conditions(p).open(p))
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda p, *_: conditions(p).close())


def with_cache(model: Any, cache: str) -> Any:
    """A clone of a MODEL whose network treats its conditions in one of the ways of CACHES.

    UniPicError if references are to be used again by a network that cannot.
    """
    clone = model.clone()
    if cache == APPROXIMATE:
        if not isinstance(getattr(model.model.diffusion_model, "conditions", None), Conditions):
            raise UniPicError(
                "condition_cache approximate needs a model from LoadUniPic; ComfyUI's own Qwen-Image network does not "
                "have it: choose auto"
            )
        clone.model.reserve(REFERENCE_CAUSAL)
    clone.model_options.setdefault("transformer_options", {})[CACHE] = cache
    return clone
