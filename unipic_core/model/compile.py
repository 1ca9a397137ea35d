"""torch.compile for the network: block by block, so that all blocks share one piece of code, made once.

The numbers of text and image tokens stay open in it: other references, prompts and sizes need no new compilation. A
new one is made for what the code itself depends on, once each: the last block, a padded batch against an even one, one
sample against several, and the segments of a causal attention form.
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
"""Compilations of the block that are kept; torch would stop at 8 and go on without compiling."""

COMPILERS = {"win32": "cl", "darwin": "clang++"}
"""C++ compilers that torch calls when CXX names none; g++ elsewhere."""

C_COMPILERS = ("gcc", "clang")
"""Those that triton looks for on Linux when CC names none; on Windows it brings its own."""


def compile_blocks(network: MMDiT, backend: str | object = "inductor") -> None:
    """Compile the network's blocks in place, for inference; the work is done in their first forward.

    Parameters keep their names, and may change and move afterwards: the code reads them anew. backend: as
    torch.compile's.
    """
    import torch._dynamo  # takes a second, which only those who compile should wait

    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, VARIANTS)
    for embedding in (network.img_in, network.txt_in):
        embedding.register_forward_hook(_own_memory)
    for block in network.transformer_blocks:
        block.compile(dynamic=True, backend=backend)


def _own_memory(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
    """Without gradients a linear layer gives a view of a matrix, for which the first block would be compiled apart."""
    return tokens.clone()


def check_compiler(device: torch.device | str) -> None:
    """UniPicError if what torch.compile needs for a device is not there.

    For a CPU a C++ compiler; for a GPU triton, and the C compiler with which it builds what starts its kernels.
    """
    if torch.device(device).type == "cpu":
        _require_compiler("a CPU", "C++", [os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")])
        return
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        raise UniPicError(f"compiling for a GPU needs triton, which is absent; pip install {package}, or do without")
    if sys.platform == "linux":
        given = os.environ.get("CC")
        _require_compiler("a GPU", "C", [given] if given else C_COMPILERS)


def _require_compiler(device: str, language: str, names: Sequence[str]) -> None:
    """UniPicError if none of these programs is there."""
    if not any(map(shutil.which, names)):
        raise UniPicError(
            f"compiling for {device} needs the {language} compiler {' or '.join(names)}, which is absent; install it, "
            "or do without"
        )
