"""Checkpoints and exports that are whole or not there, and resuming from the newest."""

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
from .state import State


class TrainingError(RuntimeError):
    """A run cannot go on; the message says what to do."""


def checkpoints(output: Path) -> list[Path]:
    """Folders that a run wrote, the oldest first: other names, links and folders without run.json are not."""
    found = (output / "checkpoints").glob("step-*")
    whole = [p for p in found if NAME.fullmatch(p.name) and not p.is_symlink() and (p / "run.json").is_file()]
    return sorted(whole, key=step_of)


NAME = re.compile("step-([0-9]{7,12})")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_checkpoint(output: Path) -> Path | None:
    """Checkpoints are renamed into place when whole; so the newest name is the newest whole one."""
    found = checkpoints(output)
    return found[-1] if found else None


def unusable(what: str, part: str, where: str, step: int, output: Path) -> TrainingError:
    last = newest_checkpoint(output)
    return TrainingError(
        f"{what} in step {step + 1} ({where}); the last good checkpoint is {last or 'none'}. Lower the learning rate "
        f"of the {part}, or set precision: no, and start again with --allow-config-change for that key: "
        "the run resumes from there"
    )


def resume(
    accelerator: Accelerator, state: State, output: Path, config: RunConfig, allow_change: Sequence[str] = ()
) -> int:
    """Load the newest whole checkpoint of this output folder, if any; returns the step to go on from.

    A damaged one is named, and the one before it is taken. TrainingError if all are damaged.
    """
    if accelerator.is_main_process:
        remove_leftovers(output)
    found = checkpoints(output)
    for path in reversed(found):
        read = read_checkpoint(accelerator, state, path)
        if read is not None:
            run, stored = read
            check_run(accelerator, state, path, run, config, allow_change)
            break
    else:
        if found:
            raise TrainingError(f"all checkpoints in {output} are damaged; restore one, or choose another output")
        return 0
    try:
        state.restore(stored)
    except (KeyError, ValueError, RuntimeError) as error:  # other parts, sizes or optimizers: allowed, but impossible
        raise TrainingError(
            f"{path} does not fit what is trained now ({one_line(error)}); choose another output, or take back what "
            f"was changed in {', '.join(allow_change) or 'the model'}"
        ) from error
    if "order" not in run and run["config"].get("data"):
        accelerator.print(f"note: {path} comes from a version whose batches were of one shape; rows now come anew")
    accelerator.print(f"resuming {output} at step {run['step']} of {config.steps}")
    return run["step"]


def read_checkpoint(accelerator: Accelerator, state: State, path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """run.json and this process's tensors, or None, in every process, if any of them cannot read its part."""
    read, why = None, ""
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if run["step"] != step_of(path) or not isinstance(run["config"], dict):
            raise ValueError(f"run.json is of step {run['step']}")
        if not state.sharded or run["processes"] == accelerator.num_processes:
            read = run, state.read(path, accelerator.process_index)
        else:
            read = run, {}
    except Exception as error:  # any: torch's readers raise many kinds on damaged files
        why = one_line(error) or type(error).__name__
    bad = accelerator.reduce(torch.tensor(float(read is None), device=accelerator.device), "sum")
    if float(bad):
        accelerator.print(f"warning: the checkpoint {path} is damaged ({why or 'in another process'}); not used")
        return None
    return read


def check_run(
    accelerator: Accelerator,
    state: State,
    path: Path,
    run: dict[str, Any],
    config: RunConfig,
    allow_change: Sequence[str],
) -> None:
    """TrainingError if this run cannot go on from there."""
    output, now = path.parent.parent, with_defaults(json.loads(json.dumps(to_dict(config))))
    recorded = with_defaults(run["config"])
    changed = [key for key in changed_keys(recorded, now) if key not in (*NO_CHANGE, *allow_change)]
    if changed:
        raise TrainingError(
            f"{output} was started with other values of {', '.join(changed)}; choose another output, or allow it with "
            f"{' '.join(f'--allow-config-change {key}' for key in changed)}"
        )
    if run["step"] > config.steps:
        raise TrainingError(f"{output} has already trained {run['step']} steps, more than the {config.steps} asked for")
    then, processes = run["processes"], accelerator.num_processes
    if state.sharded and then != processes:
        raise TrainingError(
            f"the networks in {path} are spread over {then} processes, and this run has {processes}; "
            f"start it with {then}"
        )


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the defaults of keys that came later; as it is where keys of it are no longer known."""
    try:
        return json.loads(json.dumps(to_dict(parse_run(config))))
    except ConfigError:
        return config


def remove_leftovers(output: Path) -> None:
    """What a killed run left half-written or half-removed under names of its own."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for path in (output / "checkpoints").glob(pattern):
            if not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


NO_CHANGE = (
    *("output", "log_every", "save_every", "save_minutes", "sample_every", "keep_checkpoints", "max_tokens"),
    *("export", "validation.every", "validation.rows", "validation.draws"),
)
"""Config keys that change no number of a run (max_tokens: beyond rounding)."""


def changed_keys(before: object, now: object, where: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested tables."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
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
    """Write a checkpoint aside and rename it; remove the oldest ones. adapter: writes the student's LoRA into it.

    The LoRA comes first; where the rest does not fit on the disk, it is written once more in a place of its own.
    """
    try:
        write_checkpoint(accelerator, state, output, step, config, adapter)
    except TrainingError as error:
        places = output / "checkpoints"
        text = f"{error}. A checkpoint needs {gigabytes(state.nbytes)}, and {free_space(places)} are free"
        if adapter is not None and accelerator.is_main_process:
            text += rescued(adapter, places / f"lora-of-step-{step:07d}")
        raise TrainingError(text) from error
    if accelerator.is_main_process:
        ours = [path for path in checkpoints(output) if step_of(path) <= step]
        for old in ours[: -config.keep_checkpoints]:
            remove(old)


def rescued(adapter: Callable[[Path], None], folder: Path) -> str:
    """Write the LoRA alone; the end of a sentence that says where it is."""
    try:
        folder.mkdir(exist_ok=True)
        adapter(folder)
    except (OSError, UniPicError):  # not even that has room
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
    """One checkpoint, whole or not at all."""
    with replaced(accelerator, output / "checkpoints" / f"step-{step:07d}") as folder:
        if accelerator.is_main_process and adapter is not None:
            adapter(folder)
        state.save(folder, accelerator.process_index)
        if accelerator.is_main_process:
            run = {"step": step, "processes": accelerator.num_processes, "order": "rows", "config": to_dict(config)}
            (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a folder under another name, so that half of it is never taken for whole."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def flush(folder: Path) -> None:
    """Force the files of a folder to the disk, before a rename says that they are whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a whole file or folder; an older folder goes first, an older file in the same moment."""
    if path.is_dir():
        remove(path)
    os.replace(aside, path)


@contextmanager
def replaced(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """A folder for all processes to fill, renamed to `path` at the end: nothing half-written is ever under that name.

    TrainingError if it cannot be written.
    """
    with unfinished(accelerator, path) as aside:
        yield aside
    if accelerator.is_main_process:
        put_in_place(aside, path)
    accelerator.wait_for_everyone()


@contextmanager
def unfinished(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for all processes to fill. It is removed, and TrainingError raised, on failure."""
    aside = path.with_name(f".{path.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield aside
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # what a full disk becomes
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingError(f"could not write {path}: {error}; what was saved before is untouched") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flush(aside)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def free_space(folder: Path) -> str:
    """Of the disk that a folder is on."""
    return gigabytes(shutil.disk_usage(folder).free)
