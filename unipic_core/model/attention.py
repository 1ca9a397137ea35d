"""The one place where attention is computed; pass another function to `MMDiT` to replace it.

PyTorch's own is the default, and nothing else is used unless it is asked for by name: it runs a flash kernel already
where there is one, and sage, which rounds to 8 bits, changes the picture.
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

from ..errors import UniPicError

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [B, H, Q, D], k and v [B, H, S, D], mask [B, 1, 1, S] bool or None: True = attend) -> [B, H, Q, D]."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`Attention` without a mask, in half precision."""


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as two matrix products: for short sequences in bfloat16 on a CPU twice as fast as the fused kernel."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


BACKENDS: dict[str, Attention] = {"sdpa": scaled_dot_product_attention, "matmul": matmul_attention}
"""What is always there, by name."""


# --- kernels of other packages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """Where a kernel comes from. modules: the first that is there is taken. differentiable: it has a backward pass."""

    modules: tuple[str, ...]
    function: str
    install: str
    adapt: Callable[[Callable[..., Any]], Kernel]
    differentiable: bool


def _flash(function: Callable[..., Any]) -> Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out[0] if isinstance(out, tuple) else out  # early versions of FlashAttention 3 add the normaliser
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
"""All names, for command lines."""

TRAINABLE = (*BACKENDS, *(name for name, package in PACKAGES.items() if package.differentiable))
"""Names of those that have gradients, for configs of trainers."""


@lru_cache
def attention_named(name: str) -> Attention:
    """The attention function of that name; one of another package is `Checked`, with one memory for the process.

    Raises UniPicError for a name that is not known, or whose package is not installed.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    if name not in PACKAGES:
        raise UniPicError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    package = PACKAGES[name]
    return Checked(package.adapt(_imported(name, package)), name, package.differentiable)


def _imported(name: str, package: Package) -> Callable[..., Any]:
    why = ""
    for module in package.modules:
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module), package.function)
            return function
        except (ImportError, AttributeError, OSError) as error:  # OSError: built for another CUDA
            why = " ".join(str(error).split())
    raise UniPicError(
        f"attention {name!r} needs a package that cannot be imported here ({why}); "
        f"pip install {package.install}, or choose sdpa"
    )


HALF = (torch.float16, torch.bfloat16)

CHECKED_CALLS = 120
"""Two passes through the released network's 60 blocks: what overflows may do so in a late block alone."""

Place = tuple[torch.device, torch.dtype]


def computing_type(x: Tensor) -> torch.dtype:
    """Autocast's type where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _shaped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `Checked._by_tokens` gives, without values."""
    return q.new_empty(q.transpose(1, 2).shape, dtype=computing_type(v))


class Checked:
    """A kernel of another package as `Attention`; what it cannot take, or gets wrong, is left to PyTorch's own.

    It is never given masks, full precision, or gradients it has no backward pass for. Its first results on a device
    and in a type are looked at: where it fails, or is not finite while PyTorch's own is, it is not used there again.
    Each of these is told once. Under autocast it computes in autocast's type, as PyTorch's own does.

    What it does depends on values and on what was before, so for torch.compile it is one operator, without gradients.
    """

    def __init__(self, kernel: Kernel, name: str, differentiable: bool) -> None:
        self.kernel = kernel
        self.name = name
        self.differentiable = differentiable
        self.operator = torch.library.custom_op(f"unipic::{name}_attention", self._by_tokens, mutates_args=())
        self.operator.register_fake(_shaped)
        self._calls: dict[Place, int] = {}
        self._given_up: set[Place] = set()
        self._told: set[str] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            compiled: Tensor = self.operator(q, k, v, mask)
            return compiled.transpose(1, 2)
        dtype = computing_type(v)
        place = (q.device, dtype)
        if place in self._given_up:
            return scaled_dot_product_attention(q, k, v, mask)
        if obstacle := self._obstacle(q, k, v, mask, dtype):
            self._tell(f"takes no {obstacle}; calls with it go to PyTorch's own attention")
            return scaled_dot_product_attention(q, k, v, mask)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        calls = self._calls.get(place, 0)
        if calls >= CHECKED_CALLS:
            return self.kernel(q, k, v)
        self._calls[place] = calls + 1
        return self._tried(q, k, v, place)

    def __deepcopy__(self, _: object) -> Checked:
        return self  # a copy of a network computes with the same function

    def _by_tokens(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, Q, H, D] in that order in memory, whichever way it was computed: compiled code relies on it."""
        return self(q, k, v, mask).transpose(1, 2).contiguous()

    def _obstacle(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> str | None:
        if mask is not None:
            return "mask"
        if dtype not in HALF:
            return str(dtype).removeprefix("torch.")
        if not self.differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "gradient"
        return None

    def _tried(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """The kernel's result if it is sound, else PyTorch's own, then and from now on."""
        try:
            out = self.kernel(q, k, v)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any: packages raise what their compilers do
            return self._give_up(f"failed ({' '.join(str(error).split())[:200]})", place, (q, k, v))
        if bool(out.isfinite().all()):
            return out
        sound = scaled_dot_product_attention(q, k, v)
        if bool(sound.isfinite().all()):
            return self._give_up("gave values that are not finite", place, (q, k, v))
        return sound  # what came in was not finite either: not the kernel's fault

    def _give_up(self, what: str, place: Place, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self._given_up.add(place)
        device, dtype = place
        self._tell(f"{what} on {device} in {str(dtype).removeprefix('torch.')}; PyTorch's own attention takes over")
        return scaled_dot_product_attention(*qkv)

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"{self.name} attention {what}", stacklevel=3)
