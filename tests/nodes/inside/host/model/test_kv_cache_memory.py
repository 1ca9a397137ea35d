"""Memory of the kv cache: the bytes in ComfyUI's estimate, against those that a run holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.sampler_helpers
import pytest
import torch
from causal_tools import CAUSAL, build, run
from model_tools import lora_file, random_inputs
from unipic_pack.nodes.host.model import kv_cache, kv_memory
from unipic_pack.nodes.host.model.kv_memory import CACHED_TOKENS, SEPARATE, SHARED
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.lora import add_lora
from unipic_pack.unipic_core.model.config import kv_cache_bytes
from unipic_pack.unipic_core.weights.recipe import Recipe

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")


def cached_bytes(model: Any) -> int:
    """Bytes of all keys and values in memory, with those of the approximate way."""
    cache = model.model.diffusion_model.kv_cache
    values = [value for exact in cache.exact.values() for value in exact.values()]
    values += [references.key_values for references in cache.approximate.values()]
    return sum(t.untyped_storage().nbytes() for value in values for pair in value for t in pair)


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For each run, the bytes that the kv cache adds to ComfyUI's memory estimate."""
    seen: list[float] = []
    original = comfy.sampler_helpers.estimate_memory

    def watched(model: Any, shape: Any, conds: dict[str, list[dict]]) -> Any:
        bare = {k: [{n: v for n, v in c.items() if n != CACHED_TOKENS} for c in cs] for k, cs in conds.items()}
        estimate, without = original(model, shape, conds), original(model, shape, bare)
        seen.append(estimate[0] - without[0])
        assert 0 <= estimate[1] - without[1] <= seen[-1]
        return estimate

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", watched)
    return seen


