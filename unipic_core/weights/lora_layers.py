"""Delta of one layer of a LoRA file: a low-rank, LoKr or LoHa product, or a plain difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import LoRAError

Shape = tuple[int, ...]

PARTS = {
    "low-rank": ({"down", "up"}, set[str]()),
    "LoKr": (set[str](), {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set[str]()),
    "difference": (set[str](), {"diff", "diff_b"}),
}
"""Kind of layer -> (required parts, optional parts)."""


@dataclass(frozen=True)
class LoRALayer:
    """Parts of one layer, as stored: down [r, in], up [out, r]. alpha: None = the rank.

    rank_stabilised: scale the product by alpha / sqrt(r) instead of alpha / r (rsLoRA).
    """

    parts: Mapping[str, Tensor]
    alpha: float | None = None
    rank_stabilised: bool = False

    @property
    def kind(self) -> str:
        """Kind of layer, a key of PARTS; "" if the parts fit none."""
        names = set(self.parts)
        for kind, (required, optional) in PARTS.items():
            if required <= names and names <= required | optional | {"diff_b"} and names & (required | optional):
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

    def weight_shape(self) -> Shape | None:
        """Shape of `weight_delta`, without computing it; None if the layer changes only the bias.

        Raises LoRAError if the parts do not fit each other.
        """
        s = {name: tuple(part.shape) for name, part in self.parts.items()}
        try:
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

    def weight_delta(self, device: torch.device | str = "cpu") -> Tensor:
        """Delta of the weight at strength 1, of `weight_shape`, in float32."""
        p = {name: part.to(device=device, dtype=torch.float32) for name, part in self.parts.items()}
        if self.kind == "low-rank":
            return p["up"].flatten(1) @ p["down"].flatten(1) * self.scale
        if self.kind == "LoHa":
            return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * self.scale
        if self.kind == "LoKr":
            w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
            w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
            return torch.kron(w1, w2) * self.scale
        return p["diff"]

    @property
    def bias_shape(self) -> Shape | None:
        return tuple(self.parts["diff_b"].shape) if "diff_b" in self.parts else None

    def bias_delta(self, device: torch.device | str = "cpu") -> Tensor:
        """Delta of the bias at strength 1, of `bias_shape`, in float32."""
        return self.parts["diff_b"].to(device=device, dtype=torch.float32)


def _product(left: Shape, right: Shape) -> Shape:
    """Shape of left @ right; trailing dimensions of 1 (1x1 convolutions) are ignored."""
    if len(left) < 2 or len(right) < 2 or left[1] != right[0] or prod(left[2:]) != 1 or prod(right[2:]) != 1:
        raise ValueError(f"{left} and {right}")
    return left[0], right[1]


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
