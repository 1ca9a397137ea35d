"""Worker processes that draw and encode scenes in chunks of fixed size, so that every run encodes the same batches."""

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

from ...config.run import DataConfig, required
from ...nano.emoji import Bank
from .drawing import EncodedScene, draw_scene, encode_scenes, open_bank

TOGETHER = 16
"""Scenes per VAE batch, fixed because rounding depends on the batch."""

NICENESS = 10
PATIENCE = 900.0
"""Seconds to wait for scenes before a worker counts as dead."""


@dataclass(frozen=True)
class SceneDrawer:
    """VAE and asset bank of a worker. Chunk k holds the scenes k TOGETHER .. (k + 1) TOGETHER - 1."""

    data: DataConfig
    vae: ImageVAE
    bank: Bank

    @classmethod
    def open(cls, data: DataConfig, vae_folder: Path) -> SceneDrawer:
        return cls(data, load_image_vae(vae_folder), open_bank(data.size))

    def draw(self, chunk: int) -> list[EncodedScene]:
        data, options = self.data, required(self.data.scenes)
        numbers = range(chunk * TOGETHER, (chunk + 1) * TOGETHER)
        scenes = [
            draw_scene(self.bank, data.seed, index, data.size, options.mixture, options.shapes) for index in numbers
        ]
        return encode_scenes(self.vae, self.bank, scenes, data.reference_budget)


_scene_drawer: SceneDrawer | None = None
"""Drawer of this worker process, opened when it starts."""


def _start(data: DataConfig, vae_folder: Path) -> None:
    global _scene_drawer
    os.nice(NICENESS)
    torch.set_num_threads(1)
    _scene_drawer = SceneDrawer.open(data, vae_folder)


def _draw(chunk: int) -> list[EncodedScene]:
    assert _scene_drawer is not None  # the pool starts its workers with _start
    return _scene_drawer.draw(chunk)


class SceneWorkers:
    """Pool of `data.workers` processes; with 0, scenes are drawn in this process on request."""

    def __init__(self, data: DataConfig, vae_folder: Path) -> None:
        self.data, self.vae_folder = data, vae_folder
        self.waiting: dict[int, AsyncResult[list[EncodedScene]]] = {}
        self.local_drawer: SceneDrawer | None = None
        self.pool = None
        if data.workers:
            context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads can hang
            self.pool = context.Pool(data.workers, _start, (data, vae_folder))

    def request(self, chunks: range) -> None:
        """Queue these chunks for drawing, unless they are queued already."""
        if self.pool is not None:
            for chunk in chunks:
                if chunk not in self.waiting:
                    self.waiting[chunk] = self.pool.apply_async(_draw, (chunk,))

    def collect(self, chunks: range) -> list[EncodedScene]:
        """Return the scenes of these chunks. Raises UniPicError if a worker has died."""
        if self.pool is None:
            self.local_drawer = self.local_drawer or SceneDrawer.open(self.data, self.vae_folder)
            return [scene for chunk in chunks for scene in self.local_drawer.draw(chunk)]
        self.request(chunks)
        try:
            return [scene for chunk in chunks for scene in self.waiting.pop(chunk).get(PATIENCE)]
        except multiprocessing.TimeoutError:
            raise UniPicError(
                f"expected scenes from the workers within {PATIENCE:.0f} s, got none; the system may have ended "
                "one for lack of memory: lower data.workers or data.scenes.buffer and run the same command again, it "
                "resumes"
            ) from None
