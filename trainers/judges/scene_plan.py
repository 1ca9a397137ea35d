"""Scenes of an evaluation, and the noise seeds of their pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tqdm import tqdm

from unipic_core.conditioning.reference_sizes import REFERENCE_MULTIPLE

from ..nano.catalogue import Split
from ..nano.emoji import Bank
from ..nano.open_scenes.answers import OPEN_TASKS
from ..nano.open_scenes.drawing import make_open_scene
from ..nano.scene import SQUARE, Scene, Shape
from ..nano.scenes import TASKS, make_scene, shaped

SEED_STRIDE = 1_000_000  # distance of the noise seeds of one scene, more than the number of scenes


@dataclass(frozen=True)
class Plan:
    """Scenes of an evaluation: ``n`` scenes of a seed and split, of the given tasks in turn or the default mixture.

    ``open``: scenes whose words leave something open, with judges of their own.
    Each system makes ``seeds_per_scene`` pictures of a scene. The judges see the first; all of them give the spread.
    ``size``: side in pixels of the targets and of the longer side of their references; of targets of another ``shape``
    (width and height as a ratio) the side of the square of about as many pixels.
    """

    n: int
    seed: int = 0
    split: Split = "heldout"
    tasks: tuple[str, ...] = ()
    progress: bool = True
    seeds_per_scene: int = 1
    size: int = 128
    open: bool = False
    shape: Shape = SQUARE

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % REFERENCE_MULTIPLE:
            raise ValueError(f"size must be a multiple of {REFERENCE_MULTIPLE}, at least 64, got {self.size}")
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for an interval, got {self.n}")
        if self.seeds_per_scene < 1:
            raise ValueError(f"seeds_per_scene must be at least 1, got {self.seeds_per_scene}")
        known = OPEN_TASKS if self.open else TASKS
        unknown = [task for task in self.tasks if task not in known]
        if unknown:
            raise ValueError(f"task must be one of {', '.join(known)}, got {unknown[0]!r}")

    def scene(self, bank: Bank, index: int) -> Scene:
        """Scene ``index``; the same whatever ``n`` is."""
        task = self.tasks[index % len(self.tasks)] if self.tasks else None
        make = make_open_scene if self.open else make_scene
        return shaped(make(bank, self.split, self.seed, index, task=task, size=self.size), self.shape)

    def noise_seeds(self, index: int) -> list[int]:
        """Noise seeds of scene ``index``; the first does not depend on their number."""
        return [self.seed + index + SEED_STRIDE * which for which in range(self.seeds_per_scene)]

    def bar(self, title: str) -> tqdm[int]:
        """Progress bar over the scenes."""
        pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between updates: few lines in a log
        return tqdm(range(self.n), title, unit="scene", mininterval=pause, disable=not self.progress)
