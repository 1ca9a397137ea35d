"""Networks whose sampled pictures are known, behind ComfyUI's QwenImage model; and what a sampler is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor, nn

MEAN, STD = 0.5, 0.3
CHANNELS = 4

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def gaussian(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """v with x - t v on the exact flow map to N(MEAN, STD^2): one step of any sampler is right."""
    std_t = torch.sqrt((1 - t) ** 2 * STD**2 + t**2)
    return (x - (MEAN + STD * (x - (1 - t) * MEAN) / std_t)) / t


def textual(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Something crooked that depends on x, t and the text, each picture alone."""
    return torch.sin(3 * x) + t * x.roll(1, -1) + text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1) * torch.cos(x)


class Network(nn.Module):
    """Stands where the diffusion model stands, and keeps a record of its calls."""

    def __init__(self, velocity: Velocity = textual, **kwargs: Any) -> None:
        super().__init__()
        self.velocity = velocity
        self.dtype = torch.float32
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((x.clone(), timestep.clone()))
        return self.velocity(x, timestep.reshape(-1, 1, 1, 1, 1), context)


class Format(comfy.latent_formats.LatentFormat):
    latent_channels = CHANNELS
    latent_dimensions = 3
    latent_rgb_factors = [[0.1, 0.2, 0.3]] * CHANNELS


def model(velocity: Velocity = textual) -> Any:
    """A MODEL around a Network, in float32 on the CPU, of 4 latent channels."""
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image"})
    config.latent_format = Format()
    config.set_inference_dtype(torch.float32, None)
    base = comfy.model_base.QwenImage(config, unet_model=lambda **kw: Network(velocity, **kw))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def network(patcher: Any) -> Network:
    return patcher.model.diffusion_model


def text(value: float = 0.0) -> list[Any]:
    """A conditioning."""
    return [[torch.full((1, 3, 8), value), {}]]


def latent(batch: int = 1, height: int = 8, width: int = 12, **more: Any) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, CHANNELS, 1, height, width), **more}


def run(
    patcher: Any,
    sampler: Any,
    sigmas: Tensor,
    noise: Tensor,
    latent: Tensor | None = None,
    cfg: float = 1.0,
    **more: Any,
) -> Tensor:
    """ComfyUI's sampling with a SAMPLER and SIGMAS."""
    image = torch.zeros_like(noise) if latent is None else latent
    more = {"seed": 7, "disable_pbar": True, **more}
    return comfy.sample.sample_custom(patcher, noise, cfg, sampler, sigmas, text(0.3), text(-0.2), image, **more)


def start(batch: int = 1, height: int = 8, width: int = 12, seed: int = 7) -> Tensor:
    return comfy.sample.prepare_noise(torch.zeros(batch, CHANNELS, 1, height, width), seed)


def close(got: Tensor, want: Tensor, tolerance: float = 0.0) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance
