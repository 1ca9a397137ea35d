"""Stock nodes for areas, masks and references on latents with a frame axis; what does not belong is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_edit_model import ReferenceLatent
from torch import Tensor
from unipic_pack.nodes import sample
from unipic_pack.nodes.host.sampling.conditionings import adapt_conditionings
from unipic_pack.unipic_core.errors import UniPicError

import nodes as stock

torch.set_num_threads(1)

CHANNELS, WIDTH = 16, 128
"""Of the bundled nano."""


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def latent(batch: int = 1) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, CHANNELS, 1, 16, 16)}


def text(seed: int = 1) -> list[Any]:
    return [[noise(1, 5, WIDTH, seed=seed), {}]]


@torch.inference_mode()
def ksampler(
    model: Any, positive: Any, held: dict[str, Tensor] | None = None, cfg: float = 1.0, steps: int = 1
) -> Tensor:
    """Two steps of the stock KSampler."""
    held = latent() if held is None else held
    return stock.common_ksampler(model, 3, steps, cfg, "euler", "simple", positive, text(2), held)[0]["samples"]


def test_an_area_by_percentage_is_that_area(nano_model: Any) -> None:
    """Conditioning (Set Area with Percentage) ends in an IndexError on stock Qwen."""
    base = text(1)
    [part] = stock.ConditioningSetAreaPercentage().append(text(4), 0.5, 1.0, 0.5, 0.0, 1.0)
    [pixels] = stock.ConditioningSetArea().append(text(4), 64, 128, 64, 0, 1.0)
    made = ksampler(nano_model, base + part)
    assert torch.equal(made, ksampler(nano_model, base + pixels))
    assert not torch.allclose(made[..., 12:], ksampler(nano_model, base)[..., 12:], atol=1e-3)


def test_mask_bounds_are_the_area_around_the_mask(nano_model: Any) -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    [bounded] = stock.ConditioningSetMask().append(text(4), mask, "mask bounds", 1.0)
    [area] = stock.ConditioningSetArea().append(text(4), 64, 128, 64, 0, 1.0)
    [both] = stock.ConditioningSetMask().append(area, mask, "default", 1.0)
    made = ksampler(nano_model, text(1) + bounded)
    torch.testing.assert_close(made, ksampler(nano_model, text(1) + both), rtol=0, atol=1e-5)
    [empty] = stock.ConditioningSetMask().append(text(4), torch.zeros(1, 128, 128), "mask bounds", 1.0)
    torch.testing.assert_close(ksampler(nano_model, text(1) + empty), ksampler(nano_model, text(1)), rtol=0, atol=1e-5)


def run_toy(batch: int, mask: Tensor | None, start: Tensor) -> Tensor:
    model = toy.model()
    adapt_conditionings(model)
    positive = toy.text(0.3)
    if mask is not None:
        [positive] = stock.ConditioningSetMask().append(positive, mask, "default", 1.0)
        positive = positive + toy.text(2.0)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    sampler = comfy.samplers.ksampler("euler")
    return comfy.sample.sample_custom(
        model, start, 1.0, sampler, sigmas, positive, toy.text(), torch.zeros_like(start), seed=7, disable_pbar=True
    )


def test_masks_of_a_batch_belong_to_its_pictures() -> None:
    masks, start = torch.zeros(2, 8, 12), toy.start(2)
    masks[0, :, :6], masks[1, :, 6:] = 1, 1
    together = run_toy(2, masks, start)
    for i in range(2):
        toy.close(together[i : i + 1], run_toy(1, masks[i : i + 1], start[i : i + 1]), 1e-6)
    with pytest.raises(UniPicError, match="a conditioning must have one mask, or one for each of 2 pictures, got 3"):
        run_toy(2, torch.ones(3, 8, 12), start)


def reference(positive: Any, held: Tensor) -> Any:
    return ReferenceLatent.execute(positive, {"samples": held})[0]


def test_a_batch_of_reference_latents_is_not_cut(nano_model: Any) -> None:
    """ComfyUI's cond would keep the first alone."""
    two = noise(2, CHANNELS, 1, 8, 8, seed=9)
    chained = reference(reference(text(), two[:1]), two[1:])
    made = ksampler(nano_model, reference(text(), two))
    assert torch.equal(made, ksampler(nano_model, chained))
    assert not torch.equal(made, ksampler(nano_model, reference(text(), two[:1])))
    assert torch.equal(
        ksampler(nano_model, reference(text(), two[:1, :, 0])), ksampler(nano_model, reference(text(), two[:1]))
    )


def test_a_reference_latent_for_each_picture(nano_model: Any) -> None:
    two, held = noise(2, CHANNELS, 1, 8, 8, seed=9), latent(2)
    made = ksampler(nano_model, reference(text(), two), held)
    for i in range(2):
        alone = ksampler(nano_model, reference(text(), two[i : i + 1]), held)
        torch.testing.assert_close(made[i], alone[i], rtol=0, atol=1e-4)
    with pytest.raises(UniPicError, match="a reference latent must hold one picture, or one for each of 2, got 3"):
        ksampler(nano_model, reference(text(), noise(3, CHANNELS, 1, 8, 8)), held)