@pytest.fixture
def cached_at_end(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the kv cache at the end of each run."""
    seen: list[int] = []
    original = kv_cache.KVCache.end_run

    def watched(self: Any) -> None:
        if self._patcher is not None:
            seen.append(cached_bytes(self._patcher))
        original(self)

    monkeypatch.setattr(kv_cache.KVCache, "end_run", watched)
    return seen


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("form", CAUSAL)
def test_the_estimate_counts_what_a_run_keeps(
    form: str, cfg: float, causal_models: dict[str, Any], estimates: list[float], cached_at_end: list[int]
) -> None:
    """References once, though both conditionings bring them; texts of the conditionings that are evaluated."""
    run(causal_models[form], cfg=cfg, batch=2)
    texts = 0 if form == "reference_causal" else 9 if cfg == 1 else 9 + 4
    config = causal_models[form].model.diffusion_model.config
    assert cached_at_end == [kv_cache_bytes(15 + 12 + texts, config.num_layers, config.width, 4)]
    assert estimates == pytest.approx(cached_at_end)


@pytest.mark.parametrize("form", CAUSAL)
def test_the_estimate_counts_other_references_of_the_negative(
    form: str, causal_models: dict[str, Any], estimates: list[float], cached_at_end: list[int]
) -> None:
    """Two sets are cached where positive and negative differ, one where they are copies of the same."""
    _, _, references = random_inputs()
    run(causal_models[form], cfg=3, references=references, negative_references=references[:1])
    run(causal_models[form], cfg=3, references=references, negative_references=[r.clone() for r in references])
    run(causal_models[form], cfg=1, references=references, negative_references=references[:1])
    config = causal_models[form].model.diffusion_model.config
    more = kv_cache_bytes(15, config.num_layers, config.width, 4)
    assert cached_at_end[0] - cached_at_end[1] == more
    assert cached_at_end[2] <= cached_at_end[1]
    assert estimates == pytest.approx(cached_at_end)


def test_the_estimate_counts_no_more_sets_than_are_kept(causal_models: dict[str, Any]) -> None:
    model = causal_models["reference_causal"].model
    config = model.diffusion_model.config

    def cached_bytes(*sets: int) -> float:
        shapes = {SHARED: [[1, tokens] for tokens in sets]}
        return model.memory_required([1, 16, 1, 8, 8], shapes) - model.memory_required([1, 16, 1, 8, 8], {})

    for sets, tokens in (((), 0), ((5,), 5), ((5, 9), 14), ((5, 9, 7), 16)):
        assert cached_bytes(*sets) == pytest.approx(kv_cache_bytes(tokens, config.num_layers, config.width, 4))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_estimate_counts_the_approximate_cache(
    cfg: float, nano: Path, estimates: list[float], cached_at_end: list[int]
) -> None:
    """There the references' are each picture's and each conditioning's own."""
    run(load_model(nano), "approximate", cfg=cfg, batch=2)
    assert cached_at_end[0] > 0
    assert estimates == pytest.approx(cached_at_end)


def test_the_estimate_counts_nothing_that_is_not_kept(
    nano: Path, causal_models: dict[str, Any], estimates: list[float], cached_at_end: list[int]
) -> None:
    full = load_model(nano)
    run(full)
    run(causal_models["prefix_causal"], "off")
    assert estimates == cached_at_end == [0, 0]
    lora = build(lora_file("transformer.{}.lora_{}.weight"), Recipe(attention_form="reference_causal"))
    run(add_lora(full, lora, 1.0)[0])
    run(full)
    assert estimates[2:] == pytest.approx(cached_at_end[2:])
    assert cached_at_end[2] > cached_at_end[3] == 0


def test_the_estimate_takes_the_negative_where_a_guider_may(
    causal_models: dict[str, Any], estimates: list[float]
) -> None:
    model = causal_models["prefix_causal"].clone()
    run(model)
    model.model_options["disable_cfg1_optimization"] = True
    run(model)
    config = model.model.diffusion_model.config
    assert estimates[1] - estimates[0] == pytest.approx(kv_cache_bytes(4, config.num_layers, config.width, 4))


@pytest.mark.parametrize(("place", "dtype"), [("gpu", "int8"), ("auto", "int8"), ("cpu", "auto"), ("cpu", "int8")])
@pytest.mark.parametrize("form", CAUSAL)
def test_the_estimate_counts_what_is_on_the_device(
    form: str, place: str, dtype: str, causal_models: dict[str, Any], estimates: list[float], monkeypatch: Any
) -> None:
    """int8 with a float32 scale for each head of each token; a cache in main memory is not the device's."""
    stored: list[int] = []
    original = kv_cache.KVCache.end_run

    def watched(self: Any) -> None:
        stored.append(sum(value.nbytes for cache in self.exact.values() for value in cache.values()))
        original(self)

    monkeypatch.setattr(kv_cache.KVCache, "end_run", watched)
    model = kv_cache.with_kv_cache(causal_models[form], place, dtype)
    run(model)
    config = model.model.diffusion_model.config
    itemsize = 4 if dtype == "auto" else 1 + 4 / config.attention_head_dim
    texts = 0 if form == "reference_causal" else 9
    assert max(stored) == kv_cache_bytes(15 + 12 + texts, config.num_layers, config.width, itemsize)
    whole_tokens = 2 * kv_cache_bytes(1, config.num_layers, config.width, 4)  # counted up for references and text
    assert 0 <= estimates[0] - (0 if place == "cpu" else max(stored)) <= whole_tokens


@pytest.mark.parametrize(
    ("mode", "gpu", "resolved"), [("approximate", 0, "off"), ("approximate", 1, "approximate"), ("auto", 0, "cpu")]
)
def test_approximate_caches_on_the_device_alone(
    mode: str, gpu: int, resolved: str, nano_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Room in main memory is no room for it."""
    free = {"cuda": gpu << 36, "cpu": 1 << 36}
    monkeypatch.setattr(kv_memory, "free_memory", lambda device: free[device.type])
    patcher = SimpleNamespace(model=nano_model.model, load_device=torch.device("cuda"))
    options, counts = {kv_cache.KV_CACHE: mode}, [({}, {SEPARATE: 1000})]
    assert kv_memory.resolved_mode(patcher, options, counts) == resolved
    assert ("they are computed again in every step" in caplog.text) == (resolved == "off")
    assert "condition_cache cpu" not in caplog.text


def test_odd_references_are_counted_in_whole_tokens() -> None:
    cond = {"cross_attn": torch.zeros(1, 7, 8), "reference_latents": [torch.zeros(1, 16, 1, 5, 7)]}
    assert kv_memory.cached_tokens(cond, "prefix_causal", "auto", 1) == {SHARED: 3 * 4, SEPARATE: 7}


def test_newer_arguments_of_the_estimate_are_handed_on(nano_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, seen = comfy.model_base.QwenImage.memory_required, []

    def newer(self: Any, input_shape: Any, cond_shapes: Any, memory_efficient_attention: Any = None) -> float:
        seen.append(memory_efficient_attention)
        return stock(self, input_shape, cond_shapes)

    expected = nano_model.model.memory_required([1, 16, 1, 8, 8])
    monkeypatch.setattr(comfy.model_base.QwenImage, "memory_required", newer, raising=False)
    assert nano_model.model.memory_required([1, 16, 1, 8, 8], {}, memory_efficient_attention=True) == expected
    assert seen == [True]
