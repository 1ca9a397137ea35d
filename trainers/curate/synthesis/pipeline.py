"""Pictures from this project's pipeline, loaded once per process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...judges.vlm import load_picture, png_of

if TYPE_CHECKING:
    from unipic_core.pipeline import UniPicPipeline


@lru_cache(maxsize=1)
def pipeline_of(model: str) -> UniPicPipeline:
    """Pipeline on the GPU if there is one."""
    import torch

    from unipic_core.pipeline import UniPicPipeline
    from unipic_core.pipeline.offload import default_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return UniPicPipeline.from_pretrained(model, torch_dtype=default_dtype(device), device=device)


def compose(
    model: str, pictures: Sequence[Path], prompt: str, seed: int, steps: int, size: int, guidance: float | None
) -> bytes:
    """PNG of the pipeline's picture, size x size pixels. Raises AnswerError for unreadable pictures, UniPicError."""
    output = pipeline_of(model)(
        images=[load_picture(path).image for path in pictures],
        prompt=prompt,
        width=size,
        height=size,
        num_inference_steps=steps,
        true_cfg_scale=guidance,
        seed=seed,
    )
    return png_of(output.images[0])