def nan(*size: int) -> Tensor:
    return torch.full(size, torch.nan)


WRONG: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "text of another model": (lambda: ([[noise(1, 5, 2048), {}]], None), "text of width 128, .* got .1, 5, 2048"),
    "text with NaN": (lambda: ([[nan(1, 5, WIDTH), {}]], None), "the conditioning's text holds NaN"),
    "references of another model": (
        lambda: (reference(text(), noise(1, 4, 8, 8)), None),
        r"reference latents \[1, 16, 1, height, width\], got \[1, 4, 8, 8\]",
    ),
    "a video as reference": (lambda: (reference(text(), noise(1, CHANNELS, 3, 8, 8)), None), "encode pictures, not a"),
    "references with NaN": (
        lambda: (reference(text(), nan(1, CHANNELS, 1, 8, 8)), None),
        "a reference latent holds NaN",
    ),
    "a mask with NaN": (
        lambda: (stock.ConditioningSetMask().append(text(), nan(1, 8, 8), "default", 1.0)[0], None),
        "a conditioning's mask holds NaN",
    ),
    "a latent with NaN": (lambda: (text(), {"samples": nan(1, CHANNELS, 1, 8, 8)}), "the latent holds NaN"),
    "a latent's mask with NaN": (lambda: (text(), {**latent(), "noise_mask": nan(1, 8, 8)}), "latent's mask holds NaN"),
    "a latent of a video": (lambda: (text(), {"samples": noise(1, CHANNELS, 3, 8, 8)}), r"got \[1, 16, 3, 8, 8\]"),
    "a latent of another model": (lambda: (text(), {"samples": noise(1, 4, 8, 8)}), r"expects a latent \[batch, 16, 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_is_one_sentence_with_stock_ksampler(nano_model: Any, case: str) -> None:
    make, message = WRONG[case]
    positive, held = make()
    with pytest.raises(UniPicError, match=message):
        ksampler(nano_model, positive, held)


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_is_one_sentence_in_our_node(nano_model: Any, case: str) -> None:
    make, message = WRONG[case]
    positive, held = make()
    message = message.replace("latent's mask holds NaN", "latent's mask must hold numbers from 0 to 1, got NaN")
    with pytest.raises(UniPicError, match=message), torch.inference_mode():
        sample.FewStepSampler.execute(nano_model, positive, text(), held or latent(), 7, 1, 0.0, "auto", 1.0)


@pytest.mark.parametrize("turned", ["90 degrees", "270 degrees"])
def test_a_turned_latent_is_one_sentence(nano_model: Any, turned: str) -> None:
    """Rotate Latent takes the frame axis for a side."""
    [held] = stock.LatentRotate().rotate({"samples": noise(1, CHANNELS, 1, 8, 8)}, turned)
    with pytest.raises(UniPicError, match="rotate pictures before encoding, since Rotate Latent mistakes the frame"):
        sample.FewStepSampler.execute(nano_model, text(), text(), held, 7, 1, 0.0, "auto", 1.0)


def test_crop_and_flip_latent_work_on_other_axes_as_the_help_says() -> None:
    """No node after them can tell: the help of Few-Step Sampler says to crop and flip pictures instead."""
    held = noise(1, CHANNELS, 1, 32, 48)
    [cropped] = stock.LatentCrop().crop({"samples": held}, 64, 64, 64, 0)
    assert torch.equal(cropped["samples"], held[:, :, :, 8:16])  # rows by x, and all columns
    [flipped] = stock.LatentFlip().flip({"samples": held}, "x-axis: vertically")
    assert torch.equal(flipped["samples"], held)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": "a.safetensors"}, "model must be the MODEL of Load UniPic, got str; connect that node"),
        ({"positive": 5}, "positive must be a CONDITIONING, got int; connect that of Multi-Image Compose"),
        ({"negative": "words"}, "negative must be a CONDITIONING, got str"),
        ({"positive": [5]}, "positive must be a CONDITIONING, got list"),
        ({"latent": 5}, "latent must be a LATENT, got int; connect that of Multi-Image Compose"),
        ({"latent": {"waveform": torch.zeros(1)}}, "latent must be a LATENT, got dict"),
        ({"condition_cache": 5}, "condition_cache must be one of auto, gpu, cpu, off, approximate, got 5"),
        ({"sampler": 5}, "the sampler must be one of consistency, euler, got 5"),
    ],
)
def test_a_number_or_a_text_at_a_socket(nano_model: Any, inputs: dict[str, Any], message: str) -> None:
    """What the API lets through."""
    given = {"model": nano_model, "positive": text(), "negative": text(), "latent": latent(), "seed": 1, "steps": 1}
    given |= {"cfg": 0.0, "sampler": "auto", "denoise": 1.0}
    with pytest.raises(UniPicError, match=message):
        sample.FewStepSampler.execute(**{**given, **inputs})
