"""Patterns of peft's settings: as Python's `re` matches them, never slow, and one sentence for the rest."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from unipic_core.errors import LoRAError
from unipic_core.weights.formats.peft_patterns import MAX_LENGTH, LayerPatterns
from unipic_core.weights.lora import read_lora

atoms = st.sampled_from(["a", "b", "0", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", ".*", "b+", "a?", "^a", "b$", "a*?"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from("*+?")).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@given(patterns, st.text("ab.0", max_size=6))
def test_as_peft_matches(pattern: str, name: str) -> None:
    """peft.utils.other.get_pattern_key."""
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert (LayerPatterns({pattern + "|-": 1.0}).value(name) is not None) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.attn.to_q", 1.0),
        ("x.blocks.0.attn.to_q", 2.0),
        ("blocks.0.attn.to_k", 3.0),
        ("blocks.0.attn.to_v", 4.0),
        ("blocks.0.ff.net.0", 5.0),
        ("my_to_k", None),
        ("blocks.0.ff", None),
    ],
)
def test_the_first_that_matches(name: str, value: float | None) -> None:
    ordered = {"^blocks.0.attn.to_q": 1.0, r"attn\.to_[q]": 2.0, "to_k": 3.0, "to_.": 4.0, r"ff\.net\.0$": 5.0}
    assert LayerPatterns({**ordered, "net.0": 6.0, "attn.to_v": 7.0}).value(name) == value


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*(.*)*(.*)*b", "a?" * 50 + "a" * 50 + "b"])
def test_patterns_that_take_re_for_ever(pattern: str) -> None:
    start = time.perf_counter()
    assert LayerPatterns({pattern: 1.0}).value("a" * MAX_LENGTH) is None
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("to_q{2}", "the pattern 'to_q{2}' has '{' where it is not understood"),
        ("(?i)to_q", "has '?' where"),
        ("(to_q", "has '(' where"),
        ("to_q)", "has ')' where"),
        ("*to_q", "has '*' where"),
        ("[z-a]", "has '[z-a]' where"),
        (r"(a)\1", "where it is not understood"),
        ("a" * (MAX_LENGTH + 1), f"expected patterns of at most {MAX_LENGTH} characters, got {MAX_LENGTH + 1}"),
    ],
)
def test_other_patterns_are_refused_by_file_and_name(pattern: str, message: str, tmp_path: Path) -> None:
    tensors = {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}
    settings = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {pattern: 1}}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    start = r"^l\.safetensors: the alpha_pattern of its adapter settings is not read: .*"
    with pytest.raises(LoRAError, match=start + re.escape(message) + ".*; save it with an alpha in each layer$"):
        read_lora(tmp_path / "l.safetensors")


def test_work_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipic_core.weights.formats.peft_patterns.MOST_WORK", 100_000)
    hostile = LayerPatterns({f"to_.{number}": 1.0 for number in range(1000)})
    with pytest.raises(LoRAError, match="expected fewer patterns for so many layers"):
        [hostile.value(f"blocks.{number}.attn") for number in range(100)]
    plain = LayerPatterns({f"blocks.{number}.attn": float(number) for number in range(1000)})
    assert [plain.value(f"blocks.{number}.attn") for number in range(1000)] == list(range(1000))
