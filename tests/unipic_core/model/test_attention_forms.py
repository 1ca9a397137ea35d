"""Causal attention forms: what they let see what, and that keys and values kept are those computed again."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipic_core.caching import TensorCache
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond, pack_with_references
from unipic_core.model.config import ATTENTION_FORMS, FULL, REFERENCES, TEXT, MMDiTConfig, fixed_pieces, kv_cache_bytes
from unipic_core.model.mmdit import MMDiT
from unipic_core.sampling.guidance import guided_velocity
from unipic_core.sampling.samplers import sample_consistency, sample_euler, seeded_noise
from unipic_core.weights.convert import WeightStream, write_file
from unipic_core.weights.lora import save_lora
from unipic_core.weights.merge import merge
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer, open_transformer

CAUSAL = ("reference_causal", "prefix_causal")
EXACT = 1e-5
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "in_channels": 8,
    "out_channels": 2,
    "axes_dims_rope": (4, 6, 6),
}
TARGET_SHAPE = LatentShape(1, 3, 4)


@lru_cache
def network(form: str, **options: bool) -> MMDiT:
    """The same random weights for every form."""
    generator = torch.Generator().manual_seed(0)
    made = MMDiT(MMDiTConfig(**SIZES, **options, attention_form=form)).eval().requires_grad_(False)
    for p in made.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1) * 0.3)
    return made


def condition(*sides: tuple[tuple[int, int], ...], words: int = 5, seed: int = 0) -> tuple[PackedLatents, TextCond]:
    """One sample for each tuple of reference sizes, all with random tokens."""
    g = torch.Generator().manual_seed(seed)
    references = [[torch.randn(2, 1, 2 * h, 2 * w, generator=g) for h, w in sample] for sample in sides]
    x_t = torch.randn(len(sides), TARGET_SHAPE.num_tokens, 8, generator=g)
    text = TextCond(torch.randn(len(sides), words, 12, generator=g))
    return pack_with_references(x_t, TARGET_SHAPE, references), text


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


side = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(CAUSAL),
    samples=st.lists(st.lists(side, max_size=3).map(tuple), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    t=st.floats(0, 1, width=32),
    seed=st.integers(0, 1000),
)
def test_cached_is_uncached_and_a_batch_is_its_samples(
    form: str, samples: list, lengths: list[int], t: float, seed: int
) -> None:
    latents, text = condition(*samples, seed=seed)
    mask = torch.arange(5) < torch.tensor(lengths[: len(samples)])[:, None]
    text = TextCond(text.embeds, mask)
    model = network(form)
    whole = model(latents, t, text)
    references = model.prefill(latents)
    for cache in (references, model.prefill(latents, text), model.prefill(latents, text, cache=references)):
        assert difference(model(latents, t, text, cache=cache), whole) < EXACT
    for i, n in enumerate(latents.lengths):
        alone = PackedLatents(latents.tokens[i : i + 1, :n], latents.shapes[i : i + 1], latents.num_target_tokens)
        words = TextCond(text.embeds[i : i + 1, mask[i]])
        assert difference(model(alone, t, words), whole[i : i + 1]) < 5 * EXACT


@pytest.mark.parametrize("form", CAUSAL)
def test_one_prefill_serves_every_step_seed_and_guidance(form: str) -> None:
    """Whole runs of both samplers, with guidance, in a batch that shares one sample's keys and values."""
    model = network(form)
    latents, text = condition(((2, 3), (4, 2)))
    uncond = TextCond(torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(9)))
    references = model.prefill(latents)
    caches = {id(c): model.prefill(latents, c, cache=references) for c in (text, uncond)}

    def run(sampler: Any, cached: bool, seed: int, batch: int) -> Tensor:
        noise = seeded_noise((batch, TARGET_SHAPE.num_tokens, 8), seed)
        tokens = latents.tokens.expand(batch, -1, -1)
        packed = PackedLatents(tokens, latents.shapes * batch, latents.num_target_tokens)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            def call(latents: PackedLatents, t: Any, c: TextCond) -> Tensor:
                return model(latents, t, c.expand(batch), cache=caches[id(c)] if cached else None)

            return guided_velocity(call, packed.with_target(x_t), t, text, uncond, 3.0)

        times = [1.0, 0.7, 0.4, 0.0]
        if sampler == "euler":
            return sample_euler(velocity, noise(-1), times)
        return sample_consistency(velocity, noise(-1), times, noise)

    for sampler in ("euler", "consistency"):
        for seed, batch in ((1, 1), (2, 1), (3, 2)):
            assert difference(run(sampler, True, seed, batch), run(sampler, False, seed, batch)) < EXACT


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_what_reaches_what(form: str) -> None:
    """Keys and values kept depend on nothing that a step changes; in the full form everything reaches everything."""
    model = network(form)
    latents, text = condition(((2, 3), (4, 2)))

    def watch(x_t: Tensor, words: TextCond, t: float) -> dict[str, Tensor]:
        kept = model.prefill(latents.with_target(x_t), words)
        return {piece: torch.cat([x.flatten() for kv in pairs for x in kv]) for piece, pairs in kept.items()}

    other_text = TextCond(text.embeds + 1)
    first = watch(latents.target, text, 0.3)
    assert set(first) == set(fixed_pieces(form))
    for x_t, words in ((latents.target + 1, text), (latents.target, other_text)):
        for piece, values in watch(x_t, words, 0.9).items():
            changed = difference(values, first[piece]) > 0
            assert changed == (piece == TEXT and words is other_text), piece
    v = model(latents, 0.5, text)
    for moved in (replace_reference(latents, 0), replace_reference(latents, 1)):
        assert difference(model(moved, 0.5, text), v) > 1e-3
    assert difference(model(latents, 0.5, other_text), v) > 1e-3


