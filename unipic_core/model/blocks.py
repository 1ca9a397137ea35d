"""What the network is made of: blocks of two streams that attend jointly, and the layers at its ends.

Layers come from an `operations` namespace (Linear, LayerNorm, RMSNorm, Embedding as in torch.nn); parameter names are
diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import MMDiTConfig
from .rope import Rotation, rotate

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of some tokens in one block, each [B or 1, N, H, D]."""

Modulation = Any
"""shift, scale and gate before attention and again before the MLP: six of [B, 1 or S, width]; None without tokens."""


@dataclass(frozen=True)
class JointState:
    """What one block is told of the tokens that it works on, beside the tokens.

    rope: of these tokens, text first. past: keys and values of tokens that are not worked on but attended to; in the
    sequence they come before. mask: [B, 1, 1, past + own] bool or None, True where a key may be attended to.
    reference: [1, S, 1] bool or None, True where an image token is modulated by the second half of the time embedding.
    keeps: hand out the keys and values of these tokens.

    A host with hooks of its own around attention brings a subclass with another `placed` and `attend`.
    """

    rope: Rotation
    mask: Tensor | None
    reference: Tensor | None
    attention: Attention
    past: tuple[KeyValue, ...] = ()
    keeps: bool = False

    def placed(self, k: Tensor, v: Tensor) -> KeyValue:
        """Keys and values [B, L + S, H, D] of these tokens as others attend to them: keys turned to their positions."""
        return rotate(k, self.rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> tuple[Tensor, KeyValue | None]:
        """q [B, Q, H, D], k and v [B, L + S, H, D], normalised but not yet rotated -> [B, Q, H * D], and what is kept.

        start: the first query's place among these tokens [text | images].
        """
        cos, sin = (r[:, start : start + q.shape[1]] for r in self.rope)
        q = rotate(q, (cos, sin))
        own = self.placed(k, v)
        k, v = joined(self.past, own)
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.mask)
        return out.transpose(1, 2).flatten(2).to(v.dtype), own if self.keeps else None


