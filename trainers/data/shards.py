"""Cache files and their headers; rows are read through the index (index.py).

A shard of latents holds samples in buckets of equal shapes, under names like `128x128_64x64/target` (target first, then
the references, width x height): `target` [n, C, h, w]; per reference j `reference_j` [n, C, h, w] (normalised latents,
bfloat16) and optionally `vision_j` [n, H, W, 3] (uint8, the vision encoder's input); if any of the rows has a mask,
`mask` [n, h / 2, w / 2] (uint8, the share of each token that trains, FULL_MASK = all). Metadata (JSON): `prompts`
(bucket -> n texts), `text` (digest of prompts and pictures), `rows` (digest of the source rows), `skipped` (rows that
could not be decoded), `masks` (bucket -> number of rows with a mask).

Each encoder has its own text shard beside it, `text-FINGERPRINT-...`: `embeds` [sum of lengths, D], the conditional
embeddings, sample after sample, and `uncond` [n, T, D], the tail of the embeddings of the prompt " ". The encoder is
causal and the pictures come first, so the first `shared` tokens are equal in both and stored once. Metadata: `of` (the
latent shard's `text`), `lengths`, `shared`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unipic_core.conditioning.sequence import TextCond
from unipic_core.errors import CheckpointError
from unipic_core.weights.formats.safetensors_file import read_safetensors
from unipic_core.weights.formats.tensor_spec import Table
from unipic_core.weights.write import write_safetensors

FULL_MASK = 255
"""Value of a stored mask for a token that trains with its whole area."""


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def text_path(latents: Path, fingerprint: str) -> Path:
    """Path of one encoder's embeddings for a latent shard or a preview file."""
    return latents.with_name(f"text-{fingerprint}-{latents.name.removeprefix('shard-')}")


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a temporary file and rename it; metadata values are stored as JSON. Raises CheckpointError (full disk)."""
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(path, specs, tensors.items(), {k: json.dumps(v) for k, v in metadata.items()})


def stamp_of(path: Path | int) -> tuple[int, int]:
    """(size, time in ns) of a file or of an open one's descriptor, which tell a file that was replaced."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class MappedTensors:
    """Tensors of a file as views of a memory map: pages are read on access and can be evicted by the system.

    A file that is replaced while mapped keeps its old contents here. No file handle stays open.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self.table = table
        self.area = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        spec = self.table[name]
        if spec.offset % spec.dtype.itemsize:  # unaligned: files of other programs
            return spec.read()
        return self.area[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)


class Shard:
    """Latent shard, opened by its header. Raises CheckpointError if the file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path, self._stamp = path, stamp_of(path)
        self.table: Table
        self.table, texts = read_safetensors(path)
        self.metadata: dict[str, Any] = {name: json.loads(text) for name, text in texts.items()}
        self.prompts: dict[str, list[str]] = self.metadata["prompts"]

    @cached_property
    def tensors(self) -> MappedTensors:
        """Raises CheckpointError if the file is not the one whose header was read."""
        tensors = MappedTensors(self.path, self.table)
        if stamp_of(self.path) != self._stamp:
            raise CheckpointError(
                f"{self.path} was replaced while it was read, as by another run on the same part of the cache; wait "
                "until that is done and run the same command again"
            )
        return tensors

    def pictures(self, shapes: str, kind: str) -> tuple[Tensor, ...]:
        """The `reference` or `vision` tensors of a bucket (`kind`), in order."""
        return tuple(self.tensors[f"{shapes}/{kind}_{j}"] for j in range(shapes.count("_")))

    @property
    def has_vision(self) -> bool:
        return all(f"{s}/vision_{j}" in self.table for s in self.prompts for j in range(s.count("_")))

    @cached_property
    def text_digest(self) -> str:
        """Digest of the text encoder's input; computed from the pictures for shards that do not store it."""
        if "text" in self.metadata:
            return self.metadata["text"]
        return text_digest(self.prompts, {s: self.pictures(s, "vision") for s in self.prompts})


def drop_vision(path: Path) -> None:
    """Rewrite a latent shard without vision pictures, if it has any."""
    shard = Shard(path)
    others = {name: shard.tensors[name] for name in shard.table if "/vision_" not in name}
    if len(others) < len(shard.table):
        write_shard(path, others, {**shard.metadata, "text": shard.text_digest})


def text_digest(prompts: Mapping[str, Sequence[str]], vision: Mapping[str, Sequence[Tensor]]) -> str:
    digest = hashlib.sha256()
    for shapes in sorted(prompts):
        digest.update(json.dumps([shapes, list(prompts[shapes])]).encode())
        for pictures in vision[shapes]:
            digest.update(pictures.contiguous().numpy().data)
    return digest.hexdigest()[:16]


class TextShard:
    """Text shard, opened by its header. Raises CheckpointError if the file is damaged."""

    def __init__(self, path: Path) -> None:
        table, texts = read_safetensors(path)
        self.path, self.table = path, table
        self.latents_digest: str = json.loads(texts["of"])
        self.lengths: dict[str, list[int]] = json.loads(texts["lengths"])
        self.shared: dict[str, int] = json.loads(texts["shared"])


def has_text(shard: Shard, fingerprint: str) -> bool:
    """True if this encoder's embeddings of exactly these prompts and pictures exist."""
    path = text_path(shard.path, fingerprint)
    return path.exists() and TextShard(path).latents_digest == shard.text_digest


@dataclass(frozen=True)
class Rows:
    """n samples of equal shapes, in memory.

    target: float32 [n, C, h, w]; references: float32 [n, C, h, w] each; vision: uint8 [n, H, W, 3] per reference, ()
    if the cache stores none; cond, uncond: the frozen encoder's float32 embeddings of the prompt and of " ", or None;
    mask: float32 [n, h / 2, w / 2], the share of each target token that trains, or None: all of each.
    """

    target: Tensor
    references: tuple[Tensor, ...]
    vision: tuple[Tensor, ...]
    prompts: tuple[str, ...]
    cond: TextCond | None = None
    uncond: TextCond | None = None
    mask: Tensor | None = None
