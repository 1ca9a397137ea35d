"""torch.compile of the network, block by block, so that all blocks share one compilation.

The numbers of text and image tokens are dynamic: other references, prompts and sizes need no new compilation. One more
compilation each is needed for the last block, for a padded batch, for one sample instead of several, and for each
segment of a causal attention form.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UniPicError
from .mmdit import MMDiT

VARIANTS = 64
"""Most compilations of a block; after torch's default of 8 the block would run uncompiled."""

COMPILERS = {"win32": "cl", "darwin": "clang++"}
"""C++ compilers that torch calls if CXX is not set; g++ elsewhere."""

C_COMPILERS = ("gcc", "clang")
"""C compilers that triton looks for on Linux if CC is not set; on Windows it includes one."""


def compile_blocks(network: MMDiT, backend: str | object = "inductor") -> None:
    """Compile the network's blocks in place, for inference; compilation happens in their first forward.

    Parameter names do not change, and parameters may change and move afterwards. backend: as torch.compile's.
    """
    import torch._dynamo  # takes a second, so only when compiling

    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, VARIANTS)
    for embedding in (network.img_in, network.txt_in):
        embedding.register_forward_hook(_cloned)
    for block in network.transformer_blocks:
        block.compile(dynamic=True, backend=backend)


def _cloned(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
    """Clone the tokens: without gradients a linear layer returns a view, for which block 1 would compile separately."""
    return tokens.clone()


def check_compiler(device: torch.device | str) -> None:
    """Raise UniPicError if torch.compile lacks a requirement for a device.

    A CPU needs a C++ compiler; a GPU needs triton, and a C compiler with which triton builds its kernel launchers.
    """
    if torch.device(device).type == "cpu":
        _require_compiler("a CPU", "C++", [os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")])
        return
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        raise UniPicError(f"compiling for a GPU needs triton, which is absent; pip install {package}, or do without")
    if sys.platform == "linux":
        compiler = os.environ.get("CC")
        _require_compiler("a GPU", "C", [compiler] if compiler else C_COMPILERS)


def _require_compiler(device: str, language: str, names: Sequence[str]) -> None:
    """Raise UniPicError if none of these programs is installed."""
    if not any(map(shutil.which, names)):
        raise UniPicError(
            f"compiling for {device} needs the {language} compiler {' or '.join(names)}, which is absent; install it, "
            "or do without"
        )
