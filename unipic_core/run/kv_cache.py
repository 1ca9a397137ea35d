"""Cache of keys and values across runs: `MMDiT.prefill`, reused while references, prompts and weights are the same."""

from __future__ import annotations

import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..caching import TensorCache, WeightsKey
from ..conditioning.prompt import LONG_PROMPT
from ..conditioning.reference_sizes import tokens_of_budget
from ..conditioning.sequence import LatentShape, PackedLatents, TextCond
from ..model.attention import Attention
from ..model.attention_forms import CachedKeyValues
from ..model.blocks import KeyValues
from ..model.config import REFERENCES, TEXT, MMDiTConfig, fixed_pieces, kv_cache_bytes
from ..model.mmdit import MMDiT
from ..model.rope import text_start
from .kv_storage import CPU, INT8, OFF, CacheStorage, NoRoom, StoredKeyValues
from .memory import FreeMemory, free_memory

REUSE_WITHIN = 0.2
"""Largest change of t over which an approximate cache reuses keys and values (tests/benchmarks/approximate.py)."""


def is_reusable(t_cached: float, t: float) -> bool:
    """True if an approximate cache may reuse at t the keys and values of attention form "full" computed at t_cached."""
    return abs(t_cached - t) <= REUSE_WITHIN


CACHED_REFERENCE_SETS, CACHED_TEXTS = 1, 2
"""Sizes of a `KVCache`: with guidance a run has two texts."""


def max_kv_cache_bytes(config: MMDiTConfig, reference_budget: int, itemsize: float) -> int:
    """Memory in bytes of a full `KVCache`, with references that fill the budget and long prompts.

    reference_budget: side in pixels of the square that the references share. itemsize: bytes of one number.
    """
    most = tokens_of_budget(reference_budget)
    images = CACHED_REFERENCE_SETS * most.image
    words = CACHED_TEXTS * (most.vision + LONG_PROMPT)
    fixed = fixed_pieces(config.attention_form)
    tokens = sum({REFERENCES: images, TEXT: words}[piece] for piece in fixed)
    return kv_cache_bytes(tokens, config.num_layers, config.width, itemsize)


class CacheKey(NamedTuple):
    """All that the keys and values of a piece depend on, beside the latents and embeddings themselves.

    dtype: of the activations. references: shapes of the references, whose frames follow their order. text_start: first
    position of the text, which follows the target's size; None for REFERENCES.
    """

    weights: WeightsKey
    config: MMDiTConfig
    attention: Attention
    dtype: torch.dtype
    storage: CacheStorage
    references: tuple[LatentShape, ...]
    text_start: int | None


class KVCache:
    """Keys and values of the last references and of the last two texts.

    Valid for all steps, seeds and guidance values; those of the references also for all prompts. The key of an entry
    includes the contents of latents and embeddings, the state of the weights and the attention function, so an entry is
    never reused for another picture, LoRA or kernel. Keys and values that fit into no memory are not cached, with a
    warning; the network then computes them in every step.

    storage: place and dtype of new entries. free: free memory of a device.
    """

    def __init__(self, storage: CacheStorage = CacheStorage(), free: FreeMemory = free_memory) -> None:
        self.storage = storage
        self.free = free
        self._references: TensorCache[KeyValues] = TensorCache(CACHED_REFERENCE_SETS)
        self._texts: TensorCache[KeyValues] = TensorCache(CACHED_TEXTS)

    def get(self, network: MMDiT, latents: PackedLatents, text: TextCond) -> CachedKeyValues:
        """Keys and values for one sample, latents [1, S, 4C] and text [1, L, D], which also serve a batch of the same
        references and text. Empty for the attention form "full"."""
        fixed = fixed_pieces(network.config.attention_form)
        cache: dict[str, KeyValues] = {}
        if not fixed or self.storage.place == OFF:
            return cache
        key, tensors = self.key(network, latents, text)
        entries = {REFERENCES: (self._references, key._replace(text_start=None)), TEXT: (self._texts, key)}
        for piece in fixed if key.references else fixed[1:]:
            kept, key_of_piece = entries[piece]
            compute = partial(self._stored, network, piece, latents, text, dict(cache))
            try:
                cache[piece] = kept.get(key_of_piece, tensors[piece], compute)
            except NoRoom as error:
                warnings.warn(str(error), stacklevel=2)
                break
        return cache

    def key(self, network: MMDiT, latents: PackedLatents, text: TextCond) -> tuple[CacheKey, dict[str, list[Tensor]]]:
        """Key of the text's entry, and the tensors that an entry depends on: of REFERENCES, and of TEXT, which attends
        to them. The references' entry has no text_start."""
        shapes = latents.shapes[0]
        key = CacheKey(
            weights=WeightsKey(network, sampled=True),
            config=network.config,
            attention=network.attention,
            dtype=network.dtype,
            storage=self.storage,
            references=tuple(shapes[1:]),
            text_start=text_start(shapes, network.config.use_layer3d_rope),
        )
        references = latents.tokens[:, latents.num_target_tokens :]
        words = [text.embeds, *([] if text.mask is None else [text.mask])]
        return key, {REFERENCES: [references], TEXT: [references, *words]}

    def _stored(
        self, network: MMDiT, piece: str, latents: PackedLatents, text: TextCond, cache: CachedKeyValues
    ) -> KeyValues:
        """Compute a piece's keys and values into the storage. Raises NoRoom with a sentence if they fit nowhere."""
        config, device = network.config, network.proj_out.weight.device
        references = latents.tokens.shape[1] - latents.num_target_tokens
        tokens = references if piece == REFERENCES else text.embeds.shape[1]
        itemsize = self.storage.itemsize(network.dtype, config.attention_head_dim)
        size = kv_cache_bytes(tokens, config.num_layers, config.width, itemsize)
        place = self.storage.resolve(size, device, self.free)
        if place == OFF:
            raise NoRoom(self.storage.no_room(size, device, self.free))
        words = text if piece == TEXT else None
        try:
            return network.prefill(latents, words, cache=cache, store=partial(self._store, place, device))[piece]
        except torch.OutOfMemoryError as error:
            raise NoRoom(self.storage.no_room(size, device, self.free)) from error

    def _store(self, place: str, device: torch.device) -> StoredKeyValues:
        return StoredKeyValues(torch.device("cpu") if place == CPU else device, self.storage.dtype == INT8)

    def clear(self) -> None:
        self._references.clear()
        self._texts.clear()
