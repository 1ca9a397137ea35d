"""What a run shows of itself beside its losses: previews, and the loss on held-out rows."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from unipic_core.replacing import replacing

from ..config.run import RunConfig
from .checkpointing import unusable
from .method import MAIN, HoldsOut, Method
from .metrics import Metrics


def samples_due(config: RunConfig, done: int) -> bool:
    """Whether a preview follows this step."""
    return done % config.sample_every == 0 or done == config.steps


def validation_due(config: RunConfig, done: int) -> bool:
    """Whether the loss on held-out rows follows this step."""
    options = config.validation
    if options is None or not options.holds_out:
        return False
    return done % options.every == 0 or done == config.steps


@torch.no_grad()
def validate(accelerator: Accelerator, config: RunConfig, method: Method, done: int) -> Metrics:
    """The student's mean loss and metrics on held-out rows, at the same times and noise after every step."""
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    held_out = cast(HoldsOut, method)  # the config's sections with rows to hold out belong to such methods
    for batch in held_out.validation_batches():
        for piece in batch.to(accelerator.device).pieces:
            with accelerator.autocast():
                losses, metrics = method.loss(MAIN, piece)
            weight = len(losses) * float(piece.counts)
            total["samples"] += weight
            total["loss"] += weight * losses.mean()
            for name, value in metrics.items():
                total[name] += weight * value
    sums = accelerator.reduce(torch.stack(list(total.values())), "sum").tolist()
    means = {f"validation/{name}": value / sums[0] for name, value in zip(total, sums, strict=True)}
    del means["validation/samples"]
    if not math.isfinite(means["validation/loss"]):
        raise unusable("the loss of the validation", MAIN, "held-out rows", done, Path(config.output))
    return means


def preview_path(output: Path, step: int) -> Path:
    return output / "samples" / f"step-{step:07d}.png"


def save_preview(accelerator: Accelerator, method: Method, output: Path, step: int) -> None:
    """The sample grid; every process takes part where the network is spread over them."""
    if accelerator.is_main_process or method.sharded:
        with torch.no_grad():
            picture = method.preview()
        if accelerator.is_main_process:
            path = preview_path(output, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                picture.save(partial)
            board = accelerator.get_tracker("tensorboard")
            board.log_images({"samples": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
