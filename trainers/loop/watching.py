"""Preview grids, and the validation loss on held-out rows."""

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
from .checkpointing import non_finite
from .method import MAIN, HoldsOut, Method
from .metrics import Metrics


def samples_due(config: RunConfig, done: int) -> bool:
    """True if a preview is drawn after this step."""
    return done % config.sample_every == 0 or done == config.steps


def validation_due(config: RunConfig, done: int) -> bool:
    """True if a validation follows this step."""
    options = config.validation
    if options is None or not options.holds_out:
        return False
    return done % options.every == 0 or done == config.steps


@torch.no_grad()
def validate(accelerator: Accelerator, config: RunConfig, method: Method, done: int) -> Metrics:
    """Mean loss and metrics of the student on held-out rows, always with the same times and noise."""
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    held_out = cast(HoldsOut, method)  # only such methods have a validation section
    for batch in held_out.validation_batches():
        for micro_batch in batch.to(accelerator.device).micro_batches:
            with accelerator.autocast():
                losses, metrics = method.loss(MAIN, micro_batch)
            weight = len(losses) * float(micro_batch.counts)
            total["samples"] += weight
            total["loss"] += weight * losses.mean()
            for name, value in metrics.items():
                total[name] += weight * value
    sums = accelerator.reduce(torch.stack(list(total.values())), "sum").tolist()
    means = {f"validation/{name}": value / sums[0] for name, value in zip(total, sums, strict=True)}
    del means["validation/samples"]
    if not math.isfinite(means["validation/loss"]):
        raise non_finite("the validation loss", MAIN, "held-out rows", done, Path(config.output))
    return means


def preview_path(output: Path, step: int) -> Path:
    return output / "samples" / f"step-{step:07d}.png"


def save_preview(accelerator: Accelerator, method: Method, output: Path, step: int) -> None:
    """Draw and save the sample grid; with sharded networks every process takes part."""
    if accelerator.is_main_process or method.sharded:
        with torch.no_grad():
            picture = method.preview()
        if accelerator.is_main_process:
            path = preview_path(output, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                picture.save(partial)
            for board in accelerator.trackers:
                options = {"dataformats": "NHWC"} if board.name == "tensorboard" else {}
                board.log_images({"samples": np.asarray(picture)[None]}, step=step, **options)
