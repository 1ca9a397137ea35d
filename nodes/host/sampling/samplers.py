"""The core's samplers as ComfyUI's SAMPLER.

ComfyUI's model predicts x0 of latents [B, C, 1, H, W] at sigma; for flow models sigma is t in [0, 1].

Seeds. A run starts from ComfyUI's `prepare_noise`: one generator for the whole batch, so picture i of a batch is
repeated alone by `batch_index` i, not by another seed. The noise added to picture i after step k is draw k of ComfyUI's
default noise sampler for one picture, seeded with seed + i * PICTURE_STRIDE: it depends on (seed, step, picture) alone.
For one picture the stock `lcm` sampler draws the same; for more, `lcm` draws the whole batch at once. Like every
ComfyUI sampler this one draws on the latent's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ....unipic_core.errors import UniPicError
from ....unipic_core.sampling import samplers
from ....unipic_core.sampling.flow import x0_to_velocity
from ....unipic_core.sampling.samplers import NoiseSource, NonFiniteLatent

PICTURE_STRIDE = 1_000_003
"""Difference of the re-noising seeds of neighbours in a batch; large, so that the next seed does not repeat them."""

Callback = Callable[[dict[str, Any]], None]
"""ComfyUI's callback after each step, with x, i, sigma, sigma_hat and denoised."""

ADVICE = (
    "load the model as bf16 (never fp16), start ComfyUI without --use-sage-attention, and check that the weights were "
    "downloaded completely"
)


def ksampler(name: str, **options: object) -> comfy.samplers.KSAMPLER:
    """ComfyUI's SAMPLER for one of the core's samplers ("consistency", "euler").

    options of "consistency": `step_noise`, noises [B, C, 1, H, W] in place of seeded ones, one for each step but the
    last; `pictures`, the index of each latent where it differs from its place in the batch. UniPicError for another
    name.
    """
    functions = {"consistency": sample_consistency, "euler": sample_euler}
    if name not in list(functions):
        raise UniPicError(f"the sampler must be one of {', '.join(functions)}, got {name!r}")
    return comfy.samplers.KSAMPLER(functions[name], options)


def sample_consistency(
    model: object,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    step_noise: Sequence[Tensor] | None = None,
    pictures: Sequence[int] | None = None,
) -> Tensor:
    """Sampler function for ComfyUI: predict x0, re-noise to the next sigma (`samplers.renoise`)."""
    seed = (extra_args or {}).get("seed") or 0
    noise = seeded_noise(x, seed, pictures) if step_noise is None else given_noise(x, step_noise)
    _check_falling(sigmas)
    with _run(model, sigmas, extra_args, callback, disable) as run:
        return samplers.renoise(run.predict, x, run.times, noise, run.report)


def sample_euler(
    model: object,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, object] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Sampler function for ComfyUI: Euler's method (`samplers.sample_euler`).

    Rising sigmas invert: from a picture to the noise that gives it.
    """
    with _run(model, sigmas, extra_args, callback, disable) as run:
        return samplers.sample_euler(run.velocity, x, run.times, run.report)


def seeded_noise(x: Tensor, seed: int, pictures: Sequence[int] | None = None) -> NoiseSource:
    """Noise like x [B, ...], seeded as described above. Call once per step, in order."""
    pictures = range(len(x)) if pictures is None else pictures
    seeds = [(seed + picture * PICTURE_STRIDE) % (2**64 - 1) for picture in pictures]  # ComfyUI adds 1 on the CPU
    draws = [comfy.k_diffusion.sampling.default_noise_sampler(x[:1], seed=s) for s in seeds]
    return lambda step: torch.cat([draw(None, None) for draw in draws])


def given_noise(x: Tensor, step_noise: Sequence[Tensor]) -> NoiseSource:
    """Noise from a list, each of x's shape. UniPicError for another shape or too few of them."""

    def noise(step: int) -> Tensor:
        if step >= len(step_noise) or step_noise[step].shape != x.shape:
            got = [list(n.shape) for n in step_noise]
            raise UniPicError(f"step_noise must hold noise of shape {list(x.shape)} for step {step + 1}, got {got}")
        return step_noise[step].to(x)

    return noise


@dataclass
class _Run:
    """One run of a sampler: calls ComfyUI's model, reports each step, stops when the user interrupts."""

    model: Any
    sigmas: Tensor
    extra_args: dict[str, Any]
    callback: Callback | None
    bar: Any
    x_t: Tensor | None = None

    @property
    def times(self) -> list[float]:
        return self.sigmas.tolist()

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """x0 [B, C, 1, H, W] from x_t and t."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.x_t = x_t
        return self.model(x_t, t * x_t.new_ones(len(x_t)), **self.extra_args)

    def velocity(self, x_t: Tensor, t: float) -> Tensor:
        return x0_to_velocity(x_t, self.predict(x_t, t), t)

    def report(self, step: int, t_next: float, x_t: Tensor, x0: Tensor) -> None:
        """Call ComfyUI's callback, which expects the latent at the start of the step."""
        self.bar.update()
        if self.callback is not None:
            sigma = self.sigmas[step]
            self.callback({"x": self.x_t, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})


@contextmanager
def _run(
    model: object, sigmas: Tensor, extra_args: dict[str, object] | None, callback: Callback | None, disable: bool | None
) -> Iterator[_Run]:
    """A run with a progress bar on the console. UniPicError for sigmas that are not a flow's, and for NaN."""
    in_range = (sigmas >= 0) & (sigmas <= 1)  # false for NaN; 0 is for the end alone
    if not bool(in_range.all() and (sigmas[:-1] > 0).all()):
        raise _wrong_sigmas(sigmas, "take them from UniPic Sigmas")
    if sigmas[-1] == 1:  # ComfyUI divides the result by 1 - the last sigma
        raise _wrong_sigmas(sigmas, "to invert a picture with euler, let them rise to 0.999")
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        try:
            yield _Run(model, sigmas, extra_args or {}, callback, bar)
        except NonFiniteLatent as error:
            raise NonFiniteLatent(error.step, ADVICE) from None


def _check_falling(sigmas: Tensor) -> None:
    """UniPicError for rising sigmas: re-noising goes to a smaller time only."""
    if bool((sigmas.diff() > 0).any()):
        raise _wrong_sigmas(sigmas, "take them from UniPic Sigmas, or choose euler, which can also run backwards")


def _wrong_sigmas(sigmas: Tensor, advice: str) -> UniPicError:
    got = ", ".join(f"{s:.4g}" for s in sigmas.tolist())
    return UniPicError(f"the sigmas must fall from at most 1 to 0, got {got}; {advice}")
