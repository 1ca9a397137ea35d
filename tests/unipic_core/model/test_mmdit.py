"""The network against diffusers' class on random sizes, and mixed batches against their samples alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model import mmdit
from unipic_core.model.attention import BACKENDS
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.rope import joint_positions

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "in_channels": 8,
    "out_channels": 2,
    "axes_dims_rope": (4, 6, 6),
}

side = st.integers(1, 6)
shape = st.builds(LatentShape, st.just(1), side, side)


@lru_cache
def pair(**options: bool) -> tuple[MMDiT, Any]:
    """Ours and diffusers' network with the same random weights."""
    from diffusers import QwenImageTransformer2DModel

    generator = torch.Generator().manual_seed(0)
    theirs = QwenImageTransformer2DModel(**SMALL, **options).eval().requires_grad_(False)
    for p in theirs.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1) * 0.5)
    ours = MMDiT(MMDiTConfig(**SMALL, **options)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def random_tokens(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(shape, min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    option=st.sampled_from(["", "zero_cond_t", "use_layer3d_rope", "use_additional_t_cond"]),
    t=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**31),
)
def test_like_diffusers(shapes: list[LatentShape], lengths: list[int], option: str, t: float, seed: int) -> None:
    ours, theirs = pair(**{option: True} if option else {})
    generator = torch.Generator().manual_seed(seed)
    batch, words = len(lengths), max(lengths)
    tokens = random_tokens(generator, batch, sum(s.num_tokens for s in shapes), 8)
    mask = torch.arange(words) < torch.tensor(lengths)[:, None]
    text = TextCond(random_tokens(generator, batch, words, 12), None if bool(mask.all()) else mask)
    additional = torch.arange(batch) % 2 if option == "use_additional_t_cond" else None
    packed = PackedLatents(tokens, (tuple(shapes),) * batch, shapes[0].num_tokens)
    want = theirs(
        hidden_states=tokens,
        encoder_hidden_states=text.embeds,
        encoder_hidden_states_mask=text.mask,
        timestep=torch.full((batch,), t),
        img_shapes=[[(s.frames, s.height, s.width) for s in shapes]] * batch,
        additional_t_cond=additional,
    ).sample[:, : shapes[0].num_tokens]
    got = ours(packed, t, text, additional)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    references=st.lists(st.lists(shape, max_size=3), min_size=2, max_size=3),
    lengths=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    zero_cond_t=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mixed_batch_gives_what_each_sample_gives_alone(
    references: list[list[LatentShape]], lengths: list[int], zero_cond_t: bool, seed: int
) -> None:
    ours, _ = pair(zero_cond_t=True) if zero_cond_t else pair()
    generator = torch.Generator().manual_seed(seed)
    targets = [LatentShape(1, 3, 4), LatentShape(1, 2, 6), LatentShape(1, 4, 3)]
    rows, shapes, texts = [], [], []
    for target, refs, length in zip(targets, references, lengths, strict=False):
        pictures = (target, *refs)
        rows.append(random_tokens(generator, sum(s.num_tokens for s in pictures), 8))
        shapes.append(pictures)
        texts.append(TextCond(random_tokens(generator, 1, length, 12)))
    t = torch.rand(len(rows), generator=generator)
    together = PackedLatents(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), tuple(shapes), 12)
    mixed = ours(together, t, TextCond.stack(texts))
    for i, row in enumerate(rows):
        alone = ours(PackedLatents(row[None], (shapes[i],), 12), t[i : i + 1], texts[i])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def sample(batch: int = 2) -> tuple[PackedLatents, TextCond]:
    generator = torch.Generator().manual_seed(3)
    shapes = (LatentShape(1, 3, 4), LatentShape(1, 2, 5))
    text = TextCond(random_tokens(generator, batch, 5, 12), torch.arange(5) < torch.tensor([[5], [3]]))
    return PackedLatents(random_tokens(generator, batch, 22, 8), (shapes,) * batch, 12), text


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(zero_cond_t: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, text = sample()
    calls, real = [], mmdit.checkpoint
    monkeypatch.setattr(mmdit, "checkpoint", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    gradients = []
    for checkpointing in (False, True):
        model = MMDiT(MMDiTConfig(**SMALL, zero_cond_t=zero_cond_t))
        model.load_state_dict(pair()[0].state_dict())
        model.gradient_checkpointing = checkpointing
        model(packed, torch.tensor([0.2, 0.9]), text).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert len(calls) == SMALL["num_layers"]
    used = [n for n, g in gradients[0].items() if g is not None]
    assert len(used) > 50
    for name in used:
        torch.testing.assert_close(gradients[1][name], gradients[0][name])


class Fp8Linear(nn.Linear):
    """A host's layer: the weight is stored in fp8 and cast where it is used."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def test_layers_come_from_operations_and_activations_keep_their_type() -> None:
    class Operations:
        Linear, LayerNorm, RMSNorm, Embedding = Fp8Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding

    packed, text = sample()
    stored = MMDiT(MMDiTConfig(**SMALL), operations=Operations, compute_dtype=torch.float32)
    made = [n for n, m in stored.named_modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(stored.get_submodule(n), Fp8Linear) for n in made)
    plain = MMDiT(MMDiTConfig(**SMALL))
    plain.load_state_dict({n: w.float() for n, w in stored.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(stored(packed, 0.5, text), plain(packed, 0.5, text))
    assert stored.dtype == torch.float32


def test_positions_kept_in_inference_mode_serve_training() -> None:
    packed, text = sample()
    joint_positions.cache_clear()
    model = MMDiT(MMDiTConfig(**SMALL))
    with torch.inference_mode():
        model(packed, 0.5, text)
    model(packed, 0.5, text).sum().backward()
    assert model.img_in.weight.grad is not None


def test_all_options_together_in_a_batch() -> None:
    """Each sample of a batch gives what it gives alone, with every option of diffusers' class on at once."""
    options = {"zero_cond_t": True, "use_layer3d_rope": True, "use_additional_t_cond": True}
    model = MMDiT(MMDiTConfig(**SMALL, **options)).eval()
    packed, text = sample()
    t, kind = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    with torch.no_grad():
        whole = model(packed, t, text, kind)
        for i in range(2):
            one = PackedLatents(packed.tokens[i : i + 1], packed.shapes[i : i + 1], packed.num_target_tokens)
            words = TextCond(text.embeds[i : i + 1], None if text.mask is None else text.mask[i : i + 1])
            alone = model(one, t[i], words, kind[i : i + 1])
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_null_out_channels_means_as_many_as_come_in() -> None:
    assert MMDiTConfig.from_dict({**SMALL, "out_channels": None}).out_channels == SMALL["in_channels"]


def test_attention_is_replaceable() -> None:
    packed, text = sample()
    model = MMDiT(MMDiTConfig(**SMALL))
    model.load_state_dict(pair()[0].state_dict())
    with torch.no_grad():
        results = []
        for attention in BACKENDS.values():
            model.attention = attention
            results.append(model(packed, 0.5, text))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_references_and_prompt_change_the_velocity() -> None:
    model, _ = pair()
    packed, text = sample()
    base = model(packed, 0.5, text)
    other = PackedLatents(torch.cat([packed.target, packed.tokens[:, 12:] + 1], 1), packed.shapes, 12)
    assert (model(other, 0.5, text) - base).abs().max() > 1e-3
    assert (model(packed, 0.5, TextCond(text.embeds + torch.randn(12), text.mask)) - base).abs().max() > 1e-3
    padding = torch.where(text.mask[..., None], text.embeds, 100.0)  # what padding holds does not matter
    torch.testing.assert_close(model(packed, 0.5, TextCond(padding, text.mask)), base, rtol=1e-4, atol=1e-5)


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="another architecture"):
        MMDiTConfig.from_dict({"guidance_embeds": True})
    with pytest.raises(ValueError, match=r"unknown keys.*depth"):
        MMDiTConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="add up"):
        MMDiTConfig(axes_dims_rope=(8, 8, 8))
    config = MMDiTConfig(**SMALL)
    assert MMDiTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="additional_t_cond"):
        pair(use_additional_t_cond=True)[0](*_in_order(sample()))
    with pytest.raises(ValueError, match="2 text conditions, got 1"):
        pair()[0](sample()[0], 0.5, TextCond(torch.zeros(1, 2, 12)))


def _in_order(packed_and_text: tuple[PackedLatents, TextCond]) -> tuple[PackedLatents, float, TextCond]:
    return packed_and_text[0], 0.5, packed_and_text[1]
