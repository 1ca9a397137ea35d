"""Strengths and regions of references as an attention bias: exact in one block, the same from the cache."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from tests.unipic_core.model.test_attention_forms import SIZES, condition
from tests.unipic_core.small_runs import SMALL, picture
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.influence import Influence, Region
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.attention import BACKENDS, Checked
from unipic_core.model.config import ATTENTION_FORMS, FULL, MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.reference_bias import reference_bias
from unipic_core.pipeline import UniPicPipeline
from unipic_core.sampling.schedules import percent_time

ALWAYS = (1.0, 0.0)
SHAPE = LatentShape(1, 3, 4)
"""Of the target of `condition`."""

LEFT = Region(0, 0, 500, 1000)
TWO = (((2, 3), (3, 2)),)
"""Two references of 2x3 and 3x2 tokens."""


@lru_cache
def network(form: str, layers: int = 2) -> MMDiT:
    generator = torch.Generator().manual_seed(0)
    made = MMDiT(MMDiTConfig(**{**SIZES, "num_layers": layers}, attention_form=form)).eval().requires_grad_(False)
    for p in made.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1) * 0.3)
    return made


def bias_of(*influences: Influence) -> Tensor:
    bias = reference_bias(influences, [ALWAYS] * len(influences), SHAPE, 0.5)
    assert bias is not None
    return bias


def changed(latents: PackedLatents, reference: int) -> PackedLatents:
    """Other values for one reference, counted from 0."""
    start = latents.num_target_tokens + sum(s.num_tokens for s in latents.shapes[0][1 : reference + 1])
    tokens = latents.tokens.clone()
    tokens[:, start : start + latents.shapes[0][reference + 1].num_tokens] *= -3
    return replace(latents, tokens=tokens)


def test_log_strengths_of_each_token() -> None:
    bias = bias_of(Influence(2.0), Influence(0.5, LEFT), Influence()).reshape(3, 4, 3)
    torch.testing.assert_close(bias[..., 0], torch.full((3, 4), math.log(2)))
    torch.testing.assert_close(bias[:, :2, 1], torch.full((3, 2), math.log(0.5)))
    assert bool((bias[:, 2:, 1] == -math.inf).all())
    assert not bias[..., 2].any()


def test_a_token_that_a_region_half_covers_counts_half() -> None:
    bias = bias_of(Influence(region=Region(0, 0, 375, 1000))).reshape(3, 4)
    torch.testing.assert_close(bias[0].exp(), torch.tensor([1, 0.5, 0, 0]))
    small = bias_of(Influence(region=Region(10, 10, 20, 20))).reshape(3, 4)
    assert float(small[0, 0]) == 0, "the token of a small box counts whole"


def test_nothing_to_change_is_no_mask() -> None:
    whole = Influence(region=Region(0, 0, 1000, 1000))
    assert reference_bias([Influence(), whole], [ALWAYS] * 2, SHAPE, 0.3) is None
    assert reference_bias([], [], SHAPE, 0.3) is None
    timed = [(0.8, 0.4)]
    assert reference_bias([Influence(0.0)], timed, SHAPE, 0.81) is None
    assert reference_bias([Influence(0.0)], timed, SHAPE, 0.39) is None
    assert all(reference_bias([Influence(0.0)], timed, SHAPE, t) is not None for t in (0.8, 0.6, 0.4))


def test_times_of_a_share_of_the_run_are_comfyuis() -> None:
    """`ModelSamplingFlux.percent_to_sigma`, written out."""
    mu = 0.7
    for percent in (0.0, 0.25, 0.5, 1.0):
        t = 1 - percent
        sigma = math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t else 0.0
        assert percent_time(percent, math.exp(mu)) == pytest.approx(sigma)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@torch.no_grad()
def test_without_strength_a_reference_has_no_effect_on_the_targets_attention(form: str) -> None:
    """In one block: in later ones the text has seen the reference."""
    latents, text = condition(*TWO)
    model = network(form, 1)
    off = bias_of(Influence(), Influence(0.0))

    def velocity(x: PackedLatents, bias: Tensor | None) -> Tensor:
        return model(x, 0.5, text, reference_bias=bias)

    assert torch.equal(velocity(latents, off), velocity(changed(latents, 1), off))
    assert not torch.allclose(velocity(latents, None), velocity(changed(latents, 1), None))
    assert not torch.allclose(velocity(latents, off), velocity(changed(latents, 0), off))


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@torch.no_grad()
def test_outside_its_region_a_reference_has_no_effect(form: str) -> None:
    latents, text = condition(*TWO)
    bias = bias_of(Influence(region=LEFT), Influence())
    one, other = (network(form, 1)(x, 0.5, text, reference_bias=bias) for x in (latents, changed(latents, 0)))
    differs = (one != other).any(-1).reshape(3, 4)
    assert bool(differs[:, :2].all())
    assert not differs[:, 2:].any()


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@torch.no_grad()
def test_a_strength_of_two_counts_a_reference_twice(form: str) -> None:
    """As if its keys and values stood there twice: a reference beside its copy, at the same positions."""
    latents, text = condition(((2, 3),))
    model = network(form, 1)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append((q, k, v, mask))
        return BACKENDS["matmul"](q, k, v, mask)

    model.attention, plain = attention, model.attention
    try:
        model(latents, 0.5, text, reference_bias=bias_of(Influence(2.0)))
    finally:
        model.attention = plain
    q, k, v, mask = calls[-1]
    first = 0 if form != FULL else k.shape[2] - 6  # of the reference's keys
    twice = [torch.cat([x, x[:, :, first : first + 6]], 2) for x in (k, v)]
    assert q.shape[2] == SHAPE.num_tokens, "the last block has the target's queries alone"
    for backend in ("matmul", "sdpa"):
        expected = BACKENDS["matmul"](q, twice[0], twice[1], None)
        torch.testing.assert_close(BACKENDS[backend](q, k, v, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["reference_causal", "prefix_causal"])
@torch.no_grad()
def test_kept_keys_and_values_serve_every_strength(form: str) -> None:
    latents, text = condition(*TWO)
    cache = network(form).prefill(latents, text)
    for bias in (None, bias_of(Influence(0.5), Influence(region=LEFT)), bias_of(Influence(0.0), Influence(3.0))):
        cached = network(form)(latents, 0.5, text, cache=cache, reference_bias=bias)
        whole = network(form)(latents, 0.5, text, reference_bias=bias)
        torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@torch.no_grad()
def test_padded_text_stays_padded(form: str) -> None:
    latents, text = condition(TWO[0], TWO[0])
    bias = bias_of(Influence(0.5), Influence(region=LEFT))
    padded = TextCond(text.embeds, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    both = network(form)(latents, 0.5, padded, reference_bias=bias)
    for i, words in enumerate((5, 3)):
        alone = network(form)(latents.row(i), 0.5, TextCond(text.embeds[i : i + 1, :words]), reference_bias=bias)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=5e-5)


def test_samples_of_different_shapes_are_refused() -> None:
    latents, text = condition(((2, 3),), ((3, 3),))
    with pytest.raises(ValueError, match="samples with the same shapes"):
        network(FULL)(latents, 0.5, text, reference_bias=bias_of(Influence(0.5)))


def test_other_packages_kernels_leave_a_bias_to_pytorch() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.bfloat16).unbind(0)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    mask[..., 2:] = -math.inf
    kernel = Checked(lambda q, k, v: torch.zeros_like(q), "absent", differentiable=True)
    with pytest.warns(UserWarning, match="does not support masks"):
        assert torch.equal(kernel(q, k, v, mask), BACKENDS["sdpa"](q, k, v, mask))


@pytest.fixture(scope="module")
def nano() -> UniPicPipeline:
    return UniPicPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.float32, device="cpu")


def test_in_the_pipeline(nano: UniPicPipeline) -> None:
    images = [picture(0), picture(1)]
    plain = nano(images, "a cup", **SMALL).images
    whole = Influence(region=Region(0, 0, 1000, 1000), start=0.2)
    assert torch.equal(nano(images, "a cup", influences=[Influence(), whole], **SMALL).images, plain)
    never = [Influence(0.0, start=0.3, end=0.3)] * 2
    assert torch.equal(nano(images, "a cup", influences=never, **SMALL).images, plain)
    weaker = nano(images, "a cup", influences=[Influence(), Influence(0.2)], **SMALL).images
    assert not torch.allclose(weaker, plain)
    later = nano(images, "a cup", influences=[Influence(), Influence(0.2, start=0.5)], **SMALL).images
    assert not torch.allclose(later, plain)
    assert not torch.allclose(later, weaker)
