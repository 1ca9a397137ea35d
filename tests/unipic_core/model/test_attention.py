"""Attention backends: packages that are absent, what their kernels cannot take, and kernels that give wrong values."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unipic_core.errors import UniPicError
from unipic_core.model import attention
from unipic_core.model.attention import ATTENTIONS, BACKENDS, CHECKED_CALLS, PACKAGES, attention_named

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of the packages is there, and nothing is remembered from test to test."""
    for package in PACKAGES.values():
        for module in package.modules:
            monkeypatch.setitem(sys.modules, module, None)
    attention_named.cache_clear()
    yield
    attention_named.cache_clear()


Install = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a module in place whose function answers as told; returns the shapes and types of its calls."""

    def put(module: str, name: str, function: Callable[..., Any]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            calls.append((tuple(q.shape), tuple(k.shape), q.dtype, k.dtype, v.dtype, options))
            return function(q, k, v)

        fake = ModuleType(module)
        setattr(fake, name, recorded)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return put


def by_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on [B, S, H, D], as flash takes it."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def tensors(dtype: torch.dtype = BF16, queries: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, n, 8) for n in (queries, 5, 5))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_fewer_queries_than_keys_and_a_mask(name: str) -> None:
    q, k, v = tensors(torch.float32)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])[:, None, None]
    scores = (q @ k.mT) / 8**0.5
    want = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(attention_named(name)(q, k, v, mask), want)
    torch.testing.assert_close(attention_named(name)(q, k, v, None), scores.softmax(-1) @ v)


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_an_absent_package_says_what_to_install(name: str) -> None:
    with pytest.raises(UniPicError, match=rf"'{name}' needs a package .*pip install {PACKAGES[name].install}.* sdpa"):
        attention_named(name)


def test_unknown_name() -> None:
    with pytest.raises(UniPicError, match=r"one of sdpa, matmul, flash, sage, got 'fast'"):
        attention_named("fast")


@pytest.mark.parametrize("module", PACKAGES["flash"].modules)
@pytest.mark.parametrize("tuples", [False, True])
def test_flash_is_given_tokens_before_heads(install: Install, module: str, tuples: bool) -> None:
    calls = install(module, "flash_attn_func", lambda *qkv: (by_tokens(*qkv), None) if tuples else by_tokens(*qkv))
    q, k, v = tensors()
    torch.testing.assert_close(attention_named("flash")(q, k, v, None), F.scaled_dot_product_attention(q, k, v))
    assert calls == [((2, 3, 4, 8), (2, 5, 4, 8), BF16, BF16, BF16, {})]


def test_the_newer_flash_goes_first(install: Install) -> None:
    newer = install("flash_attn_interface", "flash_attn_func", by_tokens)
    older = install("flash_attn", "flash_attn_func", by_tokens)
    attention_named("flash")(*tensors(), None)
    assert (len(newer), len(older)) == (1, 0)


def test_sage_is_given_heads_before_tokens(install: Install) -> None:
    calls = install("sageattention", "sageattn", F.scaled_dot_product_attention)
    q, k, v = tensors()
    torch.testing.assert_close(attention_named("sage")(q, k, v, None), F.scaled_dot_product_attention(q, k, v))
    assert calls == [((2, 4, 3, 8), (2, 4, 5, 8), BF16, BF16, BF16, {"tensor_layout": "HND", "is_causal": False})]


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise AssertionError("the kernel was called with what it cannot take")


@pytest.mark.parametrize("obstacle", ["mask", "float32", "gradient"])
def test_what_a_kernel_cannot_take_goes_to_pytorch_and_is_told_once(install: Install, obstacle: str) -> None:
    install("sageattention", "sageattn", wrong)
    q, k, v = tensors(torch.float32 if obstacle == "float32" else BF16)
    mask = torch.tensor([True, True, False, True, False])[None, None, None] if obstacle == "mask" else None
    v.requires_grad_(obstacle == "gradient")
    sage = attention_named("sage")
    with pytest.warns(UserWarning, match=rf"^sage attention does not support {obstacle}") as told:
        results = [sage(q, k, v, mask) for _ in range(2)]
    assert len(told) == 1
    for result in results:
        torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, mask))
        assert result.requires_grad == (obstacle == "gradient")


def test_gradients_go_through_flash(install: Install) -> None:
    calls = install("flash_attn", "flash_attn_func", by_tokens)
    q, k, v = tensors()
    v.requires_grad_()
    attention_named("flash")(q, k, v, None).sum().backward()
    assert v.grad is not None
    assert len(calls) == 1


def test_autocast_decides_the_type(install: Install) -> None:
    calls = install("flash_attn", "flash_attn_func", by_tokens)
    with torch.autocast("cpu", dtype=BF16):
        out = attention_named("flash")(*tensors(torch.float32), None)
    assert out.dtype == BF16
    assert [call[2:5] for call in calls] == [(BF16, BF16, BF16)]


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(q, float("nan"))


def raising(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is\n available")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(broken, "gave values that are not finite"), (raising, r"failed \(no kernel image is avail")],
)
def test_a_kernel_that_is_wrong_is_replaced_with_one_warning(install: Install, kernel: Any, message: str) -> None:
    calls = install("sageattention", "sageattn", kernel)
    q, k, v = tensors()
    sage = attention_named("sage")
    with pytest.warns(UserWarning, match=rf"^sage attention {message}.* on cpu in bfloat16") as told:
        results = [sage(q, k, v, None) for _ in range(3)]
    assert (len(told), len(calls)) == (1, 1)
    for result in results:
        torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v))
    with pytest.warns(UserWarning, match="in float16"):  # another type is tried by itself
        sage(*tensors(torch.float16), None)
    assert len(calls) == 2


@pytest.mark.parametrize("call", [CHECKED_CALLS, CHECKED_CALLS + 1])
def test_a_late_block_is_checked_and_later_steps_are_not(install: Install, call: int) -> None:
    asked: list[int] = []

    def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(1)
        return broken(q, k, v) if len(asked) == call else F.scaled_dot_product_attention(q, k, v)

    install("sageattention", "sageattn", late)
    sage, qkv = attention_named("sage"), tensors()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sound = [bool(sage(*qkv, None).isfinite().all()) for _ in range(CHECKED_CALLS + 2)]
    found = call <= CHECKED_CALLS
    assert sound.count(False) == (0 if found else 1)
    assert len(told) == (1 if found else 0)
    assert len(asked) == (call if found else CHECKED_CALLS + 2)


def test_input_that_is_not_finite_is_not_the_kernels_fault(install: Install) -> None:
    calls = install("sageattention", "sageattn", F.scaled_dot_product_attention)
    q, k, v = tensors()
    sage = attention_named("sage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bool(sage(q, k, v * float("nan"), None).isfinite().all())
        sage(q, k, v, None)
    assert len(calls) == 2


def test_a_copied_network_keeps_its_kernel(install: Install) -> None:
    install("sageattention", "sageattn", F.scaled_dot_product_attention)
    sage = attention_named("sage")
    assert copy.deepcopy({"attention": sage}) == {"attention": sage}


def test_out_of_memory_is_not_hidden(install: Install) -> None:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    install("flash_attn", "flash_attn_func", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention_named("flash")(*tensors(), None)


def test_names() -> None:
    assert set(ATTENTIONS) == set(BACKENDS) | set(PACKAGES)
    assert "sage" not in attention.TRAINABLE  # it has no backward pass
