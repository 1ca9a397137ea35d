"""The release's schedules and guidance at every size: against its numbers, its scheduler and float64 formulas.

Sizes: all widths and heights from 256 to 2048 pixels in steps of 16, both ways round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.paths import ROOT
from unipic_core.conditioning.sequence import LatentShape
from unipic_core.run.plan import Settings, resolve
from unipic_core.sampling.guidance import apply_guidance
from unipic_core.sampling.schedules import Shift, resolution_shift
from unipic_core.weights.recipe import RELEASED_BASE, RELEASED_FEW_STEP, Recipe

GOLDEN = ROOT / "tests" / "golden"
SIDES = range(256, 2048 + 1, 16)
SIZES = [(width, height) for width in SIDES for height in SIDES]
TOKENS = sorted({(width // 16) * (height // 16) for width, height in SIZES})
STEPS = range(1, 51)
USUAL_STEPS = (1, 2, 4, 8, 50)
EXACT = 1e-12


def released_k(tokens: int) -> float:
    """exp(mu); mu is a line through 0.5 at 256 tokens and 0.9 at 8192 (the released scheduler_config.json)."""
    slope = (0.9 - 0.5) / (8192 - 256)
    return math.exp(slope * tokens + (0.5 - slope * 256))


def shifted(t: np.ndarray, k: np.ndarray) -> np.ndarray:
    """exp(mu) / (exp(mu) + 1 / t - 1), as diffusers writes it; 0 stays 0."""
    with np.errstate(divide="ignore"):
        return np.where(t == 0, 0.0, k / (k + (1 / t - 1)))


def released_few_step(steps: int, k: np.ndarray) -> np.ndarray:
    """[sizes, steps + 1]: equal steps from 1 to 0, shifted."""
    return shifted(np.array([1 - i / steps for i in range(steps + 1)])[None], k[:, None])


def released_base(steps: int, k: np.ndarray) -> np.ndarray:
    """[sizes, steps + 1]: 1, ..., 1/steps, shifted, stretched so that the last is 0.02, then 0."""
    if steps == 1:
        return np.tile([1.0, 0.0], (len(k), 1))
    times = shifted(np.array([1 - i / steps for i in range(steps)])[None], k[:, None])
    left = 1 - times
    stretched = 1 - left * (0.98 / left[:, -1:])
    return np.concatenate([stretched, np.zeros((len(k), 1))], axis=1)


FORMULAS = {"few_step": released_few_step, "base": released_base}


def settings(schedule: str, steps: int) -> Settings:
    recipe = RELEASED_FEW_STEP if schedule == "few_step" else RELEASED_BASE
    resolved = resolve(recipe, steps)
    assert resolved.schedule == schedule
    return resolved


def test_tokens_of_every_size_both_ways_round() -> None:
    assert len(SIZES) == 113**2
    for width, height in SIZES:
        tokens = LatentShape.of_pixels(width, height).num_tokens
        assert tokens == LatentShape.of_pixels(height, width).num_tokens == width * height // 256


def test_the_shift_of_every_size() -> None:
    ours = np.array([resolution_shift(tokens) for tokens in TOKENS])
    np.testing.assert_allclose(ours, [released_k(tokens) for tokens in TOKENS], rtol=EXACT, atol=0)
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(8192) == pytest.approx(math.exp(0.9))


@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_times_of_every_size_and_of_every_number_of_steps(schedule: str) -> None:
    """Every size with the usual numbers of steps, and every number of steps with sizes from the smallest to the largest
    (the size enters through the shift alone)."""
    for steps in STEPS:
        sizes = TOKENS if steps in USUAL_STEPS else TOKENS[::100] + TOKENS[-1:]
        run, shift = settings(schedule, steps), Shift()
        ours = torch.stack([run.times(tokens, shift) for tokens in sizes]).numpy()
        expected = FORMULAS[schedule](steps, np.array([released_k(tokens) for tokens in sizes]))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_the_base_times_are_those_of_the_released_scheduler(steps: int) -> None:
    """Sigmas of diffusers' class with the released config, float32, at sizes from the smallest to the largest.

    For one step its stretch divides 0 by 0; the release never runs it, and ours is [1, 0].
    """
    diffusers = pytest.importorskip("diffusers")
    config = json.loads((GOLDEN / "tiny" / "scheduler" / "scheduler_config.json").read_text())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    for tokens in TOKENS[::50] + TOKENS[-1:]:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(released_k(tokens)))
        got = scheduler.sigmas.double()
        torch.testing.assert_close(settings("base", steps).times(tokens, Shift()), got, rtol=0, atol=2e-6)


def golden_schedules() -> Iterator[tuple[str, int, int, list[float]]]:
    for entry in json.loads((GOLDEN / "schedules.json").read_text()):
        for schedule in FORMULAS:
            if entry[schedule] is not None:
                yield schedule, entry["steps"], entry["image_tokens"], entry[schedule]


@pytest.mark.parametrize(("schedule", "steps", "tokens", "times"), list(golden_schedules()))
def test_the_formulas_give_the_releases_numbers(schedule: str, steps: int, tokens: int, times: list[float]) -> None:
    formula = FORMULAS[schedule](steps, np.array([released_k(tokens)]))[0]
    np.testing.assert_allclose(formula, times, rtol=0, atol=1e-6)
    np.testing.assert_allclose(settings(schedule, steps).times(tokens, Shift()).numpy(), times, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", sorted((GOLDEN / "cases").iterdir()), ids=lambda p: p.name)
def test_the_times_of_the_released_runs(folder: Path) -> None:
    """Those that the release visited with tiny weights, guided and not, at sizes below and above the references'."""
    case = json.loads((folder / "case.json").read_text())
    tokens = LatentShape.of_pixels(case["width"], case["height"]).num_tokens
    schedule = "base" if case["sampler"] == "euler" else "few_step"
    times = load_file(folder / "tensors.safetensors")["times"].double().numpy()
    formula = FORMULAS[schedule](case["steps"], np.array([released_k(tokens)]))[0]
    np.testing.assert_allclose(formula, times, rtol=0, atol=1e-6)


def test_defaults_are_the_releases() -> None:
    """Base: 50 steps, guidance 4, Euler. Few steps: 8, no guidance (distilled in), re-noising."""
    base, few = resolve(Recipe()), resolve(RELEASED_FEW_STEP)
    assert (base.steps, base.guidance, base.sampler, base.schedule) == (50, 4.0, "euler", "base")
    assert (few.steps, few.guidance, few.sampler, few.schedule) == (8, 1.0, "consistency", "few_step")


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.75, 4.0, 6.0])
@pytest.mark.parametrize("tokens", [256, 4096, 16384])
def test_guidance_in_float64(guidance: float, tokens: int) -> None:
    """v = u + s (c - u), then each packed token rescaled to the norm of c."""
    c, u = torch.randn(2, 1, tokens, 64, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64).numpy()
    v = u + guidance * (c - u)
    expected = v * np.linalg.norm(c, axis=-1, keepdims=True) / np.linalg.norm(v, axis=-1, keepdims=True)
    ours = apply_guidance(torch.from_numpy(c).float(), torch.from_numpy(u).float(), guidance)
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=0, atol=1e-4)
    if guidance == 1:
        np.testing.assert_allclose(expected, c, rtol=0, atol=EXACT)
