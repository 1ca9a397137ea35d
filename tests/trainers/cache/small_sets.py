"""Small data sets, and what a cache of one holds."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainers.cache import cached_samples
from trainers.config.run import DataConfig
from trainers.data.index import CachedSamples
from unipic_core.conditioning.sequence import TextCond


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_rows(place: Path, count: int) -> Path:
    """JSONL with 0, 1 or 2 references and two shapes of targets."""
    lines = []
    for i in range(count):
        references = [f"images/r{i}_{j}.png" for j in range(i % 3)]
        for j, name in enumerate(references):
            picture(place / name, (64, 64), seed=100 * i + j)
        picture(place / f"images/t{i}.png", (96, 64) if i % 2 else (64, 64), seed=i)
        lines.append({"input_images": references, "instruction": f"row {i}", "output_image": f"images/t{i}.png"})
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "rows.jsonl"


def opened(data: DataConfig, text: str | None = None) -> CachedSamples:
    """The samples of a config with one source."""
    (samples,) = cached_samples(data, text)
    return samples


def rows_of(samples: CachedSamples, shapes: str) -> range:
    """Numbers of the rows with these shapes."""
    bucket = samples.buckets.index(shapes)
    ends = [*map(samples.first_row, samples.buckets), len(samples)]
    return range(ends[bucket], ends[bucket + 1])


def contents(place: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(place).glob("*.safetensors"))}


def embeddings(cond: TextCond) -> list[torch.Tensor]:
    masks = torch.ones(cond.embeds.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    return [e[m] for e, m in zip(cond.embeds, masks, strict=True)]