def replace_reference(latents: PackedLatents, index: int) -> PackedLatents:
    """The same sequence with one reference's tokens changed."""
    start = sum(s.num_tokens for s in latents.shapes[0][: index + 1])
    tokens = latents.tokens.clone()
    tokens[:, start : start + latents.shapes[0][index + 1].num_tokens] += 1
    return replace(latents, tokens=tokens)


def test_the_forms_differ() -> None:
    latents, text = condition(((2, 3), (4, 2)))
    full, reference, prefix = (network(form)(latents, 0.5, text) for form in ATTENTION_FORMS)
    assert difference(full, reference) > 1e-3 < difference(reference, prefix)


def test_without_references_only_the_text_can_be_fixed() -> None:
    latents, text = condition(())
    full, reference, prefix = (network(form)(latents, 0.5, text) for form in ATTENTION_FORMS)
    assert torch.equal(full, reference)
    assert difference(full, prefix) > 1e-3
    assert network("reference_causal").prefill(latents, text) == {}
    assert set(network("prefix_causal").prefill(latents, text)) == {TEXT}


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("option", ["zero_cond_t", "use_layer3d_rope", "use_additional_t_cond"])
def test_options_of_other_releases(form: str, option: str) -> None:
    model = network(form, **{option: True})
    latents, text = condition(((2, 3), (4, 2)), ((2, 3), (4, 2)))
    more = torch.tensor([0, 1]) if option == "use_additional_t_cond" else None
    cache = model.prefill(latents, text, more)
    assert difference(model(latents, 0.4, text, more, cache), model(latents, 0.4, text, more)) < EXACT


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_fixed_tokens(form: str, checkpointing: bool) -> None:
    """Training sees the whole network: finite differences agree, and checkpointing changes nothing."""
    model = MMDiT(MMDiTConfig(**SIZES, attention_form=form)).double()
    model.load_state_dict(network(form).state_dict())
    model.gradient_checkpointing = checkpointing
    latents, text = condition(((2, 2),), ((1, 2), (2, 1)))
    latents, text = replace(latents, tokens=latents.tokens.double()), TextCond(text.embeds.double())

    def loss() -> Tensor:
        return model(latents, 0.5, text).square().mean()

    loss().backward()
    for name in ("transformer_blocks.0.attn.to_v.weight", "transformer_blocks.1.txt_mlp.net.2.weight", "img_in.weight"):
        p = model.get_parameter(name)
        assert p.grad is not None
        at = int(p.grad.abs().argmax())
        with torch.no_grad():
            p.view(-1)[at] += 1e-5
            up = loss()
            p.view(-1)[at] -= 2e-5
            slope = (up - loss()) / 2e-5
            p.view(-1)[at] += 1e-5
        assert float(slope) == pytest.approx(float(p.grad.view(-1)[at]), rel=1e-3), name  # positions are float32


def test_memory_of_what_is_kept() -> None:
    latents, text = condition(((2, 3), (4, 2)))
    kept = network("prefix_causal").prefill(latents, text)
    for piece, tokens in ((REFERENCES, 14), (TEXT, 5)):
        size = sum(x.nbytes for pair in kept[piece] for x in pair)
        assert size == kv_cache_bytes(tokens, SIZES["num_layers"], 32, 4)


# --- the form travels ---


def written(file: Path, config: MMDiTConfig, recipe: Recipe) -> Path:
    state = network(FULL).state_dict()
    write_file(file, WeightStream(config, recipe, lambda names: ((n, state[n]) for n in names)), "fp32")
    return file


def test_the_form_travels_in_config_recipe_and_lora(tmp_path: Path) -> None:
    full, prefix = network(FULL).config, network("prefix_causal").config
    by_config = written(tmp_path / "config.safetensors", prefix, Recipe())
    by_recipe = written(tmp_path / "recipe.safetensors", full, Recipe(attention_form="prefix_causal"))
    latents, text = condition(((2, 3),))
    want = network("prefix_causal")(latents, 0.5, text)
    for file in (by_config, by_recipe):
        assert open_transformer(file).config == prefix
        assert difference(load_transformer(file)(latents, 0.5, text), want) == 0

    base = written(tmp_path / "base.safetensors", full, Recipe(steps=50))
    nothing = {"transformer_blocks.0.attn.to_q": (torch.ones(1, 32), torch.zeros(32, 1))}
    save_lora(tmp_path / "lora.safetensors", nothing, recipe=Recipe(steps=8, attention_form="prefix_causal"))
    merge(base, tmp_path / "merged.safetensors", [(tmp_path / "lora.safetensors", 1.0)], dtype="fp32")
    assert open_transformer(tmp_path / "merged.safetensors").config == prefix
    recipe = Recipe.read(tmp_path / "merged.safetensors")
    assert recipe is not None
    assert (recipe.steps, recipe.causal_attention_form) == (8, "prefix_causal")


def test_forms_in_configs() -> None:
    assert "attention_form" not in network(FULL).config.to_dict()  # diffusers' own key set
    assert MMDiTConfig.from_dict(network("prefix_causal").config.to_dict()).attention_form == "prefix_causal"
    with pytest.raises(ValueError, match="attention_form must be one of full, reference_causal, prefix_causal"):
        MMDiTConfig(**SIZES, attention_form="some")


def test_tensor_cache_by_content() -> None:
    cache: TensorCache[int] = TensorCache(2)
    made = iter(range(10))
    a, b = torch.zeros(3), torch.ones(3)
    assert cache.get("k", [a], lambda: next(made)) == 0
    assert cache.get("k", [a.clone()], lambda: next(made)) == 0
    assert cache.get("other", [a], lambda: next(made)) == 1
    a += 1  # what is kept is a copy: the entry still stands for zeros
    assert cache.get("k", [torch.zeros(3)], lambda: next(made)) == 0
    assert cache.get("k", [b], lambda: next(made)) == 2
    assert len(cache) == 2
    assert cache.get("other", [torch.zeros(3)], lambda: next(made)) == 3
    assert cache.get("k", [b.double()], lambda: next(made)) == 4
