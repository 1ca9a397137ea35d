"""Checkpoints and exports that are whole or not there, and resuming from the newest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from unipic_core.errors import CheckpointError, one_line

from ..config.run import ConfigError, RunConfig, parse_run, to_dict
from .state import State


class TrainingError(RuntimeError):
    """A run cannot go on; the message says what to do."""


def newest_checkpoint(output: Path) -> Path | None:
    """Checkpoints are renamed into place when whole; so the newest name is the newest whole one."""
    found = sorted((output / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def resume(
    accelerator: Accelerator, state: State, output: Path, config: RunConfig, allow_change: Sequence[str] = ()
) -> int:
    """Load the newest checkpoint of this output folder, if any; returns the step to go on from."""
    path = newest_checkpoint(output)
    if path is None:
        return 0
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(to_dict(config)))
    changed = [key for key in changed_keys(with_defaults(run["config"]), now) if key not in (*NO_CHANGE, *allow_change)]
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
    try:
        state.load(path, accelerator.process_index)
    except (KeyError, ValueError, RuntimeError) as error:  # other parts, sizes or optimizers: allowed, but impossible
        raise TrainingError(
            f"{path} does not fit what is trained now ({one_line(error)}); choose another output, or take back what "
            f"was changed in {', '.join(allow_change) or 'the model'}"
        ) from error
    accelerator.print(f"resuming {output} at step {run['step']} of {config.steps}")
    return run["step"]


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Config of a checkpoint with the defaults of keys that its version lacked; unchanged if it does not parse."""
    try:
        parsed = json.loads(json.dumps(to_dict(parse_run(values))))
    except ConfigError:
        return values
    return {key: value for key, value in parsed.items() if key in values or not isinstance(value, dict)}


NO_CHANGE = ("output", "log_every", "save_every", "sample_every", "keep_checkpoints", "max_tokens")
"""Config keys that change no number of a run (max_tokens: beyond rounding)."""


def changed_keys(before: Any, now: Any, where: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested tables."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    keys = sorted({*before, *now})
    inner = [changed_keys(before.get(k), now.get(k), f"{where}.{k}" if where else k) for k in keys]
    return [name for names in inner for name in names]


def save(accelerator: Accelerator, state: State, output: Path, step: int, config: RunConfig) -> None:
    """Write a checkpoint aside and rename it; remove the oldest ones."""
    with replaced(accelerator, output / "checkpoints" / f"step-{step:07d}") as folder:
        state.save(folder, accelerator.process_index)
        if accelerator.is_main_process:
            run = {"step": step, "processes": accelerator.num_processes, "config": to_dict(config)}
            (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    if accelerator.is_main_process:
        for old in sorted((output / "checkpoints").glob("step-*"))[: -config.keep_checkpoints]:
            shutil.rmtree(old)


@contextmanager
def replaced(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """A folder beside `path` for all processes to fill, renamed into place at the end: nothing half-written is ever
    found under `path`. TrainingError if it cannot be written."""
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
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
    accelerator.wait_for_everyone()
