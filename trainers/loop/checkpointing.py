"""Atomic writing of checkpoints and exports, and resuming from the newest checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from unipic_core.errors import CheckpointError, UniPicError, one_line

from ..config.run import ConfigError, RunConfig, parse_run, to_dict
from .distributed import is_distributed
from .state import State


class TrainingError(RuntimeError):
    """Fault that stops a run; the message says what to do."""


def checkpoints(output: Path) -> list[Path]:
    """List the checkpoint folders, oldest first; other names, links and folders without run.json are ignored."""
    folders = (output / "checkpoints").glob("step-*")
    whole = [
        p for p in folders if CHECKPOINT_NAME.fullmatch(p.name) and not p.is_symlink() and (p / "run.json").is_file()
    ]
    return sorted(whole, key=step_of)


CHECKPOINT_NAME = re.compile("step-([0-9]{7,12})")


def step_of(path: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint. All are whole, because they are renamed into place when complete."""
    paths = checkpoints(output)
    return paths[-1] if paths else None


def non_finite(what: str, part: str, where: str, step: int, output: Path) -> TrainingError:
    """Error for a value that became NaN or infinite, with the last good checkpoint and how to go on."""
    last = newest_checkpoint(output)
    return TrainingError(
        f"{what} in step {step + 1} ({where}); the last good checkpoint is {last or 'none'}. Lower the learning rate "
        f"of the {part}, or set precision: no, and run again with --allow-config-change for that key; "
        "the run resumes from that checkpoint"
    )


def resume(
    accelerator: Accelerator, state: State, output: Path, config: RunConfig, allow_change: Sequence[str] = ()
) -> int:
    """Load the newest undamaged checkpoint of the output folder, if any; returns its step, else 0.

    A warning names each damaged checkpoint. Raises TrainingError if all are damaged or the config differs.
    """
    if accelerator.is_main_process:
        remove_leftovers(output)
    paths = checkpoints(output)
    for path in reversed(paths):
        contents = read_checkpoint(accelerator, state, path)
        if contents is not None:
            run, stored = contents
            check_run(accelerator, state, path, run, config, allow_change)
            break
    else:
        if paths:
            raise TrainingError(f"all checkpoints in {output} are damaged; restore one, or choose another output")
        return 0
    try:
        state.restore(stored)
    except (KeyError, ValueError, RuntimeError) as error:  # allowed changes of parts, sizes or optimizers
        raise TrainingError(
            f"{path} does not fit the parameters of this run ({one_line(error)}); choose another output, or undo the "
            f"change of {', '.join(allow_change) or 'the model'}"
        ) from error
    if "order" not in run and run["config"].get("data"):
        accelerator.print(f"note: {path} was written by a version with other batches; the order of rows starts anew")
    accelerator.print(f"resuming {output} at step {run['step']} of {config.steps}")
    return run["step"]


