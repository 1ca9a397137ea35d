"""The one training loop. A method brings modules, a loss, previews and an export; the loop brings everything else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .config import RunConfig, to_dict
from .optimizers import lr_factor, make_optimizers

Metrics = dict[str, float]


class TrainingError(RuntimeError):
    """A run cannot go on; the message says what to do."""


class Method(Protocol):
    """What a training method brings to the loop."""

    model: nn.Module
    """Everything that trains, as one module; its EMA is kept by the loop."""

    loader_workers: int

    def batch(self, step: int) -> Any:
        """The batch of a micro step: a pure function of it, so that a resumed run sees what an unbroken one sees."""

    def loss(self, batch: Any, step: int) -> tuple[Tensor, Metrics]: ...

    def preview(self, ema: nn.Module) -> Image.Image: ...

    def export(self, ema: nn.Module, folder: Path) -> None: ...


class Steps(Dataset):
    """Micro steps start .. stop as a data set, so that a DataLoader can prepare them ahead."""

    def __init__(self, batch: Callable[[int], Any], start: int, stop: int) -> None:
        self.batch, self.start, self.stop = batch, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Any:
        return self.batch(self.start + i)


def train(config: RunConfig, method: Method) -> Path:
    """Run, or resume, a training; returns the folder of the export."""
    output = Path(config.output)
    accelerator = make_accelerator(config, output)
    optimizers = make_optimizers(method.model, config.optimizer)
    factor = lr_factor(config.optimizer, config.steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    method.model, *optimizers = accelerator.prepare(method.model, *optimizers)
    ema = AveragedModel(accelerator.unwrap_model(method.model), multi_avg_fn=warm_ema(config.ema_decay))
    accelerator.register_for_checkpointing(*schedulers, ema)
    start = resume(accelerator, output, config)
    micro = config.accumulation
    loader = DataLoader(
        Steps(method.batch, start * micro, config.steps * micro), batch_size=None, num_workers=method.loader_workers
    )
    batches = iter(loader)
    bar = tqdm(total=config.steps, initial=start, disable=not accelerator.is_main_process, smoothing=0.05)
    log = MetricLog(accelerator, output, start, config.log_every)
    for step in range(start, config.steps):
        for i in range(micro):
            with accelerator.accumulate(method.model):
                loss, metrics = method.loss(next(batches), step * micro + i)
                check_loss(loss, step, output)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    metrics["grad_norm"] = float(
                        accelerator.clip_grad_norm_(method.model.parameters(), config.optimizer.max_grad_norm)
                    )
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        ema.update_parameters(accelerator.unwrap_model(method.model))
        done = step + 1
        log.add(done, {**metrics, "loss": float(loss.detach()), "lr": float(schedulers[0].get_last_lr()[0])})
        bar.update()
        bar.set_postfix(loss=f"{log.mean_loss:.4f}", refresh=False)
        if done % config.save_every == 0 or done == config.steps:
            save(accelerator, output, done, config)
        if accelerator.is_main_process and (done % config.sample_every == 0 or done == config.steps):
            save_preview(method, ema.module, output / "samples", done)
    bar.close()
    log.close()
    export = output / "export"
    if accelerator.is_main_process:
        replace_folder(export, lambda folder: method.export(ema.module, folder))
    accelerator.end_training()
    return export


def make_accelerator(config: RunConfig, output: Path) -> Accelerator:
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(output), logging_dir=str(output)),
        step_scheduler_with_optimizer=False,
    )
    accelerator.init_trackers("tensorboard")
    return accelerator


def warm_ema(decay: float) -> Callable[..., None]:
    """EMA whose decay grows as (1 + n) / (10 + n) up to `decay`, so that a short run is not dominated by its start."""

    def update(averages: Any, parameters: Any, count: Any) -> None:
        n = float(count)
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def check_loss(loss: Tensor, step: int, output: Path) -> None:
    if not bool(torch.isfinite(loss)):
        last = newest_checkpoint(output)
        raise TrainingError(
            f"the loss became {float(loss.detach())} in step {step + 1}; the last good checkpoint is {last or 'none'}. "
            "Lower optimizer.lr, or set precision: 'no', and start again: the run resumes from there"
        )


def newest_checkpoint(output: Path) -> Path | None:
    """Checkpoints are renamed into place when whole; so the newest name is the newest whole one."""
    found = sorted((output / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def resume(accelerator: Accelerator, output: Path, config: RunConfig) -> int:
    """Load the newest checkpoint of this output folder, if any; returns the step to go on from."""
    path = newest_checkpoint(output)
    if path is None:
        return 0
    accelerator.load_state(str(path))
    step = json.loads((path / "run.json").read_text())["step"]
    accelerator.print(f"resuming {output} at step {step} of {config.steps}")
    return step


def save(accelerator: Accelerator, output: Path, step: int, config: RunConfig) -> None:
    """Write a checkpoint aside and rename it; remove the oldest ones."""

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder))
        (folder / "run.json").write_text(json.dumps({"step": step, "config": to_dict(config)}, indent=1))

    replace_folder(output / "checkpoints" / f"step-{step:07d}", write)
    for old in sorted((output / "checkpoints").glob("step-*"))[: -config.keep_checkpoints]:
        shutil.rmtree(old)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside `path` and rename it into place; nothing half-written is ever found under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write(aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingError(f"could not write {path}: {error}; what was saved before is untouched") from error
    if path.exists():
        shutil.rmtree(path)
    os.replace(aside, path)


def save_preview(method: Method, ema: nn.Module, folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ema.eval()
    with torch.no_grad():
        method.preview(ema).save(folder / f"step-{step:07d}.png")


class MetricLog:
    """TensorBoard and `metrics.jsonl`: the mean of each metric over `every` steps, and seconds per step."""

    def __init__(self, accelerator: Accelerator, output: Path, start: int, every: int) -> None:
        self.accelerator, self.every = accelerator, every
        self.sums: Metrics = {}
        self.count = 0
        self.mean_loss = float("nan")
        self.since = time.perf_counter()
        path = output / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]  # a resumed run repeats no step
        self.file = Path(path if accelerator.is_main_process else os.devnull).open("w")  # noqa: SIM115 - closed by close
        self.file.writelines(kept)

    def add(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if step % self.every:
            return
        means = {name: value / self.count for name, value in self.sums.items()}
        now = time.perf_counter()
        means["seconds_per_step"] = (now - self.since) / self.count
        self.mean_loss, self.since, self.sums, self.count = means["loss"], now, {}, 0
        self.accelerator.log(means, step=step)
        self.file.write(json.dumps({"step": step, **means}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []
