"""Metrics of a run in TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator

from unipic_core.replacing import replacing

Metrics = dict[str, float]


class MetricLog:
    """Log of the mean of each metric since the last record, with throughput and memory.

    losses: those of the last record; {} before the first.
    """

    def __init__(self, accelerator: Accelerator, output: Path, start: int) -> None:
        self.accelerator, self.last_step = accelerator, start
        self.values: dict[str, list[float]] = defaultdict(list)
        self.losses: Metrics = {}
        self.since, self.samples = time.perf_counter(), 0
        path = output / "metrics.jsonl" if accelerator.is_main_process else Path(os.devnull)
        if accelerator.is_main_process:
            truncate_after(path, start)
        self.file = path.open("a")

    def add(self, metrics: Metrics, samples: int = 0) -> None:
        """Add metrics of one update, or of one batch of `samples` samples."""
        self.samples += samples
        for name, value in metrics.items():
            self.values[name].append(value)

    def write(self, step: int, counts: Metrics | None = None) -> None:
        """Write the means since the last record, and counts as they are."""
        steps, now = step - self.last_step, time.perf_counter()
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.losses = {name: mean for name, mean in means.items() if name.endswith("loss")}
        means["seconds_per_step"] = (now - self.since) / steps
        means["samples_per_second"] = self.samples / (now - self.since)
        means["peak_memory_gib"] = peak_memory() / 2**30
        self.since, self.last_step, self.samples = now, step, 0
        self.values.clear()
        self.record(step, {**means, **(counts or {})})

    def record(self, step: int, values: Metrics) -> None:
        """Write one line of values."""
        self.accelerator.log(values, step=step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def truncate_after(path: Path, start: int) -> None:
    """Drop the records after a step, which the resumed run writes again; atomic.

    Step 0 has no checkpoint: a run that starts there writes all records again.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave a partial line
    before = [line for line in whole if start and json.loads(line)["step"] <= start]
    with replacing(path) as partial:
        partial.write_text("".join(before), encoding="utf-8")


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU if there is one, else of the process; 0 on Windows without GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # Python has no call for it
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