def start_from_checkpoint(accelerator: Accelerator, state: State, path: Path) -> None:
    """Take weights and averages of another run's checkpoint, not its optimizers. Raises TrainingError."""
    read = read_checkpoint(accelerator, state, path)
    if read is None:
        raise TrainingError(f"the checkpoint {path}, where this stage starts, is damaged; restore it or train again")
    try:
        state.restore_weights(read[1])
    except (KeyError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{path} does not fit what this stage trains ({one_line(error)})") from error
    accelerator.print(f"starting from {path}")


def read_checkpoint(accelerator: Accelerator, state: State, path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read run.json and this process's tensors; None in every process if any process fails to read its part."""
    contents, reason = None, ""
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if run["step"] != step_of(path) or not isinstance(run["config"], dict):
            raise ValueError(f"run.json is of step {run['step']}")
        if not state.sharded or is_distributed(path) or run["processes"] == accelerator.num_processes:
            contents = run, state.read(path, accelerator.process_index)
        else:
            contents = run, {}
    except Exception as error:  # torch raises many types for damaged files
        reason = one_line(error) or type(error).__name__
    bad = accelerator.reduce(torch.tensor(float(contents is None), device=accelerator.device), "sum")
    if float(bad):
        accelerator.print(f"warning: the checkpoint {path} is damaged ({reason or 'in another process'}); skipped")
        return None
    return contents


def check_run(
    accelerator: Accelerator,
    state: State,
    path: Path,
    run: dict[str, Any],
    config: RunConfig,
    allow_change: Sequence[str],
) -> None:
    """Raise TrainingError if this run cannot resume from the checkpoint."""
    output, now = path.parent.parent, with_defaults(json.loads(json.dumps(to_dict(config))))
    recorded = with_defaults(run["config"])
    changed = [key for key in changed_keys(recorded, now) if key not in (*NO_CHANGE, *allow_change)]
    if changed:
        raise TrainingError(
            f"{output} was started with other values of {', '.join(changed)}; choose another output, or allow it with "
            f"{' '.join(f'--allow-config-change {key}' for key in changed)}"
        )
    if run.get("data") and state.data and run["data"] != state.data and "data" not in allow_change:
        raise TrainingError(
            f"{output} was trained on other rows than its cache holds now; take the rows back, choose another output, "
            "or allow it with --allow-config-change data: rows are then numbered anew"
        )
    if run["step"] > config.steps:
        raise TrainingError(
            f"steps: expected at least {run['step']}, which {output} has already trained, got {config.steps}"
        )
    saved_by, processes = run["processes"], accelerator.num_processes
    if state.sharded and saved_by != processes and not is_distributed(path):  # of an earlier version
        raise TrainingError(
            f"expected {saved_by} processes, over which the networks in {path} are sharded, got {processes}; "
            f"start the run with {saved_by}"
        )


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Add defaults of newer keys to a recorded config; unchanged if it has keys that no longer exist."""
    try:
        return json.loads(json.dumps(to_dict(parse_run(config))))
    except ConfigError:
        return config


def remove_leftovers(output: Path) -> None:
    """Delete partial and half-removed checkpoints of a killed run."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for path in (output / "checkpoints").glob(pattern):
            if not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


NO_CHANGE = (
    *("output", "log_every", "save_every", "save_minutes", "sample_every", "keep_checkpoints", "max_tokens"),
    *("export", "recipe.steps", "recipe.guidance", "validation.every", "validation.rows", "validation.draws"),
    *("bad_samples", "trackers", "data.workers", "data.bad_rows", "network.shard_over"),
)
"""Config keys that change no numbers of a run (max_tokens and shard_over: rounding; bad_samples: where it stopped)."""


ORDERED = ("data.scenes.mixture", "data.scenes.shapes")
"""Mappings that are drawn from by position, so that another order draws other scenes."""


def changed_keys(before: object, now: object, where: str = "") -> list[str]:
    """Dotted keys of the values that differ between two nested mappings."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    if where in ORDERED and before == now and list(before) != list(now):
        return [where]
    keys = sorted({*before, *now})
    inner = [changed_keys(before.get(k), now.get(k), f"{where}.{k}" if where else k) for k in keys]
    return [name for names in inner for name in names]


def save(
    accelerator: Accelerator,
    state: State,
    output: Path,
    step: int,
    config: RunConfig,
    adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint atomically and remove the oldest ones. adapter: writes the student's LoRA into a folder.

    If the checkpoint does not fit on the disk, the LoRA alone is written beside the checkpoints. Raises TrainingError.
    """
    try:
        write_checkpoint(accelerator, state, output, step, config, adapter)
    except TrainingError as error:
        folder = output / "checkpoints"
        text = f"{error}. A checkpoint needs {gigabytes(state.nbytes)}, and {free_space(folder)} are free"
        if adapter is not None and accelerator.is_main_process:
            text += save_lora_alone(adapter, folder / f"lora-of-step-{step:07d}")
        raise TrainingError(text) from error
    if accelerator.is_main_process:
        up_to_step = [path for path in checkpoints(output) if step_of(path) <= step]
        for old in up_to_step[: -config.keep_checkpoints]:
            remove(old)


def save_lora_alone(adapter: Callable[[Path], None], folder: Path) -> str:
    """Write only the LoRA; returns the end of the error message that names its folder, "" if that failed too."""
    try:
        folder.mkdir(exist_ok=True)
        adapter(folder)
    except (OSError, UniPicError):  # no space for that either
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f". The student's LoRA of this step is in {folder}"


def write_checkpoint(
    accelerator: Accelerator,
    state: State,
    output: Path,
    step: int,
    config: RunConfig,
    adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write one checkpoint atomically."""
    with whole_folder(accelerator, output / "checkpoints" / f"step-{step:07d}") as folder:
        if accelerator.is_main_process and adapter is not None:
            adapter(folder)
        state.save(folder, accelerator.process_index)
        if accelerator.is_main_process:
            run = {
                "step": step,
                "processes": accelerator.num_processes,
                "order": "rows",
                "data": state.data,
                "config": to_dict(config),
            }
            (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def remove(path: Path) -> None:
    """Rename a folder, then delete it, so that a half-deleted folder never has its name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def flush(folder: Path) -> None:
    """Sync the files of a folder to disk, before it is renamed into place."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a complete file or folder into place; an older folder is removed first, an older file replaced."""
    if path.is_dir():
        remove(path)
    os.replace(aside, path)


@contextmanager
def whole_folder(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """Folder for all processes to fill, renamed to `path` when complete.

    Raises TrainingError if it cannot be written.
    """
    with partial_folder(accelerator, path) as aside:
        yield aside
    if accelerator.is_main_process:
        put_in_place(aside, path)
    accelerator.wait_for_everyone()


@contextmanager
def partial_folder(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """Empty folder beside `path` for all processes to fill. On failure it is removed and TrainingError raised."""
    aside = path.with_name(f".{path.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield aside
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # a full disk raises any of these
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingError(f"could not write {path}: {error}; earlier files are untouched") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flush(aside)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def free_space(folder: Path) -> str:
    """Free space on the disk of a folder."""
    return gigabytes(shutil.disk_usage(folder).free)
