"""Batches of endless scenes, a pure function of (seed, step): resumed and uninterrupted runs see the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config.run import ConfigError, DataConfig, required
from ...nano.open_scenes.drawing import ANY_TASK, any_reworded
from ...nano.scene import Scene
from .drawing import SHAPE_GROUP, EncodedScene
from .workers import TOGETHER, SceneWorkers

WORDS_SALT, ORDER_SALT = 104729, 1299709


def check_scenes(data: DataConfig, batch_size: int) -> None:
    """Raise ConfigError for tasks that do not exist and for a buffer that cannot be cut into batches."""
    options = required(data.scenes)
    if unknown := [task for task in options.mixture if task not in ANY_TASK]:
        raise ConfigError(f"data.scenes.mixture: expected tasks of {', '.join(ANY_TASK)}, got {unknown[0]}")
    if options.buffer % batch_size or options.buffer % TOGETHER:
        raise ConfigError(
            f"data.scenes.buffer: expected a multiple of batch_size ({batch_size}) and of {TOGETHER}, "
            f"got {options.buffer}"
        )
    if options.shapes and (SHAPE_GROUP % batch_size or options.buffer % SHAPE_GROUP):
        raise ConfigError(
            f"data.scenes.shapes needs a batch_size that divides {SHAPE_GROUP} and a buffer that is a multiple of "
            f"it, since a batch has one shape; got batch_size {batch_size}, buffer {options.buffer}"
        )


@dataclass(frozen=True)
class SceneUse:
    """One sample: an encoded scene, and the scene with the reference order and wording of this use."""

    index: int
    encoded: EncodedScene
    scene: Scene

    @property
    def places(self) -> tuple[int, ...]:
        """Source index of each reference."""
        return self.scene.order or (0,)


class SceneStream:
    """Batches of scenes, drawn in rounds of `buffer` scenes; each round is used for `uses` passes.

    In each pass the round is sorted by image token count (ties in random order), cut into batches, and the batches are
    shuffled: they need hardly any padding and hold no scene twice. The next round is drawn while one is in use; no more
    than these two are in memory.
    """

    def __init__(self, data: DataConfig, batch_size: int, seed: int, vae_folder: Path) -> None:
        check_scenes(data, batch_size)
        options = required(data.scenes)
        self.buffer, self.uses, self.batch_size, self.seed = options.buffer, options.uses, batch_size, seed
        self.data = data
        self.workers = SceneWorkers(data, vae_folder)
        self.round_number = -1
        self.round: list[EncodedScene] = []

    def __getitem__(self, index: int) -> list[SceneUse]:
        """Return batch `index`."""
        per_pass = self.buffer // self.batch_size
        number, within = divmod(index, self.uses * per_pass)
        use, batch = divmod(within, per_pass)
        self._load(number)
        return [self._use(i, use) for i in self._order(use)[batch]]

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def _load(self, number: int) -> None:
        if number != self.round_number:
            self.round = self.workers.collect(self._chunks(number))
            self.round_number = number
            self.workers.request(self._chunks(number + 1))

    def _chunks(self, number: int) -> range:
        per_round = self.buffer // TOGETHER
        return range(number * per_round, (number + 1) * per_round)

    def _order(self, use: int) -> np.ndarray:
        """Scene indices of the round, batch by batch: [batches, batch_size]; the scenes of a batch have one shape."""
        rng = np.random.default_rng([ORDER_SALT, self.seed, self.round_number, use])
        tokens = np.array([scene.num_tokens for scene in self.round])
        high, wide = np.array([scene.target.shape[-2:] for scene in self.round]).T
        shuffled = rng.permutation(self.buffer)
        order = shuffled[np.lexsort((tokens[shuffled], high[shuffled], wide[shuffled]))].reshape(-1, self.batch_size)
        return rng.permutation(order)

    def _use(self, i: int, use: int) -> SceneUse:
        index = self.round_number * self.buffer + int(i)
        rng = np.random.default_rng([WORDS_SALT, self.data.seed, index, use])
        encoded = self.round[i]
        return SceneUse(index, encoded, any_reworded(encoded.scene, rng))
