"""Encode rows with the VAE into the tensors of a shard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unipic_core.conditioning.images import to_tensor
from unipic_core.model.vae import ImageVAE

from .rows import Row
from .shards import FULL_MASK, text_digest, write_shard

PIXELS_PER_BATCH = 2**20
"""Pictures of one size are encoded together, up to this many pixels."""


class ShardBuilder:
    """Collects the tensors of one latent shard (layout: shards.py) and writes it."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[Tensor]] = defaultdict(list)
        self.prompts: dict[str, list[str]] = defaultdict(list)
        self.masks: dict[str, list[np.ndarray | None]] = defaultdict(list)

    def add(self, vae: ImageVAE, rows: Sequence[Row]) -> None:
        latents = iter(encode_pictures(vae, [p for row in rows for p in (row.target, *row.references)]))
        for row in rows:
            self.prompts[row.shapes].append(row.prompt)
            self.masks[row.shapes].append(row.mask)
            self.tensors[f"{row.shapes}/target"].append(next(latents))
            for j, vision in enumerate(row.vision):
                self.tensors[f"{row.shapes}/reference_{j}"].append(next(latents))
                self.tensors[f"{row.shapes}/vision_{j}"].append(torch.from_numpy(vision.copy()))

    def write(self, path: Path, metadata: Mapping[str, object], more: Mapping[str, Tensor] | None = None) -> None:
        tensors = {name: torch.stack(rows) for name, rows in self.tensors.items()}
        masked = {shapes: sum(mask is not None for mask in masks) for shapes, masks in self.masks.items()}
        tensors |= {f"{shapes}/mask": stacked_masks(self.masks[shapes]) for shapes, count in masked.items() if count}
        vision = {s: [tensors[f"{s}/vision_{j}"] for j in range(s.count("_"))] for s in self.prompts}
        metadata = {"prompts": self.prompts, "text": text_digest(self.prompts, vision), "masks": masked, **metadata}
        write_shard(path, {**tensors, **(more or {})}, metadata)


def stacked_masks(masks: Sequence[np.ndarray | None]) -> Tensor:
    """uint8 [n, h, w]; a row without a mask trains everywhere."""
    shape = next(mask.shape for mask in masks if mask is not None)
    full = np.full(shape, FULL_MASK, dtype=np.uint8)
    return torch.from_numpy(np.stack([full if mask is None else mask for mask in masks]))


@torch.no_grad()
def encode_pictures(vae: ImageVAE, pictures: Sequence[np.ndarray]) -> list[Tensor]:
    """Encode uint8 pictures [H, W, 3] to normalised latents [C, h, w], bfloat16 on the CPU."""
    weight = vae.quant_conv.weight
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        groups[picture.shape].append(i)
    latents: dict[int, Tensor] = {}
    for shape, members in groups.items():
        size = max(PIXELS_PER_BATCH // (shape[0] * shape[1]), 1)
        for at in range(0, len(members), size):
            chunk = members[at : at + size]
            batch = torch.stack([to_tensor(Image.fromarray(pictures[i])) for i in chunk]).to(weight)
            encoded = vae.encode(batch)[:, :, 0]
            latents.update(zip(chunk, encoded.bfloat16().cpu().contiguous(), strict=True))
    return [latents[i] for i in range(len(pictures))]
