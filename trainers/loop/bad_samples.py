"""Samples whose data or loss are not finite: the run stops, or goes on without them, names and counts them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from unipic_core.errors import printable
from unipic_core.sampling.samplers import NonFiniteLatent

from ..config.run import RunConfig
from .checkpointing import non_finite
from .method import HoldsOut, Method, MicroBatch
from .metrics import Metrics

MOST_IN_A_ROW = 16
"""Samples that may be skipped with no good one between them; more of them are a model that broke down."""


class SampleLosses:
    """The losses of micro batches, checked. skipped: samples that were left out since `take_skipped`.

    With bad_samples: skip a micro batch is computed again without its bad samples, whose share of the batch stays
    empty. All processes take part whenever one of them has a bad sample.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, method: Method) -> None:
        self.accelerator, self.config, self.method = accelerator, config, method
        self.skips = config.bad_samples == "skip"
        self.skipped = self.in_a_row = 0

    def take_skipped(self) -> Metrics:
        """Their number since the last call, as a metric where the config skips."""
        count, self.skipped = self.skipped, 0
        return {"skipped_samples": count} if self.skips else {}

    def __call__(self, part: str, batch: Any, step: int) -> tuple[Tensor, Metrics, Any]:
        """(loss of each sample [B], metrics, the batch that was computed). Raises TrainingError, in every process."""
        if self.skips and self._anywhere(bad := ~batch.finite):
            batch = self._without(batch, bad, part, step, "its cached tensors hold NaN or infinite numbers")
        losses, metrics = self._computed(part, batch, step)
        if not self._anywhere(bad := ~torch.isfinite(losses.detach())):
            self.in_a_row = 0
            return losses, metrics, batch
        if not self.skips:
            raise self._error("a loss became NaN or infinite", part, batch, bad, step)
        batch = self._without(batch, bad, part, step, "its loss is NaN or infinite")
        losses, metrics = self._computed(part, batch, step)
        if self._anywhere(bad := ~torch.isfinite(losses.detach())):
            raise self._error("a loss became NaN or infinite", part, batch, bad, step)
        return losses, metrics, batch

    def _computed(self, part: str, batch: MicroBatch, step: int) -> tuple[Tensor, Metrics]:
        try:
            with self.accelerator.autocast():
                return self.method.loss(part, batch)
        except NonFiniteLatent as error:  # at once: others may wait for this process inside their networks
            what = "a picture of the student's became NaN or infinite"
            raise non_finite(what, part, batch.name, step, Path(self.config.output)) from error

    def _anywhere(self, bad: Tensor) -> bool:
        return bool(self._sum(bad.sum()) > 0)

    def _sum(self, count: Tensor) -> Tensor:
        total = self.accelerator.reduce(count.float().to(self.accelerator.device), "sum")
        assert isinstance(total, Tensor)  # as what it is given
        return total

    def _without(self, batch: Any, bad: Tensor, part: str, step: int, why: str) -> Any:
        """The batch without its bad samples. Raises TrainingError if there were too many in a row."""
        counts = float(batch.counts)
        missing, good = (int(self._sum(marks.sum() * counts)) for marks in (bad, ~bad))
        self.skipped += missing
        self.in_a_row = 0 if good else self.in_a_row + missing
        if self.in_a_row > MOST_IN_A_ROW:
            raise self._error(f"{self.in_a_row} samples in a row were unusable", part, batch, bad, step)
        if not bool(bad.any()):
            return batch
        rows = [row for row, is_bad in zip(batch.rows, bad.tolist(), strict=True) if is_bad]
        if counts:
            text = f"warning: step {step + 1} goes on without row {', '.join(map(str, rows))} of the cache: {why}"
            print(printable(text), file=sys.stderr, flush=True)
        method = cast(HoldsOut, self.method)  # RunConfig allows skipping for rows alone
        return method.without(batch, rows).to(self.accelerator.device)

    def _error(self, what: str, part: str, batch: MicroBatch, bad: Tensor, step: int) -> Exception:
        places = bad.nonzero().flatten().tolist()
        where = f"sample {places[0]} of {batch.name}" if places else "another process's batch"
        return non_finite(what, part, where, step, Path(self.config.output))
