"""The network: Qwen-Image's double-stream diffusion transformer, with diffusers' parameter names.

Layers come from an `operations` namespace (Linear, LayerNorm, RMSNorm, Embedding as in torch.nn) and attention is one
function, so a host such as ComfyUI can bring its own casting, quantised and attention parts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention, scaled_dot_product_attention
from .rope import Rotation, joint_positions, rotate, rotation
from .sequence import PackedLatents, TextCond


@dataclass(frozen=True)
class MMDiTConfig:
    """All sizes of the network; the defaults are the released 20B weights'. Names as in diffusers' config.json."""

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

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} must add up to head size {self.attention_head_dim}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> MMDiTConfig:
        """From a diffusers config.json. Keys that diffusers adds around the sizes are ignored, others are errors."""
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
        """What config.json of a diffusers folder holds."""
        return {"_class_name": "QwenImageTransformer2DModel", "guidance_embeds": False, **asdict(self)}


_IGNORED = {"guidance_embeds", "pooled_projection_dim"}


class MMDiT(nn.Module):
    """The velocity network. `operations` makes its layers; `attention` may be replaced at any time.

    dtype: that of the weights. compute_dtype: that of the activations, where `operations` store weights in a form that
    they alone can compute with (fp8, quantised); None = the weights' own.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        operations: Any = nn,
        attention: Attention = scaled_dot_product_attention,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.attention = attention
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False
        width = config.width
        self.time_text_embed = TimeEmbedding(width, config.use_additional_t_cond, operations, kw)
        self.txt_norm = operations.RMSNorm(config.joint_attention_dim, eps=1e-6, **kw)
        self.img_in = operations.Linear(config.in_channels, width, **kw)
        self.txt_in = operations.Linear(config.joint_attention_dim, width, **kw)
        self.transformer_blocks = nn.ModuleList(Block(config, operations, kw) for _ in range(config.num_layers))
        self.norm_out = OutputNorm(width, operations, kw)
        self.proj_out = operations.Linear(width, config.patch_size**2 * config.out_channels, **kw)

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.compute_dtype or self.img_in.weight.dtype

    def forward(
        self, latents: PackedLatents, t: Tensor | float, text: TextCond, additional_t_cond: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, N_O, 4C] of the target tokens at time t (a number or [B], in [0, 1]).

        Samples may differ in references and in text; each gives what it gives alone.
        """
        batch = latents.tokens.shape[0]
        if text.embeds.shape[0] != batch:
            raise ValueError(f"expected {batch} text conditions, got {text.embeds.shape[0]}")
        img, txt = self.img_in(latents.tokens.to(self.dtype)), self.embed_text(text.embeds)
        temb = self.embed_time(t, batch, img, additional_t_cond)
        state = JointState(
            rope=self.rope(latents, txt.shape[1], img.device),
            mask=joint_mask(latents, text, txt.shape[1]),
            reference=reference_tokens(latents) if self.config.zero_cond_t else None,
            attention=self.attention,
        )
        last = self.transformer_blocks[-1]
        for block in self.transformer_blocks:
            keep = latents.num_target_tokens if block is last else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                img, txt = checkpoint(block, img, txt, temb, state, keep, use_reentrant=False)
            else:
                img, txt = block(img, txt, temb, state, keep)
        return self.proj_out(self.norm_out(img, temb[:batch]))

    def embed_text(self, embeds: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, width]."""
        return self.txt_in(self.txt_norm(embeds.to(self.dtype)))

    def embed_time(self, t: Tensor | float, batch: int, like: Tensor, additional: Tensor | None = None) -> Tensor:
        """[B, width], or [2B, width] with zero_cond_t: the second half is t = 0, for the references."""
        t = torch.as_tensor(t, dtype=torch.float32, device=like.device).reshape(-1).expand(batch)
        if self.config.zero_cond_t:
            t = torch.cat([t, torch.zeros_like(t)])
            additional = None if additional is None else additional.reshape(-1).expand(batch).repeat(2)
        return self.time_text_embed(t, like.dtype, additional)

    def rope(self, latents: PackedLatents, text_tokens: int, device: torch.device) -> Rotation:
        positions = joint_positions(latents.shapes, text_tokens, self.config.use_layer3d_rope)
        return rotation(positions.to(device), self.config.axes_dims_rope)


@dataclass(frozen=True)
class JointState:
    """What the blocks of one forward share. mask: [B, 1, 1, L + S] or None; reference: [1, S, 1] bool or None.

    A host with hooks of its own around attention brings a subclass with another `attend`.
    """

    rope: Rotation
    mask: Tensor | None
    reference: Tensor | None
    attention: Attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        """q [B, Q, H, D], k and v [B, L + S, H, D], normalised but not yet rotated -> [B, Q, H * D].

        start: the first query's place in the sequence [text | images].
        """
        cos, sin = (r[:, start : start + q.shape[1]] for r in self.rope)
        q = rotate(q, (cos, sin))
        k = rotate(k, self.rope)
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.mask)
        return out.transpose(1, 2).flatten(2).to(v.dtype)


