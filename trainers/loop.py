"""The one training loop. A method brings modules, a loss, previews and an export; the loop brings everything else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device
from PIL import Image
from safetensors import SafetensorError
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

    def to(self, device: torch.device) -> None:
        """Move what does not train."""

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


def train(config: RunConfig, method: Method, allow_change: Sequence[str] = ()) -> Path:
    """Run, or resume, a training; returns the folder of the export.

    A resumed run must have the config that it was started with, but for the keys named in `allow_change`.
    """
    output = Path(config.output)
    accelerator = make_accelerator(config, output)
    optimizers = make_optimizers(method.model, config.optimizer)
    factor = lr_factor(config.optimizer, config.steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    method.model, *optimizers = accelerator.prepare(method.model, *optimizers)
    ema = AveragedModel(accelerator.unwrap_model(method.model), multi_avg_fn=warm_ema(config.ema_decay))
    accelerator.register_for_checkpointing(*schedulers, ema)
    method.to(accelerator.device)
    start = resume(accelerator, output, config, allow_change)
    micro = config.accumulation
    loader = DataLoader(
        Steps(method.batch, start * micro, config.steps * micro), batch_size=None, num_workers=method.loader_workers
    )
    batches = iter(loader)
    bar = tqdm(total=config.steps, initial=start, disable=not accelerator.is_main_process, smoothing=0.05)
    log = MetricLog(accelerator, output, start)
    for step in range(start, config.steps):
        for i in range(micro):
            batch = send_to_device(next(batches), accelerator.device)
            with accelerator.accumulate(method.model):
                with accelerator.autocast():
                    loss, metrics = method.loss(batch, step * micro + i)
                check_loss(loss, step, output)
                log.add({**metrics, "loss": float(loss.detach())}, 1 / micro)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    parameters, limit = method.model.parameters(), config.optimizer.max_grad_norm
                    log.add({"grad_norm": float(accelerator.clip_grad_norm_(parameters, limit))})
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        ema.update_parameters(accelerator.unwrap_model(method.model))
        done = step + 1
        log.add({"lr": float(schedulers[0].get_last_lr()[0])})
        if done % config.log_every == 0 or done % config.save_every == 0:  # so a resumed run averages the same steps
            log.write(done)
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
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"this version trains in one process, not {accelerator.num_processes}; start without launch"
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


def resume(accelerator: Accelerator, output: Path, config: RunConfig, allow_change: Sequence[str] = ()) -> int:
    """Load the newest checkpoint of this output folder, if any; returns the step to go on from."""
    path = newest_checkpoint(output)
    if path is None:
        return 0
    run = json.loads((path / "run.json").read_text())
    now = json.loads(json.dumps(to_dict(config)))
    changed = [key for key in changed_keys(run["config"], now) if key not in (*NO_CHANGE, *allow_change)]
    if changed:
        raise TrainingError(
            f"{output} was started with other values of {', '.join(changed)}; choose another output, or allow it with "
            f"--allow-config-change {' '.join(changed)}"
        )
    if run["step"] > config.steps:
        raise TrainingError(f"{output} has already trained {run['step']} steps, more than the {config.steps} asked for")
    accelerator.load_state(str(path))
    accelerator.print(f"resuming {output} at step {run['step']} of {config.steps}")
    return run["step"]


NO_CHANGE = ("output", "sample_every", "keep_checkpoints")
"""Config keys that change no number of a run."""


def changed_keys(before: Any, now: Any, where: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested tables."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    keys = sorted({*before, *now})
    inner = [changed_keys(before.get(k), now.get(k), f"{where}.{k}" if where else k) for k in keys]
    return [name for names in inner for name in names]


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
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk becomes in torch and safetensors
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
    """TensorBoard and `metrics.jsonl`: the mean of each metric since the last record, and seconds per step."""

    def __init__(self, accelerator: Accelerator, output: Path, start: int) -> None:
        self.accelerator, self.written = accelerator, start
        self.sums: Metrics = {}
        self.mean_loss = float("nan")
        self.since = time.perf_counter()
        path = output / "metrics.jsonl"
        kept = [
            line for line in _whole_lines(path) if json.loads(line)["step"] <= start
        ]  # a resumed run repeats no step
        self.file = Path(path if accelerator.is_main_process else os.devnull).open("w")  # noqa: SIM115 - closed by close
        self.file.writelines(kept)

    def add(self, metrics: Metrics, weight: float = 1.0) -> None:
        """Values of one step, or of a share of one."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight

    def write(self, step: int) -> None:
        """Record the means of the steps since the last record."""
        steps, now = step - self.written, time.perf_counter()
        means = {name: value / steps for name, value in self.sums.items()}
        means["seconds_per_step"] = (now - self.since) / steps
        self.mean_loss, self.since, self.sums, self.written = means["loss"], now, {}, step
        self.accelerator.log(means, step=step)
        self.file.write(json.dumps({"step": step, **means}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines that end; a killed run may leave half of one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
