"""`python -m trainers.cache CONFIG`: encode a composition set once, so that no VAE and no renderer runs while training.

A shard holds `samples_per_shard` samples, grouped into buckets of equal shapes; it is written aside and renamed, and a
shard that exists is not made again. Tensors of a bucket: `target` [n, C, h, w]; per reference j `reference_j`
[n, C, h, w] (both normalised latents, bfloat16) and `vision_j` [n, H, W, 3] (uint8, what the vision encoder sees).
Prompts are in the metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unipic_core.image_vae import ImageVAE, VAEConfig, channels_last, image_weights
from unipic_core.images import resize_for_vision, resize_references, to_tensor
from unipic_core.sequence import PATCH

from .config import CacheConfig, ConfigError, RunConfig, load_config
from .data.catalogue import Split
from .data.emoji import Bank
from .data.render import render
from .data.scenes import make_scene

ENCODE_BATCH = 32


@dataclass(frozen=True)
class Bucket:
    """Samples of equal shapes. target [n, C, h, w]; references, vision: one tensor per reference; prompts: n texts."""

    target: Tensor
    references: tuple[Tensor, ...]
    vision: tuple[Tensor, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_target_tokens(self) -> int:
        return self.target.shape[-2] * self.target.shape[-1] // PATCH**2


@dataclass(frozen=True)
class Row:
    """One sample before encoding: pictures as uint8 arrays [H, W, 3]."""

    target: np.ndarray
    references: tuple[np.ndarray, ...]
    vision: tuple[np.ndarray, ...]
    prompt: str

    @property
    def shapes(self) -> str:
        sizes = [self.target.shape, *(r.shape for r in self.references)]
        return "_".join(f"{s[1]}x{s[0]}" for s in sizes)


class Compositions(Dataset):
    """Rows of the composition set, each a function of (seed, index) alone."""

    def __init__(
        self, data: CacheConfig, start: int, stop: int, split: Split = "train", seed: int | None = None
    ) -> None:
        self.data, self.start, self.stop, self.split = data, start, stop, split
        self.seed = data.seed if seed is None else seed
        self.bank = Bank.open()

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Row:
        scene = make_scene(self.bank, self.split, self.seed, self.start + i, size=self.data.size)
        sample = render(self.bank, scene)
        references = resize_references(list(sample.references), self.data.reference_budget)
        return Row(
            np.asarray(sample.target),
            tuple(np.asarray(r) for r in references),
            tuple(np.asarray(resize_for_vision(r)) for r in references),
            sample.instruction,
        )


def load_image_vae(folder: Path, dtype: torch.dtype = torch.float32) -> ImageVAE:
    """The 2-D form of a diffusers `vae/` folder."""
    vae = ImageVAE(VAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({k: w.float() for k, w in image_weights(weights).items()})
    return channels_last(vae.eval().to(dtype))


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def build(data: CacheConfig, vae: ImageVAE) -> None:
    """Write every shard that is missing."""
    folder = Path(data.folder)
    folder.mkdir(parents=True, exist_ok=True)
    bank = Bank.open()
    print(bank.note)
    check_same_set(folder, data, fingerprint(vae), len(bank.by_key))
    missing = [i for i in range(data.shards) if not shard_path(folder, i).exists()]
    with tqdm(total=len(missing) * data.samples_per_shard, unit=" samples") as bar:
        for index in missing:
            start = index * data.samples_per_shard
            rows = Compositions(data, start, start + data.samples_per_shard)
            loader = DataLoader(rows, batch_size=None, num_workers=data.workers)
            write_shard(shard_path(folder, index), encode_rows(vae, list(_counted(loader, bar))))


def check_same_set(folder: Path, data: CacheConfig, vae: str, assets: int) -> None:
    """Shards of another set, of another VAE or of fewer assets must not be mixed in."""
    record = {k: getattr(data, k) for k in ("seed", "size", "reference_budget", "samples_per_shard")}
    record |= {"vae": vae, "assets": assets}
    path = folder / "set.json"
    if path.exists() and (found := json.loads(path.read_text())) != record:
        raise ConfigError(
            f"{folder} holds another set ({found}, not {record}); choose another data.folder or remove it"
        )
    path.write_text(json.dumps(record))


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits of the weights, whatever type they are computed in."""
    digest = hashlib.sha256()
    for name, w in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(w.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _counted(rows: Any, bar: tqdm) -> Iterator[Row]:
    for row in rows:
        bar.update()
        yield row


def encode_rows(vae: ImageVAE, rows: Sequence[Row]) -> dict[str, Bucket]:
    """Group by shapes and encode."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.shapes].append(row)
    buckets = {}
    for shapes, members in groups.items():
        slots = range(len(members[0].references))
        buckets[shapes] = Bucket(
            encode_pictures(vae, [m.target for m in members]),
            tuple(encode_pictures(vae, [m.references[j] for m in members]) for j in slots),
            tuple(torch.from_numpy(np.stack([m.vision[j] for m in members])) for j in slots),
            tuple(m.prompt for m in members),
        )
    return buckets


@torch.no_grad()
def encode_pictures(vae: ImageVAE, pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> normalised latents [n, C, h, w], bfloat16."""
    out, dtype = [], vae.quant_conv.weight.dtype
    for i in range(0, len(pictures), ENCODE_BATCH):
        batch = torch.stack([to_tensor(Image.fromarray(p)) for p in pictures[i : i + ENCODE_BATCH]]).to(dtype)
        out.append(vae.encode(batch.contiguous(memory_format=torch.channels_last))[:, :, 0].bfloat16().contiguous())
    return torch.cat(out)


def write_shard(path: Path, buckets: dict[str, Bucket]) -> None:
    tensors: dict[str, Tensor] = {}
    for shapes, bucket in buckets.items():
        tensors[f"{shapes}/target"] = bucket.target
        for j, (reference, vision) in enumerate(zip(bucket.references, bucket.vision, strict=True)):
            tensors[f"{shapes}/reference_{j}"], tensors[f"{shapes}/vision_{j}"] = reference, vision
    aside = path.with_suffix(f".partial-{os.getpid()}")
    save_file(tensors, aside, {"prompts": json.dumps({shapes: b.prompts for shapes, b in buckets.items()})})
    os.replace(aside, path)


def read_cache(data: CacheConfig) -> dict[str, Bucket]:
    """The shards that the config asks for, joined by bucket."""
    paths = [shard_path(Path(data.folder), i) for i in range(data.shards)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {data.shards} shards are missing in {data.folder}, first {missing[0]}; "
            "run python -m trainers.cache with the same config"
        )
    parts: dict[str, list[Bucket]] = defaultdict(list)
    for path in paths:
        for shapes, bucket in read_shard(path).items():
            parts[shapes].append(bucket)
    return {shapes: _join(parts[shapes]) for shapes in sorted(parts)}


def read_shard(path: Path) -> dict[str, Bucket]:
    with safe_open(path, "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        names = set(file.keys())
        buckets = {}
        for shapes, texts in prompts.items():
            slots = range(sum(1 for n in names if n.startswith(f"{shapes}/reference_")))
            buckets[shapes] = Bucket(
                file.get_tensor(f"{shapes}/target"),
                tuple(file.get_tensor(f"{shapes}/reference_{j}") for j in slots),
                tuple(file.get_tensor(f"{shapes}/vision_{j}") for j in slots),
                tuple(texts),
            )
    return buckets


def _join(parts: Sequence[Bucket]) -> Bucket:
    slots = range(len(parts[0].references))
    return Bucket(
        torch.cat([p.target for p in parts]),
        tuple(torch.cat([p.references[j] for p in parts]) for j in slots),
        tuple(torch.cat([p.vision[j] for p in parts]) for j in slots),
        tuple(prompt for p in parts for prompt in p.prompts),
    )


def data_of(config: RunConfig) -> CacheConfig:
    data = getattr(config.options, "data", None)
    if data is None:
        raise ConfigError(f"method {config.method} takes no data cache")
    return data


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.cache", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        build(data_of(config), load_image_vae(Path(config.options.model) / "vae", torch.bfloat16))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
