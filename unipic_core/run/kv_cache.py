"""What no step changes, computed once: `MMDiT.prefill` for as long as references, prompts and weights stay the same."""

from __future__ import annotations

from ..caching import TensorCache, WeightsKey
from ..conditioning.prompt import LONG_PROMPT
from ..conditioning.reference_sizes import vision_size
from ..conditioning.sequence import PIXELS_PER_TOKEN, PackedLatents, TextCond
from ..conditioning.vision import vision_tokens
from ..model.attention_forms import ConditionCache
from ..model.blocks import KeyValue
from ..model.config import REFERENCES, TEXT, MMDiTConfig, condition_bytes, fixed_pieces
from ..model.mmdit import MMDiT
from ..model.rope import text_start

REUSE_WITHIN = 0.2
"""The change of t over which an approximate cache uses keys and values again (tests/benchmarks/approximate.py)."""


def still_serves(t_kept: float, t: float) -> bool:
    """Whether keys and values of the full form, computed at t_kept, are near enough at t."""
    return abs(t_kept - t) <= REUSE_WITHIN


REFERENCE_SETS, TEXTS = 1, 2
"""What `Conditions` keeps: with guidance a run has two texts."""


def most_bytes(config: MMDiTConfig, reference_budget: int, itemsize: int) -> int:
    """Memory of all that `Conditions` keeps, with references that fill the budget and long prompts.

    reference_budget: side in pixels of the square that the references share. itemsize: bytes of one number.
    """
    images = REFERENCE_SETS * (reference_budget // PIXELS_PER_TOKEN) ** 2
    words = TEXTS * (vision_tokens(*vision_size((reference_budget, reference_budget))) + LONG_PROMPT)
    fixed = fixed_pieces(config.attention_form)
    tokens = sum({REFERENCES: images, TEXT: words}[piece] for piece in fixed)
    return condition_bytes(tokens, config.num_layers, config.width, itemsize)


class Conditions:
    """Keys and values of the last references and of the last two texts.

    They serve all steps, seeds and guidance scales, and the references' also all prompts. Known by the contents of
    latents and embeddings, by the state of the weights and by the attention function, so what is kept never meets
    another picture, LoRA or kernel.
    """

    def __init__(self) -> None:
        self._references: TensorCache[tuple[KeyValue, ...]] = TensorCache(REFERENCE_SETS)
        self._texts: TensorCache[tuple[KeyValue, ...]] = TensorCache(TEXTS)

    def get(self, network: MMDiT, latents: PackedLatents, text: TextCond) -> ConditionCache:
        """For one sample, [1, S, 4C] and [1, L, D]; it serves a batch of the same. Empty for the form "full"."""
        fixed = fixed_pieces(network.config.attention_form)
        cache: dict[str, tuple[KeyValue, ...]] = {}
        if not fixed:
            return cache
        maker, shapes = (WeightsKey(network), network.config, network.attention), latents.shapes[0]
        references = latents.tokens[:, latents.num_target_tokens :]
        if REFERENCES in fixed and shapes[1:]:
            of_references = (*maker, shapes[1:])
            cache[REFERENCES] = self._references.get(
                of_references, [references], lambda: network.prefill(latents)[REFERENCES]
            )
        if TEXT in fixed:
            tensors = [references, text.embeds, *([] if text.mask is None else [text.mask])]
            of_text = (*maker, shapes[1:], text_start(shapes, network.config.use_layer3d_rope))
            cache[TEXT] = self._texts.get(of_text, tensors, lambda: network.prefill(latents, text, cache=cache)[TEXT])
        return cache

    def clear(self) -> None:
        self._references.clear()
        self._texts.clear()
