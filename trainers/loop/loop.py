"""Training loop of all methods. A method supplies trained parts, a loss, previews and exports.

Every process of a distributed run computes its share of each batch. Losses are sums over samples divided by the number
of samples in the whole batch, and gradients are summed over processes, so any number of processes gives the same run.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from unipic_core.replacing import write_json

from ..config.methods import OptimizerConfig
from ..config.parse import make_folder
from ..config.run import ConfigError, RunConfig
from ..roles.sharding import sum_gradients, whole
from ..roles.types import NamedParameters
from ..seeds import mixed_seed
from .bad_samples import SampleLosses
from .checkpointing import non_finite, resume, save, start_from_checkpoint
from .export import check_space, write_exports
from .method import MAIN, Batch, Method, MicroSteps, Share
from .metrics import MetricLog, Metrics
from .optimizers import evaluated, learning_rate, lr_factor, make_optimizers
from .prefetch import Prefetched
from .state import State
from .stopping import StopRequest
from .watching import preview_path, samples_due, save_preview, validate, validation_due

PATIENCE = timedelta(hours=6)
"""Timeout of processes that wait for one that draws a preview or writes an export; torch's default is ten minutes."""


class Part:
    """Parameters that are updated together, with their optimizers and schedulers."""

    def __init__(self, name: str, parameters: NamedParameters, config: OptimizerConfig, updates: int) -> None:
        self.name, self.config = name, config
        self.parameters = [p for _, p in parameters]
        self.optimizers: list[Optimizer] = make_optimizers(parameters, config)
        factor = lr_factor(config, updates)
        self.schedulers = [LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        self.prefix = "" if name == MAIN else f"{name}/"

    def update(self) -> Metrics:
        """Step the optimizers; returns gradient norm and learning rate. FloatingPointError: the norm is not finite."""
        sum_gradients(self.parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradients of {self.name} became {float(norm)}")
        lr = learning_rate(self.optimizers[0])
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return {f"{self.prefix}grad_norm": float(norm), f"{self.prefix}lr": lr}


IN_OUTPUT = Path("export")


def train(
    config: RunConfig,
    method: Method,
    allow_change: Sequence[str] = (),
    start_from: Path | None = None,
    export: Path | None = IN_OUTPUT,
) -> Path:
    """Start or resume a run; returns the export folder.

    A resumed run needs the config it was started with, except for the keys in `allow_change`. start_from: checkpoint of
    another run whose weights and averages a new run starts with. export: folder of the exports, by default that of the
    output; None: nothing is exported. Raises TrainingError, and KeyboardInterrupt after a stop signal (a checkpoint is
    saved).
    """
    output = Path(config.output)
    export_folder = output / export if export is IN_OUTPUT else export
    accelerator = make_accelerator(config, output)
    method.place(accelerator.device, Share(accelerator.process_index, accelerator.num_processes))
    write_data_report(accelerator, method, output)
    if export_folder is not None:
        check_space(accelerator, method.exports(), output)
    parts = make_parts(config, method)
    averaged = method.averaged()
    averages, contents = [average for average, _ in averaged], getattr(method, "data_contents", "")
    state = State(list(parts.values()), averages, contents, method.shards_trained)
    start = resume(accelerator, state, output, config, allow_change)
    if not start and start_from is not None:
        start_from_checkpoint(accelerator, state, start_from)
    bar = tqdm(total=config.steps, initial=start, disable=not accelerator.is_main_process, smoothing=0.05)
    first = start + 1 if start else 0
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first}})
    log = MetricLog(accelerator, output, start)
    optimizers = [optimizer for part in parts.values() for optimizer in part.optimizers]
    if not start and config.validation is not None and config.validation.holds_out:
        log.record(0, validate(accelerator, config, method, 0))
    if start and samples_due(config, start) and not preview_path(output, start).exists():  # interrupted while drawing
        with evaluated(optimizers):
            save_preview(accelerator, method, output, start)
    losses_of, saved = SampleLosses(accelerator, config, method), time.monotonic()
    with StopRequest() as request, load_batches(config, method, start) as batches:
        for step in range(start, config.steps):
            run_step(losses_of, parts, batches, step, log)
            if MAIN in method.updates(step):
                with evaluated(optimizers):
                    update_average(averaged, config.ema_decay, state.updates)
                state.updates += 1
            done = step + 1
            late = bool(config.save_minutes) and time.monotonic() - saved >= 60 * config.save_minutes
            stop, due = any_process(accelerator, request.asked, late)
            due = due or stop or save_due(config, done)
            if done % config.log_every == 0 or due:  # resumed runs then average the same steps
                log.write(done, losses_of.take_skipped())
            if validation_due(config, done):
                with evaluated(optimizers):
                    log.record(done, validate(accelerator, config, method, done))
            bar.update()
            bar.set_postfix(log.losses, refresh=False)
            if due:
                save(accelerator, state, output, done, config, getattr(method, "save_adapter", None))
                saved = time.monotonic()
            if stop and done < config.steps:
                log.close()
                raise KeyboardInterrupt
            if samples_due(config, done):
                with evaluated(optimizers):
                    save_preview(accelerator, method, output, done)
    bar.close()
    log.close()
    if export_folder is not None:
        with evaluated(optimizers):
            write_exports(accelerator, method.exports(), export_folder, method.shards_trained)
    accelerator.end_training()
    return export_folder or output


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """OR each flag over all processes, so that all save and stop after the same step."""
    sums = accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=accelerator.device), "sum")
    return [value > 0 for value in sums.tolist()]


