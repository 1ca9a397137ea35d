"""What no step changes, computed once: `MMDiT.prefill` for as long as references, prompts and weights stay the same."""

from __future__ import annotations

from .blocks import KeyValue
from .caching import TensorCache, WeightsKey
from .mmdit import MMDiT
from .rope import text_start
from .segments import REFERENCES, TEXT, ConditionCache, fixed_pieces
from .sequence import PackedLatents, TextCond

REUSE_WITHIN = 0.2
"""The change of t over which an approximate cache uses keys and values again (tests/benchmarks/approximate.py)."""


def still_serves(t_kept: float, t: float) -> bool:
    """Whether keys and values of the full form, computed at t_kept, are near enough at t."""
    return abs(t_kept - t) <= REUSE_WITHIN


class Conditions:
    """Keys and values of the last references and of the last two texts: with guidance a run has two.

    They serve all steps, seeds and guidance scales, and the references' also all prompts. Known by the contents of
    latents and embeddings and by the state of the weights, so another LoRA or picture never meets what is kept.
    """

    def __init__(self) -> None:
        self._references: TensorCache[tuple[KeyValue, ...]] = TensorCache(1)
        self._texts: TensorCache[tuple[KeyValue, ...]] = TensorCache(2)

    def get(self, network: MMDiT, latents: PackedLatents, text: TextCond) -> ConditionCache:
        """For one sample, [1, S, 4C] and [1, L, D]; it serves a batch of the same. Empty for the form "full"."""
        fixed = fixed_pieces(network.config.attention_form)
        cache: dict[str, tuple[KeyValue, ...]] = {}
        if not fixed:
            return cache
        weights, shapes = (WeightsKey(network), network.config), latents.shapes[0]
        references = latents.tokens[:, latents.num_target_tokens :]
        if REFERENCES in fixed and shapes[1:]:
            of_references = (*weights, shapes[1:])
            cache[REFERENCES] = self._references.get(
                of_references, [references], lambda: network.prefill(latents)[REFERENCES]
            )
        if TEXT in fixed:
            tensors = [references, text.embeds, *([] if text.mask is None else [text.mask])]
            of_text = (*weights, shapes[1:], text_start(shapes, network.config.use_layer3d_rope))
            cache[TEXT] = self._texts.get(of_text, tensors, lambda: network.prefill(latents, text, cache=cache)[TEXT])
        return cache

    def clear(self) -> None:
        self._references.clear()
        self._texts.clear()
