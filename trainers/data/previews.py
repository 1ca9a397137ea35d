"""The samples of the preview grid, encoded once like the training samples, with what the grid shows of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from .checking import Checked
from .encoding import Encoded
from .rows import BadRow, Row, check_prompt, make_row
from .shards import Bucket, Rows, Shard, TextShard, has_text, parts_of, text_path
from .sources import Compositions

NANO_PREVIEWS: tuple[tuple[Split, int], ...] = (("train", 3), ("heldout", 4))
"""Split and seed of the composition set's previews: one half each."""


@dataclass(frozen=True)
class PreviewRow:
    """One column of the grid. rows: the sample, alone; shape: of its target in tokens.

    references: all of them in one square; truth: the target as the data have it, blank for the user's own samples.
    """

    rows: Rows
    shape: LatentShape
    references: Image.Image
    truth: Image.Image


def preview_path(data: DataConfig, preview: PreviewConfig, record: dict[str, Any] | None) -> Path:
    """The file's name says what is shown and how the set was encoded (the record of its folder)."""
    wanted: list[Any] = [asdict(sample) for sample in preview.own] or [data.kind, preview.samples]
    text = json.dumps([wanted, data.size, data.reference_budget, record], sort_keys=True)
    return Path(data.folder) / f"preview-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def preview_rows(data: DataConfig, preview: PreviewConfig | None, checked: Checked) -> list[Row]:
    """The samples before encoding; ConfigError for a picture or prompt of the user's own that cannot be used."""
    if preview is None:
        return []
    source = checked.source
    if preview.own:
        return [_own_row(data, sample.images, sample.prompt) for sample in preview.own]
    if isinstance(source, Compositions):
        return [
            scenes[i]
            for k, (split, seed) in enumerate(NANO_PREVIEWS)
            for scenes in [Compositions(data, 0, (preview.samples + 1 - k) // 2, split, seed, source.bank)]
            for i in range(len(scenes))
        ]
    return list(islice(_good_rows(checked), preview.samples))


def _good_rows(checked: Checked) -> Iterator[Row]:
    for i in range(len(checked.source)):
        if i not in checked.bad:
            with suppress(BadRow):  # the report will say so
                yield checked.source[i]


def _own_row(data: DataConfig, images: tuple[str, ...], prompt: str) -> Row:
    try:
        check_prompt(prompt, len(images))
        pictures = [load_image(path) for path in images]
        size = output_size(pictures[0].size if pictures else None, data.size)
        return make_row(Image.new("RGB", size, "white"), pictures, prompt, data.reference_budget)
    except UniPicError as error:
        raise ConfigError(f"preview.own, {prompt[:40]!r}: {error}") from None


def write_preview(path: Path, vae: ImageVAE, rows: Sequence[Row]) -> None:
    """Encode the samples of the grid, unless they are there."""
    digest = digest_of(rows)
    if path.exists() and Shard(path).metadata["rows"] == digest:
        return
    made = Encoded()
    made.add(vae, rows)
    made.write(path, {"rows": digest, "order": order_of(rows)}, truths_of(rows))


def digest_of(rows: Sequence[Row]) -> str:
    """Of the pictures and prompts themselves, so that changed ones are noticed under the same names."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.shapes, row.prompt]).encode())
        for picture in (row.target, *row.vision):
            digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()[:16]


def read_preview_file(path: Path, text: str | None) -> list[PreviewRow]:
    """In the order in which they were asked for."""
    shard = Shard(path)
    if text is not None and not has_text(shard, text):
        raise ConfigError(f"{path} has no text embeddings by this encoder; run python -m trainers.cache again")
    embeddings = TextShard(text_path(path, text)) if text is not None else None
    buckets = {shapes: Bucket([part]) for shapes, part in parts_of(shard, embeddings, vision=True)}
    made = []
    for shapes, i in shard.metadata["order"]:
        rows = buckets[shapes].take([i])
        truth = Image.fromarray(shard.tensors[f"{shapes}/truth"][i].numpy().copy())
        shape = LatentShape.of_latents(rows.target)
        references = [v[0].numpy() for v in rows.vision]
        made.append(PreviewRow(rows, shape, strip(references, max(truth.size)), truth))
    return made


@torch.no_grad()
def decoded(vae: ImageVAE, latents: Tensor) -> Image.Image:
    """The picture of normalised latents [1, C, 1, h, w]."""
    return to_images(vae.decode(latents.to(vae.quant_conv.weight)).float().cpu())[0]


def decoded_row(vae: ImageVAE, rows: Rows) -> PreviewRow:
    """A column for one cached sample, whose pictures come from its latents."""
    truth = decoded(vae, rows.target[:, :, None])
    references = [np.asarray(decoded(vae, latents[:, :, None])) for latents in rows.references]
    return PreviewRow(rows, LatentShape.of_latents(rows.target), strip(references, max(truth.size)), truth)


def strip(pictures: list[np.ndarray], side: int) -> Image.Image:
    """All references of a sample in one square cell, each as large as it fits."""
    columns = 1 if len(pictures) <= 1 else 2 if len(pictures) <= 4 else 3
    cell = side // columns
    sheet = Image.new("RGB", (side, side), "white")
    for i, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        scale = cell / max(image.size)
        image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
        sheet.paste(image, (i % columns * cell, i // columns * cell))
    return sheet


def order_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(bucket, index in it) of every row, as encoding groups them."""
    seen: dict[str, int] = {}
    order = []
    for row in rows:
        order.append((row.shapes, seen.get(row.shapes, 0)))
        seen[row.shapes] = order[-1][1] + 1
    return order


def truths_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """`{shapes}/truth` [n, H, W, 3] uint8."""
    groups: dict[str, list[np.ndarray]] = {}
    for row in rows:
        groups.setdefault(row.shapes, []).append(row.target)
    return {f"{shapes}/truth": torch.from_numpy(np.stack(targets)) for shapes, targets in groups.items()}
