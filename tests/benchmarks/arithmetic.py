"""What the network costs by arithmetic, from numbers of tokens; a multiplication with an addition is two operations.

Per token and layer of width w: queries, keys, values and output are four matrices w x w, the MLP two of w x 4w, which
is 2 (4 + 8) w^2 = 24 w^2. Per query and key: a product of w for the score and one for the value, 4 w. So a layer over
n tokens that all see each other costs

    24 n w^2 + 4 n^2 w,    and in general    24 n w^2 + 4 n k w    for n tokens that see k.

After the last layer only the target is read. What others are attended to by, keys and values, is 4 w^2 of the 24 w^2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unipic_core.conditioning.sequence import LatentShape
from unipic_core.model.config import REFERENCES, SEGMENTS, TARGET, TEXT, MMDiTConfig, fixed_pieces, kv_cache_bytes

from .common import Run

TIME_FREQUENCIES = 256


@dataclass(frozen=True)
class Load:
    """One evaluation: the pictures' sizes, tokens of text, samples."""

    target: LatentShape
    references: tuple[LatentShape, ...]
    text: int
    batch: int = 1

    @property
    def tokens(self) -> dict[str, int]:
        """Of one sample, by piece of the sequence."""
        references = sum(shape.num_tokens for shape in self.references)
        return {TEXT: self.text, TARGET: self.target.num_tokens, REFERENCES: references}

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


def step_flops(config: MMDiTConfig, load: Load, cached: bool = False) -> int:
    """Of one evaluation. cached: the fixed pieces are there already."""
    fixed = fixed_pieces(config.attention_form) if cached else ()
    return _flops(config, load, {TEXT, TARGET, REFERENCES} - set(fixed))


def fill_flops(config: MMDiTConfig, load: Load) -> int:
    """Of computing what is kept of the fixed pieces."""
    return _flops(config, load, fixed_pieces(config.attention_form))


def whole_flops(config: MMDiTConfig, load: Load) -> int:
    """Of one evaluation by diffusers' class, which computes the last layer like the others, and a velocity for every
    picture."""
    n, k = load.total, load.total
    images = n - load.text
    layers = config.num_layers * _layer(config.width, n, k, n, streams=2)
    return load.batch * (layers + _embedding(config, images, load.text) + _output(config, images))


def _flops(config: MMDiTConfig, load: Load, computed: Collection[str]) -> int:
    total = seen = 0
    for pieces in SEGMENTS[config.attention_form]:
        rows = {piece: load.tokens[piece] for piece in pieces}
        own = sum(rows.values())
        seen += own
        if own and set(pieces) <= set(computed):
            total += _segment(config, rows, seen)
    return load.batch * total


def _segment(config: MMDiTConfig, rows: dict[str, int], seen: int) -> int:
    """Of some pieces, by their numbers of tokens, that see so many in all."""
    own, words, wanted = sum(rows.values()), rows.get(TEXT, 0), rows.get(TARGET, 0)
    streams = int(own > words) + int(words > 0)
    layer = _layer(config.width, own, seen, own, streams)
    last = _layer(config.width, own, seen, wanted, streams)
    ends = _embedding(config, own - words, words) + (_output(config, wanted) if wanted else 0)
    return (config.num_layers - 1) * layer + last + ends


def _layer(w: int, n: int, k: int, wanted: int, streams: int) -> int:
    """n tokens that see k, of which `wanted` are needed afterwards; each stream makes six modulations of a sample."""
    return 4 * w**2 * n + 20 * w**2 * wanted + 4 * wanted * k * w + 12 * w**2 * streams


def _embedding(config: MMDiTConfig, images: int, words: int) -> int:
    """The layers before the first block, the time's included."""
    w = config.width
    tokens = 2 * w * (config.in_channels * images + config.joint_attention_dim * words)
    return tokens + 2 * w * (TIME_FREQUENCIES + w)


def _output(config: MMDiTConfig, images: int) -> int:
    """The layers after the last block."""
    w = config.width
    return 4 * w**2 + 2 * w * config.patch_size**2 * config.out_channels * images


def cache_bytes(config: MMDiTConfig, load: Load, itemsize: int) -> int:
    """Memory of what is kept of the fixed pieces."""
    fixed = sum(load.tokens[piece] for piece in fixed_pieces(config.attention_form))
    return load.batch * kv_cache_bytes(fixed, config.num_layers, config.width, itemsize)


def count_flops(run: Run) -> int:
    """Operations of a run as torch counts them, backward passes too; on tensors without memory nothing is computed.

    Attention is taken apart into its products, because torch does not know those of the CPU's fused kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())
