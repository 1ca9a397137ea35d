"""Attention functions. `MMDiT` takes one as an argument.

PyTorch's is the default and the only one used unless another is chosen by name: it already runs a flash kernel where
one is available, and sage, which rounds to 8 bits, changes the picture.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UniPicError, joined_lines

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [B, H, Q, D], k and v [B, H, S, D], mask or None) -> [B, H, Q, D]. The mask is [1 or B, 1, 1 or Q, S]: bool with
True = attend, or a bias in q's dtype that is added to the scores."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`Attention` without a mask, in half precision."""


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention with PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention as two matrix products: on a CPU, for short bfloat16 sequences, twice as fast as fused."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


BACKENDS: dict[str, Attention] = {"sdpa": scaled_dot_product_attention, "matmul": matmul_attention}
"""Name -> attention function that needs no other package."""


# --- kernels of other packages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """Package of a kernel. modules: names to import, in order of preference. differentiable: has a backward pass."""

    modules: tuple[str, ...]
    function: str
    install: str
    adapt: Callable[[Callable[..., Any]], Kernel]
    differentiable: bool


def _flash(function: Callable[..., Any]) -> Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out[0] if isinstance(out, tuple) else out  # early versions of FlashAttention 3 also return the normaliser
        return out.transpose(1, 2)

    return kernel


def _sage(function: Callable[..., Any]) -> Kernel:
    return lambda q, k, v: function(q, k, v, tensor_layout="HND", is_causal=False)


PACKAGES = {
    "flash": Package(
        ("flash_attn_interface", "flash_attn"), "flash_attn_func", "flash-attn --no-build-isolation", _flash, True
    ),
    "sage": Package(("sageattention",), "sageattn", "sageattention", _sage, False),
}

ATTENTIONS = (*BACKENDS, *PACKAGES)
"""Names of all attention functions."""

TRAINABLE = (*BACKENDS, *(name for name, package in PACKAGES.items() if package.differentiable))
"""Names of the attention functions with gradients."""


@lru_cache
def attention_named(name: str) -> Attention:
    """Return the attention function of this name; one of another package as one `Checked` object per process.

    Raises UniPicError for an unknown name or a package that is not installed.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    if name not in PACKAGES:
        raise UniPicError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    package = PACKAGES[name]
    return Checked(package.adapt(_imported(name, package)), name, package.differentiable)


def _imported(name: str, package: Package) -> Callable[..., Any]:
    reason = ""
    for module in package.modules:
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module), package.function)
            return function
        except (ImportError, AttributeError, OSError) as error:  # OSError: built for another CUDA
            reason = " ".join(str(error).split())
    raise UniPicError(
        f"attention {name!r} needs a package that cannot be imported here ({reason}); "
        f"pip install {package.install}, or choose sdpa"
    )


HALF = (torch.float16, torch.bfloat16)

CHECKED_CALLS = 120
"""Number of calls whose results are checked: two passes through the released network's 60 blocks, since an overflow may
occur in a late block only."""

Place = tuple[torch.device, torch.dtype]


def computing_type(x: Tensor) -> torch.dtype:
    """Return autocast's dtype if autocast is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _shaped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return an empty result of `Checked._by_tokens`, for torch.compile."""
    return q.new_empty(q.transpose(1, 2).shape, dtype=computing_type(v))


class Checked:
    """Attention by another package's kernel, with PyTorch's attention as the fallback.

    Calls with masks, full precision, or gradients without a backward pass go to PyTorch's attention. The first
    CHECKED_CALLS results for a device and dtype are checked: if the kernel fails, or is not finite while PyTorch's
    attention is, it is not used there again. Each fallback warns once. Under autocast the kernel computes in autocast's
    dtype, as PyTorch's attention does.

    The choice depends on values and on earlier calls, so for torch.compile it is one operator, without gradients.
    """

    def __init__(self, kernel: Kernel, name: str, differentiable: bool) -> None:
        self.kernel = kernel
        self.name = name
        self.differentiable = differentiable
        self.operator = torch.library.custom_op(f"unipic::{name}_attention", self._by_tokens, mutates_args=())
        self.operator.register_fake(_shaped)
        self._calls: dict[Place, int] = {}
        self._excluded: set[Place] = set()
        self._warned: set[str] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            compiled: Tensor = self.operator(q, k, v, mask)
            return compiled.transpose(1, 2)
        dtype = computing_type(v)
        place = (q.device, dtype)
        if place in self._excluded:
            return scaled_dot_product_attention(q, k, v, mask)
        if unsupported := self._unsupported(q, k, v, mask, dtype):
            self._warn_once(f"does not support {unsupported}; such calls use PyTorch's attention")
            return scaled_dot_product_attention(q, k, v, mask)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        calls = self._calls.get(place, 0)
        if calls >= CHECKED_CALLS:
            return self.kernel(q, k, v)
        self._calls[place] = calls + 1
        return self._checked_result(q, k, v, place)

    def __deepcopy__(self, _: object) -> Checked:
        return self  # copies of a network share the function

    def _by_tokens(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, Q, H, D], contiguous in that order, which compiled code relies on."""
        return self(q, k, v, mask).transpose(1, 2).contiguous()

    def _unsupported(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> str | None:
        if mask is not None:
            return "masks"
        if dtype not in HALF:
            return str(dtype).removeprefix("torch.")
        if not self.differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "gradients"
        return None

    def _checked_result(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """Return the kernel's result if it is finite; otherwise exclude the kernel and return PyTorch's."""
        try:
            out = self.kernel(q, k, v)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any: packages raise whatever their compilers do
            return self._exclude(f"failed ({joined_lines(error)})", place, (q, k, v))
        if bool(out.isfinite().all()):
            return out
        expected = scaled_dot_product_attention(q, k, v)
        if bool(expected.isfinite().all()):
            return self._exclude("gave values that are not finite", place, (q, k, v))
        return expected  # the inputs were not finite: not the kernel's fault

    def _exclude(self, reason: str, place: Place, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self._excluded.add(place)
        device, dtype = place
        self._warn_once(f"{reason} on {device} in {str(dtype).removeprefix('torch.')}; PyTorch's attention takes over")
        return scaled_dot_product_attention(*qkv)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{self.name} attention {message}", stacklevel=3)
