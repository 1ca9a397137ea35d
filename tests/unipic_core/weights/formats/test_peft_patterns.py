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
from unipic_core.weights.formats.peft_patterns import MAX_LENGTH, MOST_CHOICES, LayerPatterns
from unipic_core.weights.lora import read_lora

characters = st.sampled_from(["a", "b", "0", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "^", "$", "|"])
repeated = st.tuples(st.sampled_from(["a", ".", r"\d", "[ab]"]), st.sampled_from("*+?")).map("".join)
groups = st.lists(characters.filter(lambda one: one not in "^$"), min_size=1).map(lambda some: f"({''.join(some)})")
patterns = st.tuples(
    st.lists(characters), st.lists(st.one_of(repeated, groups), max_size=MOST_CHOICES), st.lists(characters)
).map(lambda parts: "".join(piece for some in parts for piece in some))


@given(patterns, st.text("ab.0", max_size=6))
def test_as_peft_matches(pattern: str, name: str) -> None:
    """peft.utils.other.get_pattern_key."""
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert (LayerPatterns({pattern: 1.0}).value(name) is not None) == expected


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


@pytest.mark.parametrize("pattern", [".*.*.*b", r"[^b]*\w*.+b", "(a|a|a|a)(a|a|a|a)(a|a|a|a)b"])
def test_none_takes_long(pattern: str) -> None:
    start = time.perf_counter()
    assert LayerPatterns({pattern: 1.0}).value("a" * MAX_LENGTH) is None
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a|a)*b", "(.*)*(.*)*b", "a?" * 50 + "b", ".*.*.*.*"),
        *("to_q{2}", "(?i)to_q", "(to_q", "to_q)", "*to_q", "[z-a]", r"(a)\1", "a" * (MAX_LENGTH + 1)),
    ],
)
def test_other_patterns_are_refused_by_file_and_name(pattern: str, tmp_path: Path) -> None:
    tensors = {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}
    settings = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {pattern: 1}}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    start = r"^l\.safetensors: the alpha_pattern of its adapter settings is not read: .*"
    named = re.escape(f"the pattern {pattern[:60]!r} is not understood: ")
    with pytest.raises(LoRAError, match=f"{start}{named}.*; save it with an alpha in each layer$"):
        read_lora(tmp_path / "l.safetensors")