def joined(past: tuple[KeyValue, ...], own: KeyValue, dim: int = 1) -> KeyValue:
    """All keys and all values along the sequence, which is dimension `dim`; a past of one sample serves a batch."""
    if not past:
        return own
    batch = len(own[0])
    k, v = zip(*((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in (*past, own)), strict=True)
    return torch.cat(k, dim=dim), torch.cat(v, dim=dim)


class Block(nn.Module):
    """One double-stream block: images and text have weights of their own and attend jointly."""

    def __init__(self, config: MMDiTConfig, operations: Any, kw: dict[str, Any]) -> None:
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **kw))
        self.img_norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **kw)
        self.attn = JointAttention(width, config.attention_head_dim, operations, kw)
        self.img_norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **kw)
        self.img_mlp = FeedForward(width, operations, kw)
        self.txt_mod = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **kw))
        self.txt_norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **kw)
        self.txt_norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **kw)
        self.txt_mlp = FeedForward(width, operations, kw)

    def forward(
        self, img: Tensor | None, txt: Tensor | None, temb: Tensor, state: JointState, keep: int | None = None
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        """img [B, S, width] and txt [B, L, width], one of which may be absent; temb [B or 2B, width].

        Returns both, in the same shapes, and the keys and values if `state` keeps them. keep: only the first `keep`
        image tokens are wanted, as after the last block; the text comes back as it was. With keep 0 only keys and
        values are made.
        """
        img_mod: Modulation = None if img is None else _per_token(self.img_mod(temb), len(img), state.reference)
        txt_mod: Modulation = None if txt is None else _per_token(self.txt_mod(temb[: len(txt)]), len(txt), None)
        img_in = None if img is None else _modulated(self.img_norm1(img), img_mod)
        txt_in = None if txt is None else _modulated(self.txt_norm1(txt), txt_mod)
        if keep == 0:
            return img, txt, self.attn.keys_and_values(img_in, txt_in, state)
        img_out, txt_out, kept = self.attn(img_in, txt_in, state, keep)
        if img is not None and keep is not None:
            img, img_mod = img[:, :keep], [m[:, :keep] for m in img_mod]
        if img is not None:
            img = _fed(torch.addcmul(img, img_mod[2], img_out), img_mod[3:], self.img_norm2, self.img_mlp)
        if txt is not None and keep is None:
            txt = _fed(torch.addcmul(txt, txt_mod[2], txt_out), txt_mod[3:], self.txt_norm2, self.txt_mlp)
        return img, txt, kept


def _per_token(mod: Tensor, batch: int, reference: Tensor | None) -> Modulation:
    """mod [B, 6 width], or [2B, 6 width]: then the tokens in `reference` take the second half, made at t = 0."""
    mod = mod[:, None] if reference is None else torch.where(reference, mod[batch:, None], mod[:batch, None])
    return mod.chunk(6, dim=-1)


def _modulated(normed: Tensor, mod: Modulation) -> Tensor:
    return torch.addcmul(mod[0], normed, 1 + mod[1])


def _fed(x: Tensor, mod: Modulation, norm: Callable[[Tensor], Tensor], mlp: Callable[[Tensor], Tensor]) -> Tensor:
    """The second half of a block: x + gate MLP(modulated x)."""
    return torch.addcmul(x, mod[2], mlp(_modulated(norm(x), mod)))


class JointAttention(nn.Module):
    """Attention over [text | images], queries and keys normalised per head and rotated."""

    def __init__(self, width: int, head_dim: int, operations: Any, kw: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = head_dim

        def linear() -> nn.Module:
            return operations.Linear(width, width, **kw)

        def norm() -> nn.Module:
            return operations.RMSNorm(head_dim, eps=1e-6, **kw)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()
        self.to_out, self.to_add_out = nn.ModuleList([linear()]), linear()

    def forward(
        self, img: Tensor | None, txt: Tensor | None, state: JointState, keep: int | None = None
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        """Outputs for images and text, and what `state` keeps; with `keep` outputs for the first image tokens alone."""
        words = 0 if txt is None else txt.shape[1]
        # no names for the three: a name would keep the unrotated tensors in memory while attention runs
        out, kept = state.attend(
            self._queries(img, txt, keep), self._keys(img, txt), self._values(img, txt), 0 if keep is None else words
        )
        if keep is not None:
            return self.to_out[0](out), None, kept
        img_out = None if img is None else self.to_out[0](out[:, words:])
        return img_out, None if txt is None else self.to_add_out(out[:, :words]), kept

    def keys_and_values(self, img: Tensor | None, txt: Tensor | None, state: JointState) -> KeyValue:
        """What others attend to, where nothing else is wanted of these tokens."""
        return state.placed(self._keys(img, txt), self._values(img, txt))

    def _queries(self, img: Tensor | None, txt: Tensor | None, keep: int | None) -> Tensor:
        if keep is not None:
            assert img is not None  # only image tokens are wanted of the last block
            return self._heads(self.to_q, img[:, :keep], self.norm_q)
        return self._joint((self.add_q_proj, txt, self.norm_added_q), (self.to_q, img, self.norm_q))

    def _keys(self, img: Tensor | None, txt: Tensor | None) -> Tensor:
        return self._joint((self.add_k_proj, txt, self.norm_added_k), (self.to_k, img, self.norm_k))

    def _values(self, img: Tensor | None, txt: Tensor | None) -> Tensor:
        return self._joint((self.add_v_proj, txt, None), (self.to_v, img, None))

    def _joint(self, *streams: tuple[nn.Module, Tensor | None, nn.Module | None]) -> Tensor:
        """[B, L + S, H, D] of the streams (layer, tokens or None, norm or None)."""
        pieces = [self._heads(layer, x, norm) for layer, x, norm in streams if x is not None]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _heads(self, layer: nn.Module, x: Tensor, norm: nn.Module | None) -> Tensor:
        heads = layer(x).unflatten(-1, (-1, self.head_dim))
        return heads if norm is None else norm(heads)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; fourfold inner width. The odd nesting gives diffusers' parameter names."""

    def __init__(self, width: int, operations: Any, kw: dict[str, Any]) -> None:
        super().__init__()
        inner = nn.ModuleDict({"proj": operations.Linear(width, 4 * width, **kw)})
        self.net = nn.ModuleList([inner, nn.Identity(), operations.Linear(4 * width, width, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].get_submodule("proj")(x), approximate="tanh"))


class OutputNorm(nn.Module):
    """LayerNorm modulated by the time embedding: scale first, then shift."""

    def __init__(self, width: int, operations: Any, kw: dict[str, Any]) -> None:
        super().__init__()
        self.linear = operations.Linear(width, 2 * width, **kw)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **kw)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> [B, width]; sinusoids of 1000 t in float32."""

    def __init__(self, width: int, additional: bool, operations: Any, kw: dict[str, Any]) -> None:
        super().__init__()
        layers = {"linear_1": operations.Linear(256, width, **kw), "linear_2": operations.Linear(width, width, **kw)}
        self.timestep_embedder = nn.ModuleDict(layers)
        if additional:
            self.addition_t_embedding = operations.Embedding(2, width, **kw)

    def forward(self, t: Tensor, dtype: torch.dtype, additional: Tensor | None = None) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angles = 1000 * (t.float()[:, None] * frequencies)
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        x = self.timestep_embedder["linear_2"](F.silu(self.timestep_embedder["linear_1"](x)))
        if hasattr(self, "addition_t_embedding"):
            if additional is None:
                raise ValueError("this network needs additional_t_cond (its config has use_additional_t_cond)")
            x = x + self.addition_t_embedding(additional).to(dtype)
        return x
