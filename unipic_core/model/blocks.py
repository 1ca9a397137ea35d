"""Transformer block with two streams, images and text, that attend jointly; first and last layers of the network.

Layers come from an `operations` namespace (Linear, LayerNorm, RMSNorm, Embedding as in torch.nn); parameter names are
diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import MMDiTConfig
from .layers import Factory, Operations
from .rope import Rotation, rotate

Layer = Callable[..., Any]

S = TypeVar("S", Tensor, None, Tensor | None)
"""Tokens of one stream; None if a segment has none."""

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of some tokens in one block, each [B or 1, N, H, D]."""

BlockKeyValues = tuple[KeyValue, ...]
"""Keys and values of several segments in one block."""


class KeyValues(Protocol):
    """Keys and values of the same tokens in every block, read by the block's index: a list, or storage elsewhere."""

    def __getitem__(self, index: int, /) -> KeyValue: ...

    def __iter__(self) -> Iterator[KeyValue]: ...

    def __len__(self) -> int: ...


class KeyValueStore(KeyValues, Protocol):
    """`KeyValues` that receive each block's keys and values in order."""

    def append(self, kv: KeyValue, /) -> None: ...


class Modulation(NamedTuple):
    """Modulation of a stream by time, before attention or before the MLP; each [B, 1 or S, width]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def first(self, count: int) -> Modulation:
        """Restrict to the first `count` tokens; one row for all tokens stays one row."""
        return Modulation(*(m[:, :count] for m in self))


@dataclass(frozen=True)
class JointState:
    """Attention context of one segment: RoPE, mask, cached keys and values.

    rope: of the segment's tokens, text first. mask: None, [B, 1, 1, past + segment] bool with True = attend,
    or a bias [1 or B, 1, L + S, past + segment] with one row for each query. reference:
    [1, S, 1] bool or None, True for image tokens modulated by the second half of the time embedding. attention: the
    attention function. past: keys and values of earlier tokens, which are attended to but not computed. return_kv:
    return the segment's keys and values.

    A host with hooks around attention derives a class with another `placed` and `attend`.
    """

    rope: Rotation
    mask: Tensor | None
    reference: Tensor | None
    attention: Attention
    past: BlockKeyValues = ()
    return_kv: bool = False

    def placed(self, k: Tensor, v: Tensor) -> KeyValue:
        """Rotate keys [B, L + S, H, D] to their positions, as later tokens attend to them; values are unchanged."""
        return rotate(k, self.rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> tuple[Tensor, KeyValue | None]:
        """Rotate queries and keys and attend: ([B, Q, H * D], keys and values if `return_kv`).

        q [B, Q, H, D], k and v [B, L + S, H, D]: normalised, not yet rotated. start: index of the first query in
        [text | images].
        """
        cos, sin = (r[:, start : start + q.shape[1]] for r in self.rope)
        q = rotate(q, (cos, sin))
        segment = self.placed(k, v)
        k, v = joined(self.past, segment)
        mask = rows_of(self.mask, start, q.shape[1], dim=2)
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return out.transpose(1, 2).flatten(2).to(v.dtype), segment if self.return_kv else None


def joined(past: BlockKeyValues, segment: KeyValue, dim: int = 1) -> KeyValue:
    """Concatenate keys and values along the sequence, dimension `dim`; a past of one sample serves a batch."""
    if not past:
        return segment
    batch = len(segment[0])
    k, v = zip(*((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in (*past, segment)), strict=True)
    return torch.cat(k, dim=dim), torch.cat(v, dim=dim)


def rows_of(mask: Tensor | None, start: int, queries: int, dim: int) -> Tensor | None:
    """Rows of a mask for some of a segment's queries; a mask with one row for all, and None, stay as they are."""
    return mask if mask is None or mask.shape[dim] == 1 else mask.narrow(dim, start, queries)


_EMPTY = torch.empty(0)
ABSENT = Modulation(_EMPTY, _EMPTY, _EMPTY)
"""Placeholder for the modulation of an absent stream; never read."""


