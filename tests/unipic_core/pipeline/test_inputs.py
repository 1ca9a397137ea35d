"""What callers bring to the pipeline: wrong use in one sentence, and everything that can be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unipic_core.small_runs import SMALL, picture
from unipic_core.errors import UniPicError
from unipic_core.pipeline import UniPicPipeline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [picture()] * 7}, "at most 6 pictures can be composed, got 7"),
        ({"images": ["a.png"]}, "images must be Pillow pictures, got str"),
        ({"images": None}, r"images must be Pillow pictures, got NoneType; .* pass \[\] for none"),
        ({"images": [picture(), None]}, "images must be Pillow pictures, got NoneType"),
        ({"images": Path("a.png")}, "images must be Pillow pictures, got PosixPath|WindowsPath"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8)}, "images must be Pillow pictures, got ndarray"),
        ({"prompt": ["a"]}, "prompt must be a text, got list"),
        ({"width": 50}, "multiples of 16, got 50x48; use 48x48"),
        ({"width": 4096, "height": 4096}, "over this model's 1024x1024 pixels; use 1024x1024"),
        ({"width": -64}, "output width must be positive whole pixels, got -64; try 1024x1024"),
        ({"width": float("nan")}, "output width must be positive whole pixels, got nan"),
        ({"width": "64", "height": None}, "output width must be positive whole pixels, got '64'"),
        ({"height": "48"}, "output height must be positive whole pixels, got '48'"),
        ({"num_inference_steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"num_inference_steps": "2"}, "steps must be a whole number, got '2'"),
        ({"num_inference_steps": np.float32("inf")}, "steps must be a whole number, got"),
        ({"true_cfg_scale": float("nan")}, "guidance scale must be a number"),
        ({"true_cfg_scale": np.float32("nan")}, "guidance scale must be a number"),
        ({"true_cfg_scale": True}, "guidance scale must be a number"),
        ({"sampler": "heun"}, "sampler must be one of consistency, euler, got 'heun'"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": float("nan")}, "seed must be a whole number, got nan"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"num_images": 0}, "number of images must be from 1"),
        ({"reference_budget": 8}, "reference budget must be from 32"),
        ({"output_type": "np"}, "output_type must be one of pil, pt, latent, got 'np'"),
        ({"latents": torch.zeros(1, 5, 16)}, r"packed start noise \[1, 12, 16\], got \[1, 5, 16\]"),
        (
            {"latents": np.zeros((1, 12, 16))},
            r"packed start noise \[1, 12, 16\], got ndarray",
        ),
        ({"step_noise": []}, r"must be 1 tensors of \[1, 12, 16\], got \[\]"),
        (
            {"step_noise": np.zeros((1, 1, 12, 16))},
            r"must be 1 tensors of \[1, 12, 16\], got \[ndarray\]",
        ),
    ],
)
def test_wrong_use(tiny: UniPicPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UniPicError, match=message) as caught:
        tiny(**{"images": [picture()], "prompt": "a", **SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, np.float64, float])
def test_whole_numbers_of_any_type(tiny: UniPicPipeline, kind: Any) -> None:
    names = ("width", "height", "num_inference_steps", "true_cfg_scale", "reference_budget")
    numbers = {**{name: SMALL[name] for name in names}, "seed": 200, "num_images": 1}
    plain = tiny([picture()], "a", **SMALL, seed=200)
    out = tiny([picture()], "a", **{**SMALL, **{name: kind(n) for name, n in numbers.items()}})
    assert torch.equal(out.images, plain.images)
    assert out.settings == plain.settings
    assert [type(n) for n in (*out.seeds, out.settings.steps, out.settings.guidance)] == [int, int, float]


def test_a_huge_seed(tiny: UniPicPipeline) -> None:
    assert tiny([picture()], "a", **SMALL, seed=10**400).seeds == [10**400]


def test_empty_and_long_prompts(tiny: UniPicPipeline) -> None:
    assert tiny([picture()], "", **SMALL).images.isfinite().all()
    with pytest.raises(UniPicError, match=r"too long.*at most 32768; shorten it"):
        tiny([picture()], "word " * 8000, **SMALL)


def test_given_latents_decide_how_many(tiny: UniPicPipeline) -> None:
    noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    out = tiny([picture()], "a", **SMALL, latents=noise)
    assert out.images.shape == (2, 12, 16)
    with pytest.raises(UniPicError, match="packed start noise"):
        tiny([picture()], "a", **SMALL, latents=noise, num_images=3)


def test_non_finite_latent_names_the_step(tiny: UniPicPipeline) -> None:
    with pytest.raises(ValueError, match="step 1; use bfloat16 or float32"):
        tiny([picture()], "a", **SMALL, latents=torch.full((1, 12, 16), float("nan")))
