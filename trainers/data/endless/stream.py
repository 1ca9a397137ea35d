"""Batches of endless scenes: a pure function of (seed, step), so that a resumed run sees what an unbroken one sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config.run import ConfigError, DataConfig, given
from ...nano.open_scenes.drawing import any_reworded
from ...nano.scene import Scene
from .drawing import SHAPE_GROUP, EncodedScene
from .workers import TOGETHER, Drawers

WORDS_SALT, ORDER_SALT = 104729, 1299709


@dataclass(frozen=True)
class Use:
    """One sample: an encoded scene, and the scene with the order of the references and the words of this use."""

    index: int
    encoded: EncodedScene
    scene: Scene

    @property
    def places(self) -> tuple[int, ...]:
        """The source that each reference shows."""
        return self.scene.order or (0,)


class SceneStream:
    """Batch after batch. The scenes come in rounds of `buffer`; a round is passed through `uses` times.

    In each pass the round is sorted by the number of image tokens (in a new order where they are equal), cut into
    batches, and these are shuffled: batches need hardly any padding, and hold no scene twice. While one round is used,
    the next is drawn; no more are in memory.
    """

    def __init__(self, data: DataConfig, batch_size: int, seed: int, vae_folder: Path) -> None:
        options = given(data.scenes)
        self.buffer, self.uses, self.batch_size, self.seed = options.buffer, options.uses, batch_size, seed
        if self.buffer % batch_size or self.buffer % TOGETHER:
            raise ConfigError(
                f"data.scenes.buffer must be a multiple of batch_size ({batch_size}) and of {TOGETHER}, "
                f"got {self.buffer}"
            )
        if options.shapes and (SHAPE_GROUP % batch_size or self.buffer % SHAPE_GROUP):
            raise ConfigError(
                f"data.scenes.shapes needs a batch_size that divides {SHAPE_GROUP} and a buffer that is a multiple of "
                f"it, since a batch has one shape; got batch_size {batch_size}, buffer {self.buffer}"
            )
        self.data = data
        self.drawers = Drawers(data, vae_folder)
        self.number = -1
        self.round: list[EncodedScene] = []

    def __getitem__(self, index: int) -> list[Use]:
        """Batch `index`."""
        per_pass = self.buffer // self.batch_size
        number, within = divmod(index, self.uses * per_pass)
        use, batch = divmod(within, per_pass)
        self._load(number)
        return [self._use(i, use) for i in self._order(use)[batch]]

    def _load(self, number: int) -> None:
        if number != self.number:
            self.round = self.drawers.take(self._chunks(number))
            self.number = number
            self.drawers.ask(self._chunks(number + 1))

    def _chunks(self, number: int) -> range:
        per_round = self.buffer // TOGETHER
        return range(number * per_round, (number + 1) * per_round)

    def _order(self, use: int) -> np.ndarray:
        """[batches, batch_size]: scenes of the round, batch by batch; those of a batch have one shape."""
        rng = np.random.default_rng([ORDER_SALT, self.seed, self.number, use])
        tokens = np.array([scene.num_tokens for scene in self.round])
        high, wide = np.array([scene.target.shape[-2:] for scene in self.round]).T
        mixed = rng.permutation(self.buffer)
        order = mixed[np.lexsort((tokens[mixed], high[mixed], wide[mixed]))].reshape(-1, self.batch_size)
        return rng.permutation(order)

    def _use(self, i: int, use: int) -> Use:
        index = self.number * self.buffer + int(i)
        rng = np.random.default_rng([WORDS_SALT, self.data.seed, index, use])
        encoded = self.round[i]
        return Use(index, encoded, any_reworded(encoded.scene, rng))
