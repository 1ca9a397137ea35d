"""Preview grid samples: encoded once, like training samples, together with the pictures that the grid shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unipic_core.conditioning.images import load_image, output_size, to_images
from unipic_core.conditioning.sequence import LatentShape
from unipic_core.errors import UniPicError
from unipic_core.model.vae import ImageVAE

from ..config.run import ConfigError, DataConfig, PreviewConfig
from ..nano.catalogue import Split
from .checking import CheckedSource
from .encoding import ShardBuilder
from .index import CachedSamples, build_index
from .rows import BadRow, Row, check_prompt, make_row
from .shards import Rows, Shard
from .sources import Compositions

NANO_PREVIEWS: tuple[tuple[Split, int], ...] = (("train", 3), ("heldout", 4))
"""Split and seed of the composition set's previews; each gives half of them."""


@dataclass(frozen=True)
class PreviewRow:
    """One column of the grid. rows: the sample as a batch of one; shape: of its target in tokens.

    references: all reference pictures in one square; truth: the target picture, blank for preview.own samples.
    """

    rows: Rows
    shape: LatentShape
    references: Image.Image
    truth: Image.Image


def preview_path(data: DataConfig, preview: PreviewConfig, record: dict[str, object] | None) -> Path:
    """Path of the encoded preview samples; its digest covers the selection and the cache's set.json (`record`)."""
    selection: list[Any] = [asdict(sample) for sample in preview.own] or [data.kind, preview.samples]
    text = json.dumps([selection, data.size, data.reference_budget, record], sort_keys=True)
    return Path(data.folder) / f"preview-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def preview_rows(data: DataConfig, preview: PreviewConfig | None, checked: CheckedSource) -> list[Row]:
    """Read the samples before encoding. Raises ConfigError for an unusable picture or prompt of preview.own."""
    if preview is None:
        return []
    source = checked.source
    if preview.own:
        return [_user_row(data, sample.images, sample.prompt) for sample in preview.own]
    if isinstance(source, Compositions):
        return [
            scenes[i]
            for k, (split, seed) in enumerate(NANO_PREVIEWS)
            for scenes in [Compositions(data, 0, (preview.samples + 1 - k) // 2, split, seed, source.bank)]
            for i in range(len(scenes))
        ]
    return list(islice(_good_rows(checked), preview.samples))


def _good_rows(checked: CheckedSource) -> Iterator[Row]:
    for i in range(len(checked.source)):
        if i not in checked.bad:
            with suppress(BadRow):  # listed in the report
                yield checked.source[i]


def _user_row(data: DataConfig, images: tuple[str, ...], prompt: str) -> Row:
    try:
        check_prompt(prompt, len(images))
        pictures = [load_image(path) for path in images]
        size = output_size(pictures[0].size if pictures else None, data.size)
        return make_row(Image.new("RGB", size, "white"), pictures, prompt, data.reference_budget)
    except UniPicError as error:
        raise ConfigError(f"preview.own, {prompt[:40]!r}: {error}") from None


def write_preview(path: Path, vae: ImageVAE, rows: Sequence[Row]) -> None:
    """Encode the samples of the grid unless the file already holds them."""
    digest = rows_digest(rows)
    if path.exists() and Shard(path).metadata["rows"] == digest:
        return
    shard = ShardBuilder()
    shard.add(vae, rows)
    shard.write(path, {"rows": digest, "order": bucket_positions(rows)}, truth_tensors(rows))


def rows_digest(rows: Sequence[Row]) -> str:
    """Digest of pixels and prompts, so that edited files are noticed under unchanged names."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.shapes, row.prompt]).encode())
        for picture in (row.target, *row.vision):
            digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()[:16]


def read_preview_file(path: Path, text: str | None) -> list[PreviewRow]:
    """Read the samples of the grid in their configured order. text: encoder fingerprint, or None for no embeddings."""
    shard, samples = Shard(path), CachedSamples([path], text, *build_index([path], text))
    columns = []
    for shapes, i in shard.metadata["order"]:
        rows = samples.take(samples.first_row(shapes) + i)
        truth = Image.fromarray(shard.tensors[f"{shapes}/truth"][i].numpy().copy())
        vision = tuple(pictures[i : i + 1] for pictures in shard.pictures(shapes, "vision"))
        cell = reference_cell([picture[0].numpy() for picture in vision], max(truth.size))
        columns.append(PreviewRow(replace(rows, vision=vision), LatentShape.of_latents(rows.target), cell, truth))
    return columns


@torch.no_grad()
def decode_latents(vae: ImageVAE, latents: Tensor) -> Image.Image:
    """Decode normalised latents [1, C, 1, h, w] to a picture."""
    return to_images(vae.decode(latents.to(vae.quant_conv.weight)).float().cpu())[0]


def row_from_latents(vae: ImageVAE, rows: Rows) -> PreviewRow:
    """Make the grid column of a cached sample by decoding its latents."""
    truth = decode_latents(vae, rows.target[:, :, None])
    references = [np.asarray(decode_latents(vae, latents[:, :, None])) for latents in rows.references]
    return PreviewRow(rows, LatentShape.of_latents(rows.target), reference_cell(references, max(truth.size)), truth)


def reference_cell(pictures: list[np.ndarray], side: int) -> Image.Image:
    """Arrange the references of a sample in one square cell, each as large as fits."""
    columns = 1 if len(pictures) <= 1 else 2 if len(pictures) <= 4 else 3
    cell = side // columns
    sheet = Image.new("RGB", (side, side), "white")
    for i, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        scale = cell / max(image.size)
        image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
        sheet.paste(image, (i % columns * cell, i // columns * cell))
    return sheet


def bucket_positions(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """List (bucket, index in the bucket) of every row, in the grouping that ShardBuilder uses."""
    counts: dict[str, int] = {}
    positions = []
    for row in rows:
        positions.append((row.shapes, counts.get(row.shapes, 0)))
        counts[row.shapes] = positions[-1][1] + 1
    return positions


def truth_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Stack the target pictures per bucket: `{shapes}/truth`, uint8 [n, H, W, 3]."""
    groups: dict[str, list[np.ndarray]] = {}
    for row in rows:
        groups.setdefault(row.shapes, []).append(row.target)
    return {f"{shapes}/truth": torch.from_numpy(np.stack(targets)) for shapes, targets in groups.items()}
