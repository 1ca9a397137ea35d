"""Runs of several stages, one after the other, each from the last checkpoint of the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config.run import RunConfig
from .checkpointing import newest_checkpoint, step_of
from .loop import train
from .method import Method


def train_stages(
    config: RunConfig,
    make_method: Callable[[RunConfig], Method],
    allow_change: Sequence[str] = (),
    announce: Callable[[RunConfig], None] = lambda stage: None,
    check: Callable[[RunConfig], None] = lambda stage: None,
) -> Path:
    """Start or resume where the last checkpoint stands, between stages or within one; returns the export folder.

    Stages that are done are not opened again. announce: called at the start of each of the others. check: called with
    all of them before the first starts, so that none fails days later.
    """
    before: Path | None = None
    export = Path(config.output) / "export"
    for stage in filter(is_due, config.stages):
        check(stage)
    for stage in config.stages:
        last = stage is config.stages[-1]
        if last or is_due(stage):
            announce(stage)
            train(stage, make_method(stage), allow_change, before, export, exports=last)
        before = newest_checkpoint(Path(stage.output))
    return export


def is_due(stage: RunConfig) -> bool:
    """True if steps of the stage are left."""
    newest = newest_checkpoint(Path(stage.output))
    return newest is None or step_of(newest) < stage.steps
