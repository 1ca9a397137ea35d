"""Training loop of all methods. A method supplies trained parts, a loss, previews and exports.

Every process of a distributed run computes its share of each batch. Losses are sums over samples divided by the number
of samples in the whole batch, and gradients are summed over processes, so any number of processes gives the same run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch.utils.data import DataLoader
from tqdm import tqdm

from unipic_core.replacing import write_json

from ..config.parse import make_folder
from ..config.run import ConfigError, RunConfig
from ..optimizers.by_name import evaluated
from ..seeds import mixed_seed
from .bad_samples import SampleLosses
from .checkpointing import non_finite, resume, save, start_from_checkpoint
from .export import check_space, write_exports
from .method import MAIN, Batch, Method, MicroBatch, MicroSteps, Share
from .metrics import MetricLog, Metrics
from .parts import Part, make_parts, update_average
from .prefetch import Prefetched
from .run_lock import alone_in
from .state import State
from .stopping import StopRequest
from .watching import preview_path, samples_due, save_preview, validate, validation_due

PATIENCE = timedelta(hours=6)
"""Timeout of processes that wait for one that draws a preview or writes an export; torch's default is ten minutes."""


class Run:
    """One run of a method, at its first step or at that of its newest checkpoint."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, method: Method) -> None:
        self.accelerator, self.config, self.method = accelerator, config, method
        self.output = Path(config.output)
        self.parts, self.averaged = make_parts(config, method), method.averaged()
        self.optimizers = [optimizer for part in self.parts.values() for optimizer in part.optimizers]
        averages = [average for average, _ in self.averaged]
        self.state = State(self.parts.values(), averages, method.data_contents, method.shards_trained)
        self.losses_of = SampleLosses(accelerator, config, method)
        self.start = 0

    def begin(self, allow_change: Sequence[str], start_from: Path | None) -> None:
        """Resume, open the records, and write what is due before the first step. Raises TrainingError."""
        accelerator, config = self.accelerator, self.config
        self.start = start = resume(accelerator, self.state, self.output, config, allow_change)
        if not start and start_from is not None:
            start_from_checkpoint(accelerator, self.state, start_from)
        first = start + 1 if start else 0
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first}})
        self.log, self.saved = MetricLog(accelerator, self.output, start), time.monotonic()
        if not start and config.validation is not None and config.validation.holds_out:
            self.validate(0)
        if start and samples_due(config, start) and not preview_path(self.output, start).exists():  # interrupted then
            self.preview(start)

    def train(self) -> None:
        """Run the steps that are left. Raises KeyboardInterrupt after a stop signal, when a checkpoint is saved."""
        steps = self.config.steps
        bar = tqdm(total=steps, initial=self.start, disable=not self.accelerator.is_main_process, smoothing=0.05)
        with StopRequest() as request, closing(self.log), load_batches(self.config, self.method, self.start) as batches:
            for step in range(self.start, steps):
                self.step(batches, step)
                if self.record(step + 1, request.asked, bar):
                    raise KeyboardInterrupt
                if samples_due(self.config, step + 1):
                    self.preview(step + 1)
            if any(any_process(self.accelerator, request.asked)):  # in the last preview: no export, no next stage
                raise KeyboardInterrupt
        bar.close()

    def step(self, batches: Iterator[Batch], step: int) -> None:
        """Run the updates of one step, each after `accumulation` batches, and update the moving average."""
        updates = self.method.updates(step)
        for name in updates:
            for _ in range(self.config.accumulation):
                batch = next(batches).to(self.accelerator.device)
                self.log.add(backward(self.losses_of, self.parts[name], batch, step), self.config.batch_size)
            try:
                self.log.add(self.parts[name].update())
            except FloatingPointError as error:
                raise non_finite(str(error), name, f"the update after {batch.name}", step, self.output) from error
        if MAIN in updates:
            with evaluated(self.optimizers):
                update_average(self.averaged, self.config.ema_decay, self.state.updates)
            self.state.updates += 1

    def record(self, done: int, asked: bool, bar: tqdm[NoReturn]) -> bool:
        """Write metrics, validation loss and checkpoint if they are due; True if any process is asked to stop."""
        config = self.config
        late = bool(config.save_minutes) and time.monotonic() - self.saved >= 60 * config.save_minutes
        stop, late = any_process(self.accelerator, asked, late)
        save_now = late or stop or done % config.save_every == 0 or done == config.steps
        if done % config.log_every == 0 or save_now:  # resumed runs then average the same steps
            self.log.write(done, self.losses_of.take_skipped())
        if validation_due(config, done):
            self.validate(done)
        bar.update()
        bar.set_postfix(self.log.losses, refresh=False)
        if save_now:
            save(self.accelerator, self.state, self.output, done, config, self.method.adapter_writer)
            self.saved = time.monotonic()
        return stop

    def validate(self, done: int) -> None:
        with evaluated(self.optimizers):
            self.log.record(done, validate(self.accelerator, self.config, self.method, done))

    def preview(self, done: int) -> None:
        with evaluated(self.optimizers):
            save_preview(self.accelerator, self.method, self.output, done)

    def export(self, folder: Path) -> None:
        with evaluated(self.optimizers):
            write_exports(self.accelerator, self.method.exports(), folder, self.method.shards_trained)


def train(
    config: RunConfig,
    method: Method,
    allow_change: Sequence[str] = (),
    start_from: Path | None = None,
    export_folder: Path | None = None,
    exports: bool = True,
) -> Path:
    """Start or resume a run; returns the export folder.

    A resumed run needs the config it was started with, except for the keys in `allow_change`. start_from: checkpoint of
    another run whose weights and averages a new run starts with. export_folder: None for that of the output; exports:
    False for a run that others go on from. Raises TrainingError, and KeyboardInterrupt after a stop signal (a
    checkpoint is saved).
    """
    output = Path(config.output)
    export_folder = export_folder or output / "export"
    accelerator = make_accelerator(config, output)
    method.place(accelerator.device, Share(accelerator.process_index, accelerator.num_processes))
    with alone_in(accelerator, output):
        write_data_report(accelerator, method, output)
        if exports:
            check_space(accelerator, method.exports(), output)
        run = Run(accelerator, config, method)
        run.begin(allow_change, start_from)
        run.train()
        if exports:
            run.export(export_folder)
    accelerator.end_training()
    return export_folder


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """OR each flag over all processes, so that all save and stop after the same step."""
    sums = accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=accelerator.device), "sum")
    return [value > 0 for value in sums.tolist()]


@contextmanager
def load_batches(config: RunConfig, method: Method, start: int) -> Iterator[Iterator[Batch]]:
    """Iterate over the batches of all steps from `start` on."""
    steps = MicroSteps(method, start, config.steps, config.accumulation)
    with closing(method):
        batches = iter(DataLoader(steps, batch_size=None, num_workers=method.loader_workers))
        if not method.prefetch:
            yield batches
            return
        with closing(Prefetched(batches, method.prefetch)) as prefetched:
            yield prefetched


def make_accelerator(config: RunConfig, output: Path) -> Accelerator:
    """Set up devices, processes, mixed precision and TensorBoard."""
    make_folder(output, "output")
    return Accelerator(
        mixed_precision=config.precision,
        log_with=trackers_of(config, output),
        project_config=ProjectConfiguration(str(output), logging_dir=str(output)),
        step_scheduler_with_optimizer=False,
        # no cache: a weight cast without gradient (rollout, tangent) must not be reused where a gradient is needed
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def trackers_of(config: RunConfig, output: Path) -> list[Any]:
    """Trackers of accelerate. Raises ConfigError for one that is not installed."""
    if "wandb" not in config.trackers:
        return list(config.trackers)
    from accelerate.tracking import WandBTracker

    if find_spec("wandb") is None:
        raise ConfigError("trackers: wandb needs the package wandb; run pip install wandb, or remove it from trackers")
    others = [name for name in config.trackers if name != "wandb"]
    return [*others, WandBTracker("unipic", name=output.name, dir=str(output))]


def backward(losses_of: SampleLosses, part: Part, batch: Batch, step: int) -> Metrics:
    """Accumulate the gradient of one batch; returns loss and metrics, averaged over all processes."""
    accelerator, config = losses_of.accelerator, losses_of.config
    total: dict[str, float] = defaultdict(float)
    for number, micro_batch in enumerate(batch.micro_batches):
        torch.manual_seed(mixed_seed(config.seed, micro_batch.index, accelerator.process_index, number))  # for dropout
        for name, value in backward_micro_batch(losses_of, part, micro_batch, step).items():
            total[name] += value
    return total


def backward_micro_batch(losses_of: SampleLosses, part: Part, batch: MicroBatch, step: int) -> Metrics:
    """`backward` of one micro-batch, weighted by its share of the samples in the whole batch."""
    accelerator, config = losses_of.accelerator, losses_of.config
    losses, metrics, computed = losses_of(part.name, batch, step)
    weight = float(computed.counts)  # 0: filler that only keeps processes in step
    loss = losses.sum() * (weight / config.batch_size)
    (loss / config.accumulation).backward()
    share = weight * len(losses) / config.batch_size
    shares = torch.tensor([value * share for value in metrics.values()], device=loss.device)
    sums = accelerator.reduce(torch.cat([shares, loss.detach()[None]]), "sum").tolist()  # one GPU synchronisation
    return {f"{part.prefix}{name}": value for name, value in zip((*metrics, "loss"), sums, strict=True)}


def write_data_report(accelerator: Accelerator, method: Method, output: Path) -> None:
    """Write RUN/data.json and print it, for methods that train on rows."""
    values = method.data_report() if accelerator.is_main_process else {}
    if values:
        accelerator.print(", ".join(f"{name} {value}" for name, value in values.items()))
        write_json(output / "data.json", values)