def joint_mask(latents: PackedLatents, text: TextCond, text_tokens: int) -> Tensor | None:
    """[B, 1, 1, L + S], True where a key may be attended to; None if nothing is padded."""
    images = latents.mask
    if images is None and text.mask is None:
        return None
    batch, seq, _ = latents.tokens.shape
    device = latents.tokens.device
    words = text.mask if text.mask is not None else torch.ones(batch, text_tokens, dtype=torch.bool, device=device)
    if images is None:
        images = torch.ones(batch, seq, dtype=torch.bool, device=device)
    return torch.cat([words.bool(), images], dim=1)[:, None, None]


def reference_tokens(latents: PackedLatents) -> Tensor:
    """[1, S, 1] bool: True where a token belongs to a reference."""
    seq = latents.tokens.shape[1]
    return (torch.arange(seq, device=latents.tokens.device) >= latents.num_target_tokens)[None, :, None]


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
        self, img: Tensor, txt: Tensor, temb: Tensor, state: JointState, keep: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """img [B, S, width], txt [B, L, width], temb [B or 2B, width] -> the same shapes.

        keep: only the first `keep` image tokens are wanted, as after the last block; the text comes back as it was.
        """
        batch = img.shape[0]
        shift1, scale1, gate1, *mod2 = self._per_token(self.img_mod(temb), batch, state.reference)
        txt_mod = self.txt_mod(temb[:batch])[:, None].chunk(6, dim=-1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = txt_mod

        img_in = torch.addcmul(shift1, self.img_norm1(img), 1 + scale1)
        txt_in = torch.addcmul(t_shift1, self.txt_norm1(txt), 1 + t_scale1)
        img_out, txt_out = self.attn(img_in, txt_in, state, keep)
        if keep is not None:
            img, gate1, *mod2 = (x[:, :keep] for x in (img, gate1, *mod2))
        shift2, scale2, gate2 = mod2
        img = torch.addcmul(img, gate1, img_out)
        img = torch.addcmul(img, gate2, self.img_mlp(torch.addcmul(shift2, self.img_norm2(img), 1 + scale2)))
        if keep is not None:
            return img, txt
        txt = torch.addcmul(txt, t_gate1, txt_out)
        txt_in = torch.addcmul(t_shift2, self.txt_norm2(txt), 1 + t_scale2)
        return img, torch.addcmul(txt, t_gate2, self.txt_mlp(txt_in))

    @staticmethod
    def _per_token(mod: Tensor, batch: int, reference: Tensor | None) -> tuple[Tensor, ...]:
        """Six of [B, 1, width], or with zero_cond_t [B, S, width]: references take the half made at t = 0."""
        if reference is not None:
            mod = torch.where(reference, mod[batch:, None], mod[:batch, None])
        else:
            mod = mod[:, None]
        return mod.chunk(6, dim=-1)


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
        self, img: Tensor, txt: Tensor, state: JointState, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs for images and text; with `keep` for the first image tokens alone."""
        words = txt.shape[1]
        # no names for the three: a name would keep the unrotated tensors in memory while attention runs
        out = state.attend(
            self._queries(img, txt, keep), self._keys(img, txt), self._values(img, txt), 0 if keep is None else words
        )
        if keep is not None:
            return self.to_out[0](out), None
        return self.to_out[0](out[:, words:]), self.to_add_out(out[:, :words])

    def _queries(self, img: Tensor, txt: Tensor, keep: int | None) -> Tensor:
        if keep is None:
            return self._joint(self.norm_added_q, self.add_q_proj(txt), self.norm_q, self.to_q(img))
        return self.norm_q(self.to_q(img[:, :keep]).unflatten(-1, (-1, self.head_dim)))

    def _keys(self, img: Tensor, txt: Tensor) -> Tensor:
        return self._joint(self.norm_added_k, self.add_k_proj(txt), self.norm_k, self.to_k(img))

    def _values(self, img: Tensor, txt: Tensor) -> Tensor:
        return torch.cat([self.add_v_proj(txt), self.to_v(img)], dim=1).unflatten(-1, (-1, self.head_dim))

    def _joint(self, txt_norm: nn.Module, txt: Tensor, img_norm: nn.Module, img: Tensor) -> Tensor:
        heads = (-1, self.head_dim)
        return torch.cat([txt_norm(txt.unflatten(-1, heads)), img_norm(img.unflatten(-1, heads))], dim=1)


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
