"""Cache of keys and values across runs: `MMDiT.prefill`, reused while references, prompts and weights are the same."""

from __future__ import annotations

from ..caching import TensorCache, WeightsKey
from ..conditioning.prompt import LONG_PROMPT
from ..conditioning.reference_sizes import vision_size
from ..conditioning.sequence import PIXELS_PER_TOKEN, PackedLatents, TextCond
from ..conditioning.vision import vision_tokens
from ..model.attention_forms import CachedKeyValues
from ..model.blocks import BlockKeyValues
from ..model.config import REFERENCES, TEXT, MMDiTConfig, fixed_pieces, kv_cache_bytes
from ..model.mmdit import MMDiT
from ..model.rope import text_start

REUSE_WITHIN = 0.2
"""Largest change of t over which an approximate cache reuses keys and values (tests/benchmarks/approximate.py)."""


def is_reusable(t_cached: float, t: float) -> bool:
    """True if an approximate cache may reuse at t the keys and values of attention form "full" computed at t_cached."""
    return abs(t_cached - t) <= REUSE_WITHIN


CACHED_REFERENCE_SETS, CACHED_TEXTS = 1, 2
"""Sizes of a `KVCache`: with guidance a run has two texts."""


def max_kv_cache_bytes(config: MMDiTConfig, reference_budget: int, itemsize: int) -> int:
    """Memory in bytes of a full `KVCache`, with references that fill the budget and long prompts.

    reference_budget: side in pixels of the square that the references share. itemsize: bytes of one number.
    """
    images = CACHED_REFERENCE_SETS * (reference_budget // PIXELS_PER_TOKEN) ** 2
    words = CACHED_TEXTS * (vision_tokens(*vision_size((reference_budget, reference_budget))) + LONG_PROMPT)
    fixed = fixed_pieces(config.attention_form)
    tokens = sum({REFERENCES: images, TEXT: words}[piece] for piece in fixed)
    return kv_cache_bytes(tokens, config.num_layers, config.width, itemsize)


class KVCache:
    """Keys and values of the last references and of the last two texts.

    Valid for all steps, seeds and guidance values; those of the references also for all prompts. The key of an entry
    includes the contents of latents and embeddings, the state of the weights and the attention function, so an entry is
    never reused for another picture, LoRA or kernel.
    """

    def __init__(self) -> None:
        self._references: TensorCache[BlockKeyValues] = TensorCache(CACHED_REFERENCE_SETS)
        self._texts: TensorCache[BlockKeyValues] = TensorCache(CACHED_TEXTS)

    def get(self, network: MMDiT, latents: PackedLatents, text: TextCond) -> CachedKeyValues:
        """Keys and values for one sample, latents [1, S, 4C] and text [1, L, D], which also serve a batch of the same
        references and text. Empty for the attention form "full"."""
        fixed = fixed_pieces(network.config.attention_form)
        cache: dict[str, BlockKeyValues] = {}
        if not fixed:
            return cache
        computed_by, shapes = (WeightsKey(network), network.config, network.attention), latents.shapes[0]
        references = latents.tokens[:, latents.num_target_tokens :]
        if REFERENCES in fixed and shapes[1:]:
            of_references = (*computed_by, shapes[1:])
            cache[REFERENCES] = self._references.get(
                of_references, [references], lambda: network.prefill(latents)[REFERENCES]
            )
        if TEXT in fixed:
            tensors = [references, text.embeds, *([] if text.mask is None else [text.mask])]
            of_text = (*computed_by, shapes[1:], text_start(shapes, network.config.use_layer3d_rope))
            cache[TEXT] = self._texts.get(of_text, tensors, lambda: network.prefill(latents, text, cache=cache)[TEXT])
        return cache

    def clear(self) -> None:
        self._references.clear()
        self._texts.clear()
