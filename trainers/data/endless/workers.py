"""Worker processes that draw and encode scenes in chunks of fixed size, so that every run encodes the same batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch

from unipic_core.errors import UniPicError
from unipic_core.model.vae import ImageVAE
from unipic_core.weights.vae import load_image_vae

from ...config.run import DataConfig, required
from ...nano.emoji import Bank
from .drawing import EncodedScene, draw_scene, encode_scenes

TOGETHER = 16
"""Scenes per VAE batch, fixed because rounding depends on the batch."""

NICENESS = 10


@dataclass(frozen=True)
class SceneDrawer:
    """VAE and asset bank of a worker. Chunk k holds the scenes k TOGETHER .. (k + 1) TOGETHER - 1."""

    data: DataConfig
    vae: ImageVAE
    bank: Bank

    @classmethod
    def open(cls, data: DataConfig, vae_folder: Path) -> SceneDrawer:
        return cls(data, load_image_vae(vae_folder), Bank.open(size=data.size))

    def draw(self, chunk: int) -> list[EncodedScene]:
        data, options = self.data, required(self.data.scenes)
        numbers = range(chunk * TOGETHER, (chunk + 1) * TOGETHER)
        scenes = [
            draw_scene(self.bank, data.seed, index, data.size, options.mixture, options.shapes) for index in numbers
        ]
        return encode_scenes(self.vae, self.bank, scenes, data.reference_budget)


def _start() -> None:
    """Prepare a worker process. What can fail is left to `_draw`, whose errors reach the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the training saves first
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the training's has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    wait([parent.sentinel])
    os._exit(1)


_scene_drawer: SceneDrawer | None = None
"""Drawer of this worker process, opened for its first chunk."""


def _draw(data: DataConfig, vae_folder: Path, chunk: int) -> list[EncodedScene]:
    global _scene_drawer
    if _scene_drawer is None:
        _scene_drawer = SceneDrawer.open(data, vae_folder)
    return _scene_drawer.draw(chunk)


class SceneWorkers:
    """Pool of `data.workers` processes; with 0, scenes are drawn in this process on request."""

    def __init__(self, data: DataConfig, vae_folder: Path) -> None:
        self.data, self.vae_folder = data, vae_folder
        self.waiting: dict[int, Future[list[EncodedScene]]] = {}
        self.local_drawer: SceneDrawer | None = None
        self.pool = None
        if data.workers:
            context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads can hang
            self.pool = ProcessPoolExecutor(data.workers, context, _start)

    def request(self, chunks: range) -> None:
        """Queue these chunks for drawing, unless they are queued already."""
        if self.pool is not None:
            for chunk in chunks:
                if chunk not in self.waiting:
                    self.waiting[chunk] = self.pool.submit(_draw, self.data, self.vae_folder, chunk)

    def collect(self, chunks: range) -> list[EncodedScene]:
        """Return the scenes of these chunks. Raises UniPicError if a worker has died, and a worker's errors."""
        if self.pool is None:
            self.local_drawer = self.local_drawer or SceneDrawer.open(self.data, self.vae_folder)
            return [scene for chunk in chunks for scene in self.local_drawer.draw(chunk)]
        try:
            self.request(chunks)
            return [scene for chunk in chunks for scene in self.waiting.pop(chunk).result()]
        except BrokenProcessPool:
            raise UniPicError(
                "a process that draws scenes has died, perhaps ended by the system for lack of memory: lower "
                "data.workers or data.scenes.buffer and run the same command again, it resumes"
            ) from None

    def close(self) -> None:
        """Drop what is queued and end the processes."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool, self.waiting = None, {}
