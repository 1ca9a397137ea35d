"""The compiled network: equal to the plain one, and how often it is compiled."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.errors import UniPicError
from unipic_core.model.attention import Checked
from unipic_core.model.compile import check_compiler, compile_blocks
from unipic_core.model.config import FULL, PREFIX_CAUSAL, REFERENCE_CAUSAL, MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.run.kv_cache import KVCache
from unipic_core.weights.lora import merge_lora, read_lora, save_lora

TARGET = LatentShape(1, 4, 5)

MOST_COMPILATIONS = {FULL: 2, REFERENCE_CAUSAL: 6, PREFIX_CAUSAL: 9}
"""Form -> one for the last block and one for all others, for each segment and what it comes after.

reference_causal: the references; the rest alone, and after them. prefix_causal: the references; the text alone, and
after them; the target after the text, and after both. The last block makes no more of a text than keys and values,
which is the same with references and without: one less.
"""

Network = tuple[MMDiT, MMDiT, CompileCounter]


def network(form: str = FULL) -> MMDiT:
    config = MMDiTConfig(
        attention_form=form,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        in_channels=8,
        out_channels=2,
        axes_dims_rope=(4, 6, 6),
    )
    torch.manual_seed(0)
    return MMDiT(config).eval().requires_grad_(False)


def sample(references: int, words: int) -> tuple[PackedLatents, float, TextCond]:
    """A target and references of different sizes, and text."""
    generator = torch.Generator().manual_seed(references)
    shapes = (TARGET, *(LatentShape(1, 3, 2 + i) for i in range(references)))
    tokens = torch.randn(1, sum(s.num_tokens for s in shapes), 8, generator=generator)
    text = TextCond(torch.randn(1, words, 12, generator=generator))
    return PackedLatents(tokens, (shapes,), TARGET.num_tokens), 0.5, text


@pytest.fixture(scope="module")
def networks(request: pytest.FixtureRequest) -> Iterator[Network]:
    """A plain network, a compiled one with the same weights, and its count of compilations."""
    torch.compiler.reset()
    plain, compiled, count = network(request.param), network(request.param), CompileCounter()
    compile_blocks(compiled, count)
    yield plain, compiled, count
    torch.compiler.reset()


def agree(networks: Network, references: int, words: int) -> None:
    """The compiled network, with the condition cache where its form has one, against the plain one without."""
    plain, compiled, _ = networks
    latents, t, text = sample(references, words)
    with torch.no_grad():
        got = compiled(latents, t, text, cache=KVCache().get(compiled, latents, text))
        torch.testing.assert_close(got, plain(latents, t, text))


@pytest.mark.parametrize("networks", MOST_COMPILATIONS, indirect=True)
def test_a_few_compilations_serve_all_references_and_prompts(networks: Network) -> None:
    """Without references comes first: there two lengths are equal, and the code must not count on that."""
    lengths = {0: 7, 1: 7, 2: 7, 3: 11, 6: TARGET.num_tokens}
    counts = []
    for more_words in (0, 1):
        for references, words in lengths.items():
            agree(networks, references, words + more_words)
        counts.append(networks[2].frame_count)
    assert counts[0] == counts[1] <= MOST_COMPILATIONS[networks[0].config.attention_form]


@pytest.mark.parametrize("networks", [FULL], indirect=True)
def test_weights_may_change_and_move(networks: Network, tmp_path: Path) -> None:
    agree(networks, 1, 7)
    before, still = networks[2].frame_count, sample(1, 7)
    layer = "transformer_blocks.1.attn.to_q"
    save_lora(tmp_path / "a.safetensors", {layer: (torch.ones(2, 32), torch.ones(32, 2))})
    with torch.no_grad():
        old = networks[1](*still)
        for one in networks[:2]:
            merge_lora(one, read_lora(tmp_path / "a.safetensors"), 0.1)
            one.to(torch.float64).to(torch.float32)  # every parameter lies elsewhere now
        assert not torch.allclose(networks[1](*still), old)
    agree(networks, 1, 7)
    assert networks[2].frame_count == before
    assert list(networks[1].state_dict()) == list(networks[0].state_dict())


def test_a_checked_kernel_costs_no_compilations() -> None:
    """Its counting of calls must not make every call one, and there is one graph to a block, not two around it."""
    calls: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            return torch.full_like(q, float("nan"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    torch.compiler.reset()
    count = CompileCounter()
    plain, compiled = network().bfloat16(), network().bfloat16()
    compiled.attention = Checked(kernel, "fake", differentiable=False)
    compile_blocks(compiled, count)
    agree((plain, compiled, count), 1, 7)
    with pytest.warns(UserWarning, match="not finite"):
        agree((plain, compiled, count), 2, 7)
    agree((plain, compiled, count), 3, 7)
    assert (len(calls), count.frame_count) == (5, 2)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device", "hide", "message"),
    [
        ("cuda", lambda m: m.setattr(importlib.util, "find_spec", lambda name: None), "triton, which is absent; pip"),
        ("cpu", lambda m: m.setattr(shutil, "which", lambda name: None), r"C\+\+ compiler .* absent; install it"),
        ("cuda", lambda m: no_c_compiler(m), "C compiler gcc or clang, which is absent; install it"),
        ("cuda", lambda m: (no_c_compiler(m), m.setenv("CC", "mycc")), "C compiler mycc, which is absent"),
    ],
)
def test_what_compiling_needs(
    device: str, hide: Callable[[pytest.MonkeyPatch], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch)
    with pytest.raises(UniPicError, match=message):
        check_compiler(device)


def no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Linux machine has it whose triton came without one."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)


def test_a_compiler_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    check_compiler("cpu")


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_c_compiler_that_is_there_or_not_needed(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_c_compiler(monkeypatch)
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "linux":
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    check_compiler("cuda")
