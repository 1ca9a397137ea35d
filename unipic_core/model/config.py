"""Sizes of the network; names of the attention forms and of the pieces of the sequence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

TEXT, TARGET, REFERENCES = "text", "target", "references"

FULL, REFERENCE_CAUSAL, PREFIX_CAUSAL = "full", "reference_causal", "prefix_causal"

SEGMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    FULL: ((TEXT, TARGET, REFERENCES),),
    REFERENCE_CAUSAL: ((REFERENCES,), (TEXT, TARGET)),
    PREFIX_CAUSAL: ((REFERENCES,), (TEXT,), (TARGET,)),
}
"""Attention form -> its segments in order; the pieces of a segment are neighbours in the sequence."""

ATTENTION_FORMS = tuple(SEGMENTS)

_IGNORED = {"guidance_embeds", "pooled_projection_dim"}


def fixed_pieces(attention_form: str) -> tuple[str, ...]:
    """Pieces of the sequence whose keys and values are the same in every step, so that they can be cached."""
    return tuple(pieces[0] for pieces in SEGMENTS[attention_form] if TARGET not in pieces)


def kv_cache_bytes(tokens: int, num_layers: int, width: int, itemsize: float) -> int:
    """Memory of the keys and values of this many tokens, in bytes. itemsize: bytes of one number."""
    return round(2 * tokens * num_layers * width * itemsize)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the network, named as in diffusers' config.json; the defaults are the released 20B weights'.

    attention_form: one of ATTENTION_FORMS, see model/attention_forms.py; diffusers' class knows only "full". Raises
    ValueError for an unknown form and for RoPE axes that do not add up to the head size.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False
    attention_form: str = FULL

    def __post_init__(self) -> None:
        if self.attention_form not in ATTENTION_FORMS:
            raise ValueError(f"attention_form must be one of {', '.join(ATTENTION_FORMS)}, got {self.attention_form!r}")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope must add up to the head size {self.attention_head_dim}, got {self.axes_dims_rope}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def with_attention_form(self, attention_form: str | None) -> MMDiTConfig:
        """Return the config with another attention form; None changes nothing."""
        return self if attention_form is None else replace(self, attention_form=attention_form)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> MMDiTConfig:
        """Read a parsed diffusers config.json. Raises ValueError for unknown keys."""
        if config.get("guidance_embeds"):
            raise ValueError("guidance_embeds is not a part of Qwen-Image-Edit's network; this is another architecture")
        known = {f.name for f in fields(cls)}
        unknown = [k for k in config if k not in known and not k.startswith("_") and k not in _IGNORED]
        if unknown:
            raise ValueError(f"unknown keys in the network's config: {', '.join(sorted(unknown))}")
        values = {k: v for k, v in config.items() if k in known and v is not None}
        if "out_channels" in config and config["out_channels"] is None:
            values["out_channels"] = values.get("in_channels", cls.in_channels)  # as diffusers reads null
        if "axes_dims_rope" in values:
            values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a diffusers config.json."""
        values = asdict(self)
        if self.attention_form == FULL:  # a key that diffusers does not know, so only where it matters
            del values["attention_form"]
        return {"_class_name": "QwenImageTransformer2DModel", "guidance_embeds": False, **values}