class Block(nn.Module):
    """Double-stream block: separate weights for images and text, joint attention."""

    def __init__(self, config: MMDiTConfig, operations: Operations, factory: Factory) -> None:
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **factory))
        self.img_norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.attn = JointAttention(width, config.attention_head_dim, operations, factory)
        self.img_norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.img_mlp = FeedForward(width, operations, factory)
        self.txt_mod = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **factory))
        self.txt_norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.txt_norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.txt_mlp = FeedForward(width, operations, factory)

    def forward(
        self, img: Tensor | None, txt: Tensor | None, temb: Tensor, state: JointState, num_outputs: int | None = None
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        """Apply the block to img [B, S, width] and txt [B, L, width], one of which may be None; temb [B or 2B, width].

        Returns img, txt, and the keys and values if `state.return_kv`. num_outputs: for the last block, the number of
        leading image tokens that are needed; 0 = only keys and values are needed; None for the other blocks.
        """
        if num_outputs == 0:
            return img, txt, self.keys_and_values(img, txt, temb, state)
        if num_outputs is not None:
            return self.last(img, txt, temb, state, num_outputs)
        img_attn, img_ff = _modulations(self.img_mod, temb, img, state.reference)
        txt_attn, txt_ff = _modulations(self.txt_mod, temb, txt)
        img_in, txt_in = _modulated(img, self.img_norm1, img_attn), _modulated(txt, self.txt_norm1, txt_attn)
        img_out, txt_out, kv = self.attn(img_in, txt_in, state)
        img = _fed_forward(_gated(img, img_attn, img_out), self.img_norm2, img_ff, self.img_mlp)
        txt = _fed_forward(_gated(txt, txt_attn, txt_out), self.txt_norm2, txt_ff, self.txt_mlp)
        return img, txt, kv

    def last(
        self, img: Tensor | None, txt: Tensor | None, temb: Tensor, state: JointState, num_outputs: int
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        """Apply the last block: `forward` for the first `num_outputs` image tokens only; returns txt unchanged."""
        assert img is not None  # only image tokens are needed of the last block
        img_attn, img_ff = _modulations(self.img_mod, temb, img, state.reference)
        txt_attn, _ = _modulations(self.txt_mod, temb, txt)
        img_in, txt_in = _modulated(img, self.img_norm1, img_attn), _modulated(txt, self.txt_norm1, txt_attn)
        out, kv = self.attn.of_images(img_in, txt_in, state, num_outputs)
        img = _gated(img[:, :num_outputs], img_attn.first(num_outputs), out)
        return _fed_forward(img, self.img_norm2, img_ff.first(num_outputs), self.img_mlp), txt, kv

    def keys_and_values(self, img: Tensor | None, txt: Tensor | None, temb: Tensor, state: JointState) -> KeyValue:
        """Compute only the keys and values of these tokens, enough in the last block if no output is needed."""
        img_attn, _ = _modulations(self.img_mod, temb, img, state.reference)
        txt_attn, _ = _modulations(self.txt_mod, temb, txt)
        img_in, txt_in = _modulated(img, self.img_norm1, img_attn), _modulated(txt, self.txt_norm1, txt_attn)
        return self.attn.keys_and_values(img_in, txt_in, state)


# A segment may lack images or text: the functions below pass an absent stream (None) through.


def _modulations(
    layers: Layer, temb: Tensor, x: Tensor | None, reference: Tensor | None = None
) -> tuple[Modulation, Modulation]:
    """Modulation of the stream x before attention and before the MLP.

    temb: [B, width], or [2B, width] with the second half at t = 0. reference: [1, S, 1], True for tokens modulated by
    the second half; None = all by the first.
    """
    if x is None:
        return ABSENT, ABSENT
    batch = len(x)
    if reference is None:
        mod = layers(temb[:batch])[:, None]
    else:
        both = layers(temb)[:, None]
        mod = torch.where(reference, both[batch:], both[:batch])
    parts = mod.chunk(6, dim=-1)
    return Modulation(*parts[:3]), Modulation(*parts[3:])


def _modulated(x: S, norm: Layer, mod: Modulation) -> S:
    """norm(x) (1 + scale) + shift."""
    return None if x is None else torch.addcmul(mod.shift, norm(x), 1 + mod.scale)


def _gated(x: S, mod: Modulation, out: S) -> S:
    """x + gate out."""
    return None if x is None or out is None else torch.addcmul(x, mod.gate, out)


def _fed_forward(x: S, norm: Layer, mod: Modulation, mlp: Layer) -> S:
    """x + gate MLP(modulated x)."""
    return None if x is None else _gated(x, mod, mlp(_modulated(x, norm, mod)))


class JointAttention(nn.Module):
    """Joint attention over [text | images]; queries and keys are normalised per head and rotated."""

    def __init__(self, width: int, head_dim: int, operations: Operations, factory: Factory) -> None:
        super().__init__()
        self.head_dim = head_dim

        def linear() -> nn.Module:
            return operations.Linear(width, width, **factory)

        def norm() -> nn.Module:
            return operations.RMSNorm(head_dim, eps=1e-6, **factory)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()
        self.to_out, self.to_add_out = nn.ModuleList([linear()]), linear()

    def forward(
        self, img: Tensor | None, txt: Tensor | None, state: JointState
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        """Return the outputs for images and text, and the keys and values if `state.return_kv`."""
        # no names for queries, keys and values: a name would hold the unrotated tensors while attention runs
        out, kv = state.attend(self._queries(img, txt), self._keys(img, txt), self._values(img, txt))
        words = 0 if txt is None else txt.shape[1]
        img_out = None if img is None else self.to_out[0](out[:, words:])
        return img_out, None if txt is None else self.to_add_out(out[:, :words]), kv

    def of_images(
        self, img: Tensor, txt: Tensor | None, state: JointState, num_outputs: int
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend with the first `num_outputs` image tokens only; keys and values are those of all tokens."""
        words = 0 if txt is None else txt.shape[1]
        queries = self._heads(self.to_q, img[:, :num_outputs], self.norm_q)
        out, kv = state.attend(queries, self._keys(img, txt), self._values(img, txt), words)
        return self.to_out[0](out), kv

    def keys_and_values(self, img: Tensor | None, txt: Tensor | None, state: JointState) -> KeyValue:
        """Keys and values of these tokens, keys rotated."""
        return state.placed(self._keys(img, txt), self._values(img, txt))

    def _queries(self, img: Tensor | None, txt: Tensor | None) -> Tensor:
        return self._joint((self.add_q_proj, txt, self.norm_added_q), (self.to_q, img, self.norm_q))

    def _keys(self, img: Tensor | None, txt: Tensor | None) -> Tensor:
        return self._joint((self.add_k_proj, txt, self.norm_added_k), (self.to_k, img, self.norm_k))

    def _values(self, img: Tensor | None, txt: Tensor | None) -> Tensor:
        return self._joint((self.add_v_proj, txt, None), (self.to_v, img, None))

    def _joint(self, *streams: tuple[nn.Module, Tensor | None, nn.Module | None]) -> Tensor:
        """Project and concatenate streams (layer, tokens or None, norm or None) to [B, L + S, H, D]."""
        pieces = [self._heads(layer, x, norm) for layer, x, norm in streams if x is not None]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _heads(self, layer: nn.Module, x: Tensor, norm: nn.Module | None) -> Tensor:
        heads = layer(x).unflatten(-1, (-1, self.head_dim))
        return heads if norm is None else norm(heads)


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), Linear; inner width 4 x width. Nested for diffusers' parameter names."""

    def __init__(self, width: int, operations: Operations, factory: Factory) -> None:
        super().__init__()
        inner = nn.ModuleDict({"proj": operations.Linear(width, 4 * width, **factory)})
        self.net = nn.ModuleList([inner, nn.Identity(), operations.Linear(4 * width, width, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].get_submodule("proj")(x), approximate="tanh"))


class OutputNorm(nn.Module):
    """LayerNorm modulated by the time embedding: scale first, then shift."""

    def __init__(self, width: int, operations: Operations, factory: Factory) -> None:
        super().__init__()
        self.linear = operations.Linear(width, 2 * width, **factory)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class TimeEmbedding(nn.Module):
    """Time embedding: t [B] in [0, 1] -> [B, width]; sinusoids of 1000 t in float32, then an MLP."""

    def __init__(self, width: int, additional: bool, operations: Operations, factory: Factory) -> None:
        super().__init__()
        layers = {
            "linear_1": operations.Linear(256, width, **factory),
            "linear_2": operations.Linear(width, width, **factory),
        }
        self.timestep_embedder = nn.ModuleDict(layers)
        if additional:
            self.addition_t_embedding = operations.Embedding(2, width, **factory)

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
