"""What a call of the pipeline is given, checked: pictures and noise; and what to lower when it was too much."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..conditioning.images import to_rgb
from ..errors import UniPicError
from ..run.plan import Plan
from ..sampling.samplers import NoiseSource, seeded_noise


def checked_images(images: Sequence[Image.Image] | Image.Image) -> list[Image.Image]:
    """The pictures as RGB. UniPicError for anything else; an empty list is allowed, with a warning."""
    given: Any = images
    try:
        given = [given] if isinstance(given, Image.Image) else list(given)
    except TypeError:  # nothing that holds others
        given = [given]
    if wrong := [type(i).__name__ for i in given if not isinstance(i, Image.Image)]:
        raise UniPicError(
            f"images must be Pillow pictures, got {wrong[0]}; open files with unipic_core.load_image, "
            "and pass [] to go without"
        )
    if not given:
        warnings.warn("no pictures given: the model was tuned to compose pictures, not to make them", stacklevel=4)
    return [to_rgb(image) for image in given]


def noise_of(
    planned: Plan,
    token: tuple[int, int],
    device: torch.device,
    latents: Tensor | None = None,
    step_noise: Sequence[Tensor] | None = None,
) -> tuple[Tensor, NoiseSource]:
    """Start noise [B, N_O, 4C] float32 on the device, and the source of the consistency sampler's noises.

    token: (N_O, 4C). latents, step_noise: given ones in place of those of the seed; UniPicError if they do not fit.
    """
    count = planned.num_images
    if latents is not None:
        fits = isinstance(latents, Tensor) and latents.ndim == 3 and tuple(latents.shape[1:]) == token
        if not fits or count not in (1, len(latents)):
            raise UniPicError(
                f"latents must be a tensor of packed start noise {[count, *token]}, got {_described(latents)}"
            )
        count = len(latents)
    sources = [seeded_noise(token, planned.seed + i) for i in range(count)]

    def noise(step: int) -> Tensor:
        return torch.stack([source(step) for source in sources]).to(device)

    start = noise(-1) if latents is None else latents.to(device, torch.float32)
    if step_noise is None:
        return start, noise
    needed, expected = planned.settings.steps - 1, str([count, *token])
    given = [_described(n) for n in step_noise]
    if len(given) < needed or any(one != expected for one in given):
        raise UniPicError(f"step_noise must hold {needed} tensors of {expected}, got [{', '.join(given)}]")
    return start, lambda step: step_noise[step].to(device, torch.float32)


def _described(given: object) -> str:
    """The shape of a tensor, or what came in place of one."""
    return str(list(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def memory_advice(planned: Plan, references: int, batch: int) -> str:
    """What to lower, given what this run asks for."""
    steps = [f"lower the output size (now {planned.size[0]}x{planned.size[1]})"]
    if references:
        steps.append(f"the reference budget (now {planned.settings.reference_budget})")
    if batch > 1:
        steps.append(f"the number of images (now {batch})")
    return ", or ".join(steps)
