"""Adapters of the roles by peft: LoRA, DoRA, LoKr, LoHa; which layers have one, first weights, layers for files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn

from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import SCALED_PARTS
from unipic_core.weights.lora_layers import LoRALayer

from ..config.run import AdapterConfig, ConfigError
from .types import NamedParameters

ADAPTED = (LoraLayer, LycorisLayer)
"""peft's layers with adapters."""

PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector": "dora_scale",
    **{n: n for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{n: n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}
"""peft's name of a part of an adapter -> its name in a LoRALayer."""

FIRST_ZERO = frozenset({"lora_B", "lokr_w1", "lokr_w1_a", "hada_w2_b"})
"""Parts that begin as zeros: so no adapter changes anything before training."""


def peft_config(adapter: AdapterConfig, ranks: Mapping[str, int]) -> PeftConfig:
    """Convert to peft's config, with each layer by its name."""
    common: dict[str, Any] = {
        "r": adapter.rank,
        "target_modules": "|".join(map(re.escape, ranks)),
        "rank_pattern": {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != adapter.rank},
    }
    if adapter.type == "lokr":
        factor = adapter.factor or -1
        return LoKrConfig(alpha=cast(Any, adapter.alpha), init_weights=False, decompose_factor=factor, **common)
    if adapter.type == "loha":
        return LoHaConfig(alpha=cast(Any, adapter.alpha), init_weights=False, **common)
    return LoraConfig(
        lora_alpha=cast(Any, adapter.alpha),
        lora_dropout=adapter.dropout,
        init_lora_weights=False,
        use_dora=adapter.type == "dora",
        **common,
    )


def adapter_parameters(layers: Mapping[str, Any], role: str) -> NamedParameters:
    """Parameters of a role's adapter, layer by layer, as `LAYER.lora_A.weight` or `LAYER.lokr_w1`."""
    return [(f"{name}.{key}", p) for name, layer in layers.items() for key, _, p in layer_parameters(layer, role)]


def layer_parameters(layer: Any, role: str) -> list[tuple[str, str, nn.Parameter]]:
    """(name within the layer, peft's name of the part, parameter) of one layer with an adapter."""
    parts = [(part, holder[role]) for part in PARTS if role in (holder := getattr(layer, part, {}))]
    if isinstance(layer, LoraLayer):  # modules
        return [(f"{part}.weight", part, held.weight) for part, held in parts]
    return [(part, part, held) for part, held in parts]


def initialise(layers: Mapping[str, Any], names: Iterable[str], seed: int) -> None:
    """Initialise adapters in float32, whatever the base is stored in: lower precision would round updates away.

    Magnitudes of DoRA begin as the norms of the base's rows (arXiv 2402.09353, eq. 5).
    """
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for layer in layers.values():
            for _, part, p in layer_parameters(layer, name):
                if p.is_meta:  # over a base that is sharded and filled later
                    p = renewed(layer, part, name, p.shape)
                p.data = torch.zeros(p.shape)
                if part == "lora_magnitude_vector":
                    p.data = layer.get_base_layer().weight.detach().float().norm(dim=1)
                elif part not in FIRST_ZERO:
                    nn.init.kaiming_uniform_(p.data, a=5**0.5, generator=generator)


def renewed(layer: Any, part: str, role: str, shape: torch.Size) -> nn.Parameter:
    """A new parameter in main memory in the place of one part of a role's adapter."""
    held, p = getattr(layer, part), nn.Parameter(torch.empty(shape))
    if isinstance(layer, LoraLayer):
        held[role].weight = p
    else:
        held[role] = p
    return p


def file_layer(layer: Any, role: str, alpha: float) -> LoRALayer:
    """The role's adapter of one layer, as files hold it. LoKr of two full factors is scaled here: files have no rank.

    dora_scale: [out, 1].
    """
    parts: dict[str, Tensor] = {PARTS[part]: p.detach() for _, part, p in layer_parameters(layer, role)}
    if "dora_scale" in parts:
        parts["dora_scale"] = parts["dora_scale"][:, None]
    if {"lokr_w1", "lokr_w2"} <= set(parts):
        return LoRALayer({**parts, "lokr_w1": parts["lokr_w1"] * layer.scaling[role]})
    return LoRALayer(parts, alpha)


def load_layer(layer: Any, role: str, stored: LoRALayer) -> None:
    """Copy a file's layer into the role's adapter. Raises ValueError where rank, parts or shapes differ."""
    if stored.rank not in (None, rank := layer.r[role]):
        raise ValueError(f"rank {rank}, got {stored.rank}")
    parameters = {PARTS[part]: p for _, part, p in layer_parameters(layer, role)}
    if set(parameters) != set(stored.parts):
        raise ValueError(f"the parts {', '.join(sorted(parameters))}, got {', '.join(sorted(stored.parts))}")
    scale = stored.scale / layer.scaling[role]
    for name, p in parameters.items():
        values = stored.parts[name].float()
        values = values.reshape(p.shape) if name == "dora_scale" and values.numel() == p.numel() else values
        if values.shape != p.shape:
            raise ValueError(f"{name} of shape {list(p.shape)}, got {list(values.shape)}")
        p.data.copy_(values * scale if name in SCALED_PARTS else values)


# --- which layers have one, and of which rank ------------------------------------------------------------------------


def adapter_ranks(names: Iterable[str], adapter: AdapterConfig) -> dict[str, int]:
    """Rank of each of these layers that gets an adapter."""
    pattern = re.compile(targets_of(adapter))
    return {n: adapter.rank_of(n) for n in names if pattern.fullmatch(n) and not adapter.excludes(n)}


def check_patterns(ranks: Mapping[str, int], base: MMDiT, adapter: AdapterConfig) -> None:
    """Raise ConfigError for a pattern that matches no layer: a rank or an exclusion that would do nothing."""
    for pattern in adapter.ranks:
        if not any(fnmatchcase(name, pattern) for name in ranks):
            raise ConfigError(f"network.adapter.ranks: {pattern} matches no layer with an adapter")
    for pattern in adapter.exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in base.named_modules()):
            raise ConfigError(f"network.adapter.exclude: {pattern} matches no layer of the network")


def check_rank(base: MMDiT, ranks: Mapping[str, int]) -> None:
    """Raise ConfigError for a rank above the smaller dimension of its layer."""
    for name, rank in ranks.items():
        layer = cast(Any, base.get_submodule(name))
        width = min(layer.in_features, layer.out_features)
        if rank > width:
            raise ConfigError(
                f"network.adapter.rank: expected at least 1 and at most the layer's width ({width}), got {rank}"
            )


def targets_of(adapter: AdapterConfig) -> str:
    """Regular expression for the names of the layers with an adapter."""
    suffixes = "|".join(re.escape(suffix) for suffix in adapter.layers)
    return rf"transformer_blocks\.\d+\.(.*\.)?({suffixes})"
