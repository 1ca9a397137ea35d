"""Attention by ComfyUI's function, with its patches, rotation matrices and attention biases."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention_masked
from torch import Tensor

from ....unipic_core.errors import UniPicError
from ....unipic_core.model.blocks import JointState, KeyValue, joined, rows_of
from ....unipic_core.model.rope import rotation

Options = dict[str, Any]
"""ComfyUI's transformer_options."""


@dataclass(frozen=True)
class HookedState(JointState):
    """Attention context of one segment, computed by ComfyUI's function after its "attn1_patch" patches.

    rope: rotation matrices [B, 1, L + S, D / 2, 2, 2]; mask: a bias [B, 1 or L + S, keys] or None; attention: with
    ComfyUI's signature; words: L; past: keys and values [B or 1, H, N, D].
    """

    rope: Any
    attention: Any
    options: Options = field(default_factory=dict)
    words: int = 0

    def placed(self, k: Tensor, v: Tensor) -> KeyValue:
        k = apply_rope1(k.transpose(1, 2).contiguous(), self.rope[:, :, : k.shape[1]])
        return k, v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> tuple[Tensor, KeyValue | None]:
        """As `JointState.attend`. Patches get q and k before rotation and the text's mask [B, L], as in ComfyUI's own
        network, which leaves a mask aside that they return."""
        q, k, v = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2)
        rope, mask = self.rope, rows_of(self.mask, start, q.shape[2], dim=1)
        extra = {**self.options, "img_slice": [self.words, q.shape[2]]}
        text_mask = self._text_mask(k.shape[2])
        for patch in self.options.get("patches", {}).get("attn1_patch", ()):
            out = patch(q, k, v, pe=rope, attn_mask=text_mask, extra_options=extra)
            q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
            rope, text_mask = out.get("pe", rope), out.get("attn_mask", text_mask)
        q = apply_rope1(q, rope[:, :, start : start + q.shape[2]])
        segment = apply_rope1(k, rope[:, :, : k.shape[2]]), v
        k, v = joined(self.past, segment, dim=2)
        out = self.attention(q, k, v, q.shape[1], mask, transformer_options=self.options, skip_reshape=True)
        return out, segment if self.return_kv else None

    def _text_mask(self, keys: int) -> Tensor | None:
        """The bias [B, L] of this segment's text; keys: how many this segment has, at the end of the mask's."""
        if self.mask is None or not self.words:
            return None
        start = self.mask.shape[-1] - keys
        return self.mask[:, 0, start : start + self.words]


def check_patches(options: Options) -> None:
    """UniPicError for a patch of the attention that does not take what ComfyUI gives it on Qwen-Image: pe, attn_mask.

    Token merging and tiling of U-Nets are such; on ComfyUI's own network they end in Python's TypeError.
    """
    for patch in options.get("patches", {}).get("attn1_patch", ()):
        try:
            inspect.signature(patch).bind(None, None, None, pe=None, attn_mask=None, extra_options=None)
        except TypeError:
            node = getattr(patch, "__qualname__", type(patch).__name__).split(".")[0]
            raise UniPicError(
                f"{node} changes the attention of U-Nets such as SDXL and does not know Qwen-Image's; remove that node"
            ) from None
        except ValueError:  # written in C: it has no signature to look at
            continue


def rotation_matrices(ids: Tensor, axes_dims: tuple[int, int, int]) -> Tensor:
    """Positions [B, N, 3] -> [B, 1, N, D / 2, 2, 2] float32, the layout of ComfyUI's patches and kernels."""
    cos, sin = rotation(ids.float(), axes_dims)
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).transpose(1, 2).contiguous()


def text_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Attention bias [B, L] from a text mask (bool or integers, 0 = padding); a floating mask is a bias already."""
    if mask is None:
        return None
    bias = mask.to(dtype)
    return bias if mask.is_floating_point() else (bias - 1) * torch.finfo(dtype).max


def attention_on(device: torch.device) -> Any:
    """ComfyUI's attention function for a device."""
    # ComfyUI's own choice for a CPU is meant to save memory; PyTorch's attention takes less, and is faster
    return attention_pytorch if device.type == "cpu" else optimized_attention_masked
