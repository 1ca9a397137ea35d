"""Pictures, small sizes and the node's run, for the tests of MultiImageCompose."""

import torch
from unipic_pack.nodes.compose import MultiImageCompose

WISHES = {"reference_budget": 96, "width": 32, "height": 32}
"""Small sizes."""


def image(index=0, width=70, height=50):
    noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(index))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").movedim(1, -1).clamp(0, 1)


def sockets(*images):
    return {f"image_{i + 1}": x for i, x in enumerate(images)}


@torch.inference_mode()
def run(parts, *images, prompt="Blend them.", **inputs):
    return MultiImageCompose.execute(*parts, prompt, images=sockets(*images), **inputs).args[:3]


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())
