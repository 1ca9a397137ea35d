"""Worker processes that draw and encode scenes, a fixed number at a time so that every run encodes the same batches."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch

from unipic_core.errors import UniPicError
from unipic_core.model.vae import ImageVAE
from unipic_core.weights.vae import load_image_vae

from ...config.run import DataConfig, given
from ...nano.emoji import Bank
from .drawing import EncodedScene, draw_scene, encode_scenes, open_bank

TOGETHER = 16
"""Scenes that go through the VAE together: rounding depends on the batch."""

NICENESS = 10
PATIENCE = 900.0
"""Seconds to wait for scenes before a worker is taken for dead."""


@dataclass(frozen=True)
class Drawer:
    """A worker's models. Chunk k holds the scenes k TOGETHER .. (k + 1) TOGETHER - 1."""

    data: DataConfig
    vae: ImageVAE
    bank: Bank

    @classmethod
    def open(cls, data: DataConfig, vae_folder: Path) -> Drawer:
        return cls(data, load_image_vae(vae_folder), open_bank(data.size))

    def draw(self, chunk: int) -> list[EncodedScene]:
        data, options = self.data, given(self.data.scenes)
        numbers = range(chunk * TOGETHER, (chunk + 1) * TOGETHER)
        scenes = [
            draw_scene(self.bank, data.seed, index, data.size, options.mixture, options.shapes) for index in numbers
        ]
        return encode_scenes(self.vae, self.bank, scenes, data.reference_budget)


_drawer: Drawer | None = None
"""Of a worker process, opened when it starts."""


def _start(data: DataConfig, vae_folder: Path) -> None:
    global _drawer
    os.nice(NICENESS)
    torch.set_num_threads(1)
    _drawer = Drawer.open(data, vae_folder)


def _draw(chunk: int) -> list[EncodedScene]:
    assert _drawer is not None  # the pool starts its workers with _start
    return _drawer.draw(chunk)


class Drawers:
    """`data.workers` processes; 0: scenes are drawn in this one when they are asked for."""

    def __init__(self, data: DataConfig, vae_folder: Path) -> None:
        self.data, self.vae_folder = data, vae_folder
        self.waiting: dict[int, AsyncResult[list[EncodedScene]]] = {}
        self.here: Drawer | None = None
        self.pool = None
        if data.workers:
            context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads can hang
            self.pool = context.Pool(data.workers, _start, (data, vae_folder))

    def ask(self, chunks: range) -> None:
        """Have these chunks drawn in the background, unless they are already."""
        if self.pool is not None:
            for chunk in chunks:
                if chunk not in self.waiting:
                    self.waiting[chunk] = self.pool.apply_async(_draw, (chunk,))

    def take(self, chunks: range) -> list[EncodedScene]:
        """The scenes of these chunks; UniPicError if a worker has died."""
        if self.pool is None:
            self.here = self.here or Drawer.open(self.data, self.vae_folder)
            return [scene for chunk in chunks for scene in self.here.draw(chunk)]
        self.ask(chunks)
        try:
            return [scene for chunk in chunks for scene in self.waiting.pop(chunk).get(PATIENCE)]
        except multiprocessing.TimeoutError:
            raise UniPicError(
                f"no scene came from the workers in {PATIENCE:.0f} s; the system may have ended one for want "
                "of memory: lower data.workers or data.scenes.buffer and start the run again, it resumes"
            ) from None
