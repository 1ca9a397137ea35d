"""Checks of the pipeline's inputs, pictures and noise, and advice when a run needs too much memory."""

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
    """Return the pictures as RGB. Raises UniPicError for other types; warns of an empty list, which is allowed."""
    pictures: Any = images
    try:
        pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    except TypeError:  # not a sequence: the next check names its type
        pictures = [pictures]
    if wrong := [type(i).__name__ for i in pictures if not isinstance(i, Image.Image)]:
        raise UniPicError(
            f"images must be Pillow pictures, got {wrong[0]}; open files with unipic_core.load_image, and pass [] for "
            "none"
        )
    if not pictures:
        warnings.warn("no pictures given: the model was trained to compose from reference pictures", stacklevel=4)
    return [to_rgb(picture) for picture in pictures]


def noise_for(
    planned: Plan,
    token: tuple[int, int],
    device: torch.device,
    latents: Tensor | None = None,
    step_noise: Sequence[Tensor] | None = None,
) -> tuple[Tensor, NoiseSource]:
    """Start noise [B, N_O, 4C] float32 on the device, and the noise source of the consistency sampler.

    token: (N_O, 4C). latents: start noise to use instead of the seed's; step_noise: step noises to use instead of the
    seed's. Raises UniPicError if their shapes do not fit.
    """
    count = planned.num_images
    if latents is not None:
        fits = isinstance(latents, Tensor) and latents.ndim == 3 and tuple(latents.shape[1:]) == token
        if not fits or count not in (1, len(latents)):
            raise UniPicError(
                f"latents must be a tensor of packed start noise {[count, *token]}, got {_shape_or_type(latents)}; "
                "leave it out to use the seed"
            )
        count = len(latents)
    sources = [seeded_noise(token, planned.seed + i) for i in range(count)]

    def noise(step: int) -> Tensor:
        return torch.stack([source(step) for source in sources]).to(device)

    start = noise(-1) if latents is None else latents.to(device, torch.float32)
    if step_noise is None:
        return start, noise
    needed, expected = planned.settings.steps - 1, str([count, *token])
    shapes = [_shape_or_type(n) for n in step_noise]
    if len(shapes) < needed or any(shape != expected for shape in shapes):
        raise UniPicError(
            f"step_noise must be {needed} tensors of {expected}, got [{', '.join(shapes)}]; leave it out to use the "
            "seed"
        )
    return start, lambda step: step_noise[step].to(device, torch.float32)


def _shape_or_type(value: object) -> str:
    """Describe a value for a message: the shape of a tensor, the type of anything else."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def memory_advice(planned: Plan, references: int, batch: int) -> str:
    """List the arguments of this run that can be lowered to save memory."""
    remedies = [f"lower the output size (now {planned.size[0]}x{planned.size[1]})"]
    if references:
        remedies.append(f"the reference budget (now {planned.settings.reference_budget})")
    if batch > 1:
        remedies.append(f"the number of images (now {batch})")
    return ", or ".join(remedies)
