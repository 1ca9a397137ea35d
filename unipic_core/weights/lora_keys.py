"""Key names of LoRA files: prefixes, wrappers and part names of all common trainers, and kinds that are refused."""

from __future__ import annotations

import re

from .files import PREFIXES as NETWORK_PREFIXES
from .files import without_wrappers

PREFIXES = (
    *("base_model.model.", "base_model.", *NETWORK_PREFIXES, "unet."),
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "lora_"),
)
"""Prefixes that trainers put before a layer's name, possibly nested. After those of the last row _ stands for dots."""

_LOW_RANK = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<ab>A|B|down|up)|lora(?:_linear_layer)?\.(?P<du>down|up))"
    r"(?:\.(?!bias$)[\w-]+)??(?:\.weight)?$"  # an adapter's name may stand before .weight
)
_UP_BIAS = re.compile(r"(?P<layer>.+?)[._](?:lora_(?:B|up)|lora\.up)(?:\.[\w-]+)??\.bias$")
_MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(?:\.[\w-]+)??(?:\.weight)?$")
_OTHER = re.compile(
    r"(?P<layer>.+)\.(?P<part>alpha|lora_alpha|network_alpha|diff|diff_b|w_norm|b_norm|set_weight|dora_scale"
    r"|oft_blocks|rescale|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])$"
)
_NAMES = {
    "A": "down",
    "down": "down",
    "B": "up",
    "up": "up",
    "lora_alpha": "alpha",
    "network_alpha": "alpha",
    "w_norm": "diff",
    "b_norm": "diff_b",  # LyCORIS' differences of norms
}
_REFUSED = (
    ("an OFT in peft's form", r"\.oft_[Rr](\.|$)|\.oft_diag$"),
    ("a BOFT", r"\.boft_[RSP](\.|$)"),
    ("a GLoRA", r"\.[ab][12]\.weight$"),
    ("a VeRA", r"\.?vera_(lambda_|[AB]\b)"),
    ("an HRA", r"\.hra_u(\.|$)"),
    ("an IA3", r"\.ia3_l(\.|$)|\.on_input$"),
    ("an adapter of convolutions", r"\.(lokr_t2|hada_t[12]|lora_mid(\.weight)?)$"),
    ("an adapter that changes sizes", r"\.reshape_weight$"),
)
_REFUSED_KEYS = tuple((kind, re.compile(pattern)) for kind, pattern in _REFUSED)


def parse_key(key: str) -> tuple[str, str, str] | None:
    """Split a key into (layer without prefix, part, layer as stored); None if it belongs to no known kind of layer."""
    if match := _LOW_RANK.match(key):
        part = _NAMES[match["ab"] or match["du"]]
    elif match := _UP_BIAS.match(key):
        part = "up_bias"
    elif match := _MAGNITUDE.match(key):
        part = "dora_scale"
    elif match := _OTHER.match(key):
        part = _NAMES.get(match["part"], match["part"])
    else:
        return None
    layer = without_wrappers(match["layer"]).replace(".processor.", ".")
    while prefix := next((p for p in PREFIXES if layer.startswith(p) and len(p) < len(layer)), None):
        layer = layer[len(prefix) :]
    return layer, part, match["layer"]


def refused_kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to, if it is one that is not added to weights here; else None."""
    return next((kind for kind, pattern in _REFUSED_KEYS if pattern.search(key)), None)
