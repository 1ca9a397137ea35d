"""What a run writes down about itself: TensorBoard and `metrics.jsonl`."""

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
    """TensorBoard and `metrics.jsonl`: the mean of each metric since the last record, throughput and memory.

    losses: those of the last record; none before the first.
    """

    def __init__(self, accelerator: Accelerator, output: Path, start: int) -> None:
        self.accelerator, self.written = accelerator, start
        self.values: dict[str, list[float]] = defaultdict(list)
        self.losses: Metrics = {}
        self.since, self.samples = time.perf_counter(), 0
        path = output / "metrics.jsonl" if accelerator.is_main_process else Path(os.devnull)
        if accelerator.is_main_process:
            forget_after(path, start)
        self.file = path.open("a")

    def add(self, metrics: Metrics, samples: int = 0) -> None:
        """Values of one update, or of one batch of so many samples."""
        self.samples += samples
        for name, value in metrics.items():
            self.values[name].append(value)

    def write(self, step: int) -> None:
        """Record the means since the last record."""
        steps, now = step - self.written, time.perf_counter()
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.losses = {name: mean for name, mean in means.items() if name.endswith("loss")}
        means["seconds_per_step"] = (now - self.since) / steps
        means["samples_per_second"] = self.samples / (now - self.since)
        means["peak_memory_gib"] = peak_memory() / 2**30
        self.since, self.written, self.samples = now, step, 0
        self.values.clear()
        self.record(step, means)

    def record(self, step: int, values: Metrics) -> None:
        """One line of its own."""
        self.accelerator.log(values, step=step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def forget_after(path: Path, start: int) -> None:
    """Keep the records up to a step, for the resumed run writes the later ones again; whole or untouched if killed.

    Step 0 has no checkpoint: a run that goes on from there writes all records again.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half of one
    kept = [line for line in whole if start and json.loads(line)["step"] <= start]
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def peak_memory() -> int:
    """Most bytes in use so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # Python has no call for it there
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
