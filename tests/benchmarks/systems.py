"""What benchmarks of the network run: random networks in any form and precision, their inputs, a matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.attention import Attention, scaled_dot_product_attention
from unipic_core.model.attention_forms import CachedKeyValues
from unipic_core.model.config import ATTENTION_FORMS, FULL, PREFIX_CAUSAL, MMDiTConfig
from unipic_core.model.mmdit import MMDiT

from .arithmetic import Load
from .common import Run, Times, in_turns
from .scaled_fp8 import FP8, ScaledLinear, ScaledOperations, scaled_product

CPU = torch.device("cpu")

CAUSAL = tuple(form for form in ATTENTION_FORMS if form != FULL)

SHIPPED = PREFIX_CAUSAL
"""The form that cached systems have unless another is asked for."""

Inputs = tuple[PackedLatents, TextCond]

STEPS = 8
"""Of a few-step picture."""

TIME = 0.5
"""Of every evaluation: its cost does not depend on it."""

TEMPLATE, TOKENS_PER_WORD = 64, 4
"""Tokens of text that are always there, and reference tokens for each further one."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TINY_SIZES = MMDiTConfig(
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    in_channels=16,
    out_channels=4,
    axes_dims_rope=(4, 6, 6),
)
"""Of a toy: to try a benchmark itself."""


# --- loads ------------------------------------------------------------------------------------------------------------


def square(side: int) -> LatentShape:
    return LatentShape(1, side, side)


def sharing(side: int, count: int) -> tuple[LatentShape, ...]:
    """References that have together as many tokens as a target of side x side: its columns, dealt out."""
    return tuple(LatentShape(1, side, side * (i + 1) // count - side * i // count) for i in range(count))


def each(side: int, count: int) -> tuple[LatentShape, ...]:
    """References of as many tokens as the target, every one."""
    return (square(side),) * count


def with_text(target: LatentShape, references: Sequence[LatentShape]) -> Load:
    """A target with references, and the text that belongs to them."""
    tokens = sum(shape.num_tokens for shape in references)
    return Load(target, tuple(references), TEMPLATE + tokens // TOKENS_PER_WORD)


# --- networks ---------------------------------------------------------------------------------------------------------

SPREAD = 0.035
"""Random weights are uniform in -SPREAD .. SPREAD, about as large as training leaves them."""


@dataclass(frozen=True)
class Kind:
    """How networks are held and computed with. dtype: of the activations, and of weights that are not fp8."""

    dtype: torch.dtype
    device: torch.device = CPU
    operations: Any = nn
    attention: Attention = scaled_dot_product_attention

    def random(self, config: MMDiTConfig) -> MMDiT:
        network = self._blank(config).to_empty(device=self.device)
        for module in network.modules():
            if isinstance(module, ScaledLinear):
                whole = torch.empty(module.weight.shape, dtype=self.dtype, device=self.device)
                module.fill(whole.uniform_(-SPREAD, SPREAD))
            for p in module.parameters(recurse=False):
                if isinstance(module, nn.RMSNorm):
                    p.data.fill_(1.0)
                elif p.dtype == self.dtype:
                    p.data.uniform_(-SPREAD, SPREAD)
        return network.eval().requires_grad_(False)

    def twin(self, network: MMDiT, form: str) -> MMDiT:
        """Another network on the same memory, in the attention form `form`."""
        made = self._blank(network.config.with_attention_form(form))
        made.load_state_dict(network.state_dict(), assign=True)
        return made.eval().requires_grad_(False)

    def _blank(self, config: MMDiTConfig) -> MMDiT:
        kw: dict[str, Any] = {"operations": self.operations, "attention": self.attention, "dtype": self.dtype}
        return MMDiT(config, compute_dtype=self.dtype, device="meta", **kw)

    def inputs(self, config: MMDiTConfig, load: Load) -> Inputs:
        """Random tokens of a load's sizes."""
        shapes = (load.target, *load.references)
        count = sum(shape.num_tokens for shape in shapes)
        kw: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        tokens = torch.randn(load.batch, count, config.in_channels, **kw)
        text = TextCond(torch.randn(load.batch, load.text, config.joint_attention_dim, **kw))
        return PackedLatents(tokens, (shapes,) * load.batch, load.target.num_tokens), text


def evaluate(network: MMDiT, inputs: Inputs, cache: CachedKeyValues | None = None) -> Tensor:
    """One evaluation without gradient."""
    with torch.no_grad():
        return network(inputs[0], TIME, inputs[1], cache=cache)


def fill(network: MMDiT, inputs: Inputs) -> CachedKeyValues:
    """What a cached evaluation needs: keys and values of the fixed pieces."""
    with torch.no_grad():
        return network.prefill(*inputs)


# --- the machine's own rate -------------------------------------------------------------------------------------------


PRODUCT = "product"
"""Its name among the runs."""


@dataclass(frozen=True)
class Product:
    """A large product of two matrices side x side, by which the machine's rate is measured."""

    run: Run
    flops: int


def product(kind: Kind, side: int) -> Product:
    """In fp8 where the kind's layers are."""
    x = torch.randn(side, side, dtype=kind.dtype, device=kind.device)
    if kind.operations is not ScaledOperations:
        return Product(lambda: x @ x, 2 * side**3)
    values, one = x.to(FP8), torch.ones((), device=kind.device)
    return Product(lambda: scaled_product(values, values, one, one, kind.dtype), 2 * side**3)


def rated(runs: Mapping[str, Run], kind: Kind, side: int, rounds: int, warmup: int = 1) -> tuple[Times, float]:
    """Runs in turns with a large product: their times, and the operations per second of the product."""
    large = product(kind, side)
    times = in_turns({PRODUCT: large.run, **runs}, rounds, warmup=warmup)
    return times, large.flops / times.median(PRODUCT)