def save_due(config: RunConfig, done: int) -> bool:
    """True if a checkpoint is saved after this step."""
    return done % config.save_every == 0 or done == config.steps


@contextmanager
def load_batches(config: RunConfig, method: Method, start: int) -> Iterator[Iterator[Batch]]:
    """Iterate over the batches of all steps from `start` on."""
    steps = MicroSteps(method, start, config.steps, config.accumulation)
    batches = iter(DataLoader(steps, batch_size=None, num_workers=method.loader_workers))
    ahead: int = getattr(method, "prefetch", 0)
    if not ahead:
        yield batches
        return
    with closing(Prefetched(batches, ahead)) as prefetched:
        yield prefetched


def run_step(
    losses_of: SampleLosses, parts: dict[str, Part], batches: Iterator[Batch], step: int, log: MetricLog
) -> None:
    """Run the updates of one step, each after `accumulation` batches."""
    accelerator, config = losses_of.accelerator, losses_of.config
    for name in losses_of.method.updates(step):
        for _ in range(config.accumulation):
            batch = next(batches).to(accelerator.device)
            log.add(backward(losses_of, parts[name], batch, step), config.batch_size)
        try:
            log.add(parts[name].update())
        except FloatingPointError as error:
            where = f"the update after {batch.name}"
            raise non_finite(str(error), name, where, step, Path(config.output)) from error


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


def make_parts(config: RunConfig, method: Method) -> dict[str, Part]:
    """Create the parts by name, each with a learning rate schedule over its number of updates."""
    counts: dict[str, int] = defaultdict(int)
    for step in range(config.steps):
        for name in method.updates(step):
            counts[name] += 1
    return {name: Part(name, method.trained(name), method.optimizer(name), n) for name, n in counts.items()}


def backward(losses_of: SampleLosses, part: Part, batch: Batch, step: int) -> Metrics:
    """Accumulate the gradient of one batch; returns loss and metrics, averaged over all processes."""
    accelerator, config = losses_of.accelerator, losses_of.config
    total: dict[str, float] = defaultdict(float)
    for number, micro_batch in enumerate(getattr(batch, "micro_batches", (batch,))):
        torch.manual_seed(mixed_seed(config.seed, micro_batch.index, accelerator.process_index, number))  # for dropout
        for name, value in backward_micro_batch(losses_of, part, micro_batch, step).items():
            total[name] += value
    return total


def backward_micro_batch(losses_of: SampleLosses, part: Part, batch: Batch, step: int) -> Metrics:
    """`backward` of one micro-batch, weighted by its share of the samples in the whole batch."""
    accelerator, config = losses_of.accelerator, losses_of.config
    losses, metrics, computed = losses_of(part.name, batch, step)
    weight = float(getattr(computed, "counts", True))  # 0: filler that only keeps processes in step
    loss = losses.sum() * (weight / config.batch_size)
    (loss / config.accumulation).backward()
    share = weight * len(losses) / config.batch_size
    shares = torch.tensor([value * share for value in metrics.values()], device=loss.device)
    sums = accelerator.reduce(torch.cat([shares, loss.detach()[None]]), "sum").tolist()  # one GPU synchronisation
    return {f"{part.prefix}{name}": value for name, value in zip((*metrics, "loss"), sums, strict=True)}


def write_data_report(accelerator: Accelerator, method: Method, output: Path) -> None:
    """Write RUN/data.json and print it, for methods that train on rows."""
    report = getattr(method, "data_report", None)
    values = report() if report is not None and accelerator.is_main_process else None
    if values:
        accelerator.print(", ".join(f"{name} {value}" for name, value in values.items()))
        write_json(output / "data.json", values)


def update_average(averaged: Sequence[tuple[Tensor, Tensor]], decay: float, n: int) -> None:
    """Update the EMA; its decay grows as (1 + n) / (10 + n) up to `decay`, so short runs forget their start."""
    if averaged:
        averages, parameters = zip(*averaged, strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(averages), [p.detach() for p in parameters], 1 - min(decay, (1 + n) / (10 + n)))
