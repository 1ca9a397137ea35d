"""Change of a weight by one layer of a LoRA file: low-rank, LoKr or LoHa product, difference, DoRA, OFT, new weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod

import torch
from torch import Tensor

from ..errors import LoRAError

Shape = tuple[int, ...]

PARTS = {
    "low-rank": ({"down", "up"}, set[str]()),
    "LoKr": (set[str](), {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set[str]()),
    "difference": (set[str](), {"diff", "diff_b"}),
    "OFT": ({"oft_blocks"}, {"rescale"}),
    "replacement": ({"set_weight"}, set[str]()),
}
"""Kind of layer -> (required parts, optional parts)."""

_FACTORS = {name for kind in ("low-rank", "LoKr", "LoHa") for parts in PARTS[kind] for name in parts}

BIASES = ("diff_b", "up_bias")
"""Parts that change the bias; a layer with both adds both."""


@dataclass(frozen=True)
class LoRALayer:
    """Parts of one layer: down [r, in], up [out, r]. alpha: None = the rank; the constraint of an OFT.

    Factors lose trailing dimensions of 1, which those of 1x1 convolutions have.

    dora_scale: DoRA's magnitudes, [out], [out, 1] or [1, in]. oft_blocks: [n, b, b] for n * b outputs.

    rank_stabilised: scale the product by alpha / sqrt(r) instead of alpha / r (rsLoRA).
    """

    parts: Mapping[str, Tensor]
    alpha: float | None = None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        parts = {
            name: part.flatten(1) if name in _FACTORS and part.ndim > 2 and prod(part.shape[2:]) == 1 else part
            for name, part in self.parts.items()
        }
        object.__setattr__(self, "parts", parts)

    @property
    def kind(self) -> str:
        """Kind of layer, a key of PARTS; "" if the parts fit none."""
        names = set(self.parts)
        for kind, (required, optional) in PARTS.items():
            beside = {"diff_b", "up_bias", "dora_scale"} if kind in ("low-rank", "LoKr", "LoHa") else {"diff_b"}
            if required <= names and names <= required | optional | beside and names & (required | optional):
                return kind
        return ""

    @property
    def rank(self) -> int | None:
        """Rank of the products; None for a plain difference and for LoKr with two full factors."""
        for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.parts:
                return self.parts[name].shape[0]
        return None

    @property
    def scale(self) -> float:
        if self.alpha is None or not self.rank:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def additive(self) -> bool:
        """True if the layer adds a delta that does not depend on the weight."""
        return "dora_scale" not in self.parts and self.kind not in ("OFT", "replacement")

    @staticmethod
    def fits(shape: Shape, expected: Shape) -> bool:
        """True if a `weight_shape`, in which -1 is any number, equals the shape of a parameter."""
        return len(shape) == len(expected) and all(n in (-1, m) for n, m in zip(shape, expected, strict=True))

    def weight_shape(self) -> Shape | None:
        """Shape of the weight that the layer changes, -1 for any; None if it changes only the bias.

        Raises LoRAError if the parts do not fit each other.
        """
        shape = self._product_shape()
        magnitudes = tuple(self.parts["dora_scale"].shape) if "dora_scale" in self.parts else None
        if shape and magnitudes is not None and magnitudes not in (shape[:1], (shape[0], 1), (1, *shape[1:])):
            raise LoRAError(f"its DoRA magnitudes {list(magnitudes)} do not fit {list(shape)}; fetch the file again")
        biases = {name: tuple(self.parts[name].shape) for name in BIASES if name in self.parts}
        if len(set(biases.values())) > 1:
            raise LoRAError(f"its biases {_shapes(biases)} are of two shapes; fetch the file again")
        return shape

    def _product_shape(self) -> Shape | None:
        s = {name: tuple(part.shape) for name, part in self.parts.items()}
        try:
            if self.kind == "OFT":
                n, b, c = s["oft_blocks"]
                if b != c or prod(s.get("rescale", (n * b,))) != n * b:
                    raise ValueError("blocks")
                return n * b, -1
            if self.kind == "replacement":
                return s["set_weight"]
            if self.kind == "low-rank":
                return _product(s["up"], s["down"])
            if self.kind == "LoHa":
                first, second = _product(s["hada_w1_a"], s["hada_w1_b"]), _product(s["hada_w2_a"], s["hada_w2_b"])
                if first != second:
                    raise ValueError(f"{first} and {second}")
                return first
            if self.kind == "LoKr":
                w1 = s["lokr_w1"] if "lokr_w1" in s else _product(s["lokr_w1_a"], s["lokr_w1_b"])
                w2 = s["lokr_w2"] if "lokr_w2" in s else _product(s["lokr_w2_a"], s["lokr_w2_b"])
                return tuple(a * b for a, b in zip(w1, w2, strict=True))
            return s.get("diff")
        except (KeyError, ValueError) as error:
            raise LoRAError(f"its {self.kind} parts {_shapes(s)} do not multiply; fetch the file again") from error

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Apply the layer at this strength to a float32 weight.

        A change that depends on the weight is interpolated: weight + strength * (changed - weight). Raises LoRAError
        like `check_strength`.
        """
        if self.additive:
            return weight.add(self.weight_delta(weight.device), alpha=strength)
        self.check_strength(strength)
        return weight.lerp(self._changed(weight), strength)

    def check_strength(self, strength: float) -> None:
        """Raise LoRAError for a strength without meaning: 0 or less for a layer that is not `additive`, and any but 1
        for a replacement."""
        if self.additive:
            return
        if strength <= 0 or (self.kind == "replacement" and strength != 1):
            expected = "1" if self.kind == "replacement" else "above 0"
            raise LoRAError(
                f"the strength of this LoRA should be {expected}, got {strength:g}: it does not add to weights; to "
                "take it out, load the model again"
            )

    @cached_property
    def is_finite(self) -> bool:
        """True unless a part or the scale holds NaN or infinity."""
        return isfinite(self.scale) and all(bool(part.float().isfinite().all()) for part in self.parts.values())

    def _changed(self, weight: Tensor) -> Tensor:
        """Weight after a layer that is not `additive`, at strength 1."""
        p = {name: part.to(device=weight.device, dtype=torch.float32) for name, part in self.parts.items()}
        if self.kind == "replacement":
            return p["set_weight"]
        if self.kind == "OFT":
            rotated = _cayley(p["oft_blocks"], self.alpha) @ weight.unflatten(0, p["oft_blocks"].shape[:2])
            return rotated.flatten(0, 1) * p.get("rescale", weight.new_ones(len(weight))).reshape(-1, 1)
        whole, magnitudes = weight + self.weight_delta(weight.device), p["dora_scale"]
        per_input = magnitudes.ndim == 2 and magnitudes.shape[0] == 1 < len(weight)
        norm = whole.norm(dim=0 if per_input else 1, keepdim=True)  # DoRA (arXiv 2402.09353), eq. 5
        return whole * (magnitudes.reshape(1 if per_input else -1, whole.shape[1] if per_input else 1) / norm)

    def weight_delta(self, device: torch.device | str = "cpu") -> Tensor:
        """Delta of the weight at strength 1, of `weight_shape`, in float32; for a DoRA without its magnitudes."""
        p = {name: part.to(device=device, dtype=torch.float32) for name, part in self.parts.items()}
        if self.kind == "low-rank":
            return p["up"] @ p["down"] * self.scale
        if self.kind == "LoHa":
            return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * self.scale
        if self.kind == "LoKr":
            w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
            w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
            return torch.kron(w1, w2) * self.scale
        return p["diff"]

    @property
    def bias_shape(self) -> Shape | None:
        return next((tuple(self.parts[name].shape) for name in BIASES if name in self.parts), None)

    def bias_delta(self, device: torch.device | str = "cpu") -> Tensor:
        """Delta of the bias at strength 1, of `bias_shape`, in float32."""
        parts = ((name, scale) for name, scale in (("diff_b", 1.0), ("up_bias", self.scale)) if name in self.parts)
        terms = [self.parts[name].to(device=device, dtype=torch.float32) * scale for name, scale in parts]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _cayley(blocks: Tensor, constraint: float | None) -> Tensor:
    """Rotations [n, b, b] of an OFT, transposed to multiply a weight's outputs (LyCORIS, diag_oft.py)."""
    skew = blocks - blocks.transpose(1, 2)
    if constraint and (norm := float(skew.norm()) + 1e-8) > constraint:
        skew = skew * (constraint / norm)
    one = torch.eye(blocks.shape[1], device=blocks.device)
    return ((one + skew) @ torch.linalg.inv(one - skew)).transpose(1, 2)


def _product(left: Shape, right: Shape) -> Shape:
    """Shape of left @ right. Raises ValueError if they do not multiply."""
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise ValueError(f"{left} and {right}")
    return left[0], right[1]


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
