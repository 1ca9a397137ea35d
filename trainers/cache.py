"""`python -m trainers.cache CONFIG [key=value]`: encode a data set once; training then needs no VAE and no encoder.

Latents of every sample are encoded first, then (unless the text encoder is trained) text embeddings with and without
prompt; samples of the preview grid likewise. Shards are written atomically and existing ones are reused: after an
interruption, run the same command again. Unusable rows are skipped and listed in report.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from unipic_core.errors import CheckpointError
from unipic_core.model.vae import ImageVAE
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.replacing import write_json
from unipic_core.weights.vae import load_image_vae

from .config.run import ConfigError, DataConfig, PreviewConfig, RunConfig, load_config, required
from .data.checking import (
    CheckedSource,
    check_rows,
    load_rows,
    print_report,
    refuse_bad_row,
    require_usable,
    shard_ranges,
)
from .data.cost import LEAST_ROWS, announce, announce_hours, text_width
from .data.encoding import ShardBuilder
from .data.index import COMMAND, CachedSamples, open_index
from .data.parts import CachePart, part_named
from .data.previews import PreviewRow, preview_path, preview_rows, read_preview_file, write_preview
from .data.rows import Row
from .data.shards import (
    Rows,
    Shard,
    drop_vision,
    has_text,
    shard_path,
)
from .data.sources.base import PLACES, places_of
from .data.text_embeddings import FP8, encode_text, encoder_fingerprint, text_fingerprint
from .terminal import exit_code

__all__ = ["PreviewRow", "Rows", "build", "cached_samples", "fingerprint", "load_image_vae", "read_preview"]

# --- reading ---------------------------------------------------------------------------------------------------------


def cached_samples(data: DataConfig, text: str | None) -> list[CachedSamples]:
    """Open the samples of each set of a config by its index.

    text: fingerprint of the frozen encoder; samples then have its embeddings and no pictures. None: the encoder is
    trained; samples then have pictures. Raises ConfigError that names the missing part and the command that creates it.
    """
    return [open_index(Path(part.folder), cached_shards(part), stored_name(part, text)) for part in data.parts]


def cached_shards(data: DataConfig) -> list[Path]:
    """List the shards of a complete cache. Raises ConfigError if it is missing, incomplete or of another data set."""
    folder = Path(data.folder)
    set_file = read_set_file(folder)
    if set_file is None:
        raise ConfigError(f"there is no cache in {folder}; {COMMAND}")
    cached = {"kind": "nano", **set_file}
    expected = {"kind": data.kind, "seed": data.seed, **settings_of(data)}
    different = [f"{k}: expected {v}, got {cached[k]}" for k, v in expected.items() if cached.get(k, v) != v]
    if different:
        raise ConfigError(
            f"{folder} holds another data set ({'; '.join(different)}); choose another data.folder or remove it"
        )
    rows = {"path": data.path, "samples": data.samples, **dict.fromkeys(PLACES), **places_of(data)}
    changed = [f"data.{k} {cached.get(k)}, not {v}" for k, v in rows.items() if cached.get(k) != v]
    if changed and data.kind != "nano":
        raise ConfigError(f"{folder} was made with {', '.join(changed)}; {COMMAND}")
    count = data.samples if data.kind == "nano" else cached["rows"]
    paths = [shard_path(folder, i) for i in range(math.ceil(count / data.samples_per_shard))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(paths)} shards are missing in {folder}, first {missing[0]}; {COMMAND}"
        )
    return paths


def read_preview(data: DataConfig, preview: PreviewConfig, text: str | None = None) -> list[PreviewRow]:
    """Read the samples of the grid with embeddings of the encoder `text`, or with None pictures and prompts only."""
    path = preview_path(data, preview, read_set_file(Path(data.folder)))
    if not path.exists():
        raise ConfigError(f"the samples of this preview grid are not in {data.folder}; {COMMAND}")
    return read_preview_file(path, stored_name(data, text))


def read_set_file(folder: Path) -> dict[str, Any] | None:
    """Read set.json, which identifies the data set and settings of all shards in a folder; None if missing."""
    path = folder / "set.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def settings_of(data: DataConfig) -> dict[str, Any]:
    """Encoding settings that all shards of a folder share."""
    return {k: getattr(data, k) for k in ("size", "reference_budget", "samples_per_shard")}


# --- building --------------------------------------------------------------------------------------------------------


def build(data: DataConfig, vae: ImageVAE, text: TextEncoder | None, preview: PreviewConfig | None = None) -> None:
    """Create or update the cache. Without `text`, pictures are stored for training the encoder."""
    checked = check_rows(data)
    name = stored_name(data, encoder_fingerprint(text)) if text is not None else None
    grid_rows = preview_rows(data, preview, checked)
    shards = encode_latents(data, checked, vae, name, preview, grid_rows)
    if text is not None and name is not None:
        add_text(data, name, lambda: text, preview, shards)


def encode_latents(
    data: DataConfig,
    checked: CheckedSource,
    vae: ImageVAE,
    text: str | None,
    preview: PreviewConfig | None,
    grid_rows: Sequence[Row],
    part: CachePart = CachePart(),
) -> list[Path]:
    """Write every latent shard of the part that is missing, outdated, or lacks required pictures, and the preview
    samples; returns the part's shards."""
    folder = Path(data.folder)
    check_same_set(folder, {**checked.source.identity, **settings_of(data), "vae": fingerprint(vae)})
    ranges = list(enumerate(shard_ranges(data, len(checked.source))))
    shards = {shard_path(folder, i): rows for i, rows in part.of(ranges)}
    for_text = None if keeps_vision(data, text) else text
    missing = [path for path, rows in shards.items() if not is_current(path, checked.digest(rows), for_text)]
    count = sum(len(shards[path]) for path in missing)
    if count >= LEAST_ROWS:
        announce_hours(checked, vae, shards[missing[0]], count)
    with tqdm(total=count, unit=" samples", desc="latents") as bar:
        for path in missing:
            encode_shard(path, data, checked, vae, shards[path], bar)
    bad = checked.bad | {i: reason for path in shards for i, reason in Shard(path).metadata.get("skipped", [])}
    require_usable(data, checked, bad)
    print_report(data, checked, bad, part)
    if preview and part.is_first:
        write_preview(preview_path(data, preview, read_set_file(folder)), vae, grid_rows)
    return list(shards)


def encode_shard(
    path: Path, data: DataConfig, checked: CheckedSource, vae: ImageVAE, indices: Sequence[int], bar: tqdm
) -> None:
    """Encode the rows `indices` into one latent shard."""
    shard, skipped = ShardBuilder(), []
    done = bar.n
    for rows in load_rows(checked, indices, data.workers):
        for i, row in rows:
            if isinstance(row, str):
                refuse_bad_row(data, checked.source, i, row)
                skipped.append((i, row))
        shard.add(vae, [row for _, row in rows if isinstance(row, Row)])
        bar.update(len(rows))
    shard.write(path, {"rows": checked.digest(indices), "skipped": skipped})
    bar.update(done + len(indices) - bar.n)  # skipped rows


def add_text(
    data: DataConfig, name: str, load: Callable[[], TextEncoder], preview: PreviewConfig | None, paths: Sequence[Path]
) -> None:
    """Write missing text embeddings of these shards and the previews; loads the encoder only if any are missing."""
    shards = [Shard(path) for path in paths]
    previews = [Shard(preview_path(data, preview, read_set_file(Path(data.folder))))] if preview else []
    missing = [shard for shard in (*previews, *shards) if not has_text(shard, name)]
    if missing:
        kept = {shard.path for shard in previews}
        encode_text(missing, name, load(), keep_vision=lambda shard: keeps_vision(data, name) or shard.path in kept)
    for shard in shards:  # a run may be killed between writing the two files
        if not keeps_vision(data, name):
            drop_vision(shard.path)


def keeps_vision(data: DataConfig, text: str | None) -> bool:
    """True if shards keep pictures: to train an encoder, and always for the small pictures of the composition set."""
    return data.kind == "nano" or text is None


def is_current(path: Path, rows: str, text: str | None) -> bool:
    """True if a shard is undamaged, of these rows, and has its pictures or the embeddings made from them."""
    try:
        if not path.exists():
            return False
        shard = Shard(path)
        if shard.metadata.get("rows", rows) != rows:
            return False
        return shard.has_vision or (text is not None and has_text(shard, text))
    except CheckpointError:  # damaged
        return False


def check_same_set(folder: Path, record: dict[str, Any]) -> None:
    """Write set.json. Raises ConfigError if the folder holds another data set, VAE or asset count.

    Rows may change, because each shard stores the digest of its own.
    """
    cached, rows = read_set_file(folder), dict.fromkeys(("rows", "path", "samples", *PLACES))
    if cached is not None and {**cached, **rows} != {**record, **rows}:
        raise ConfigError(
            f"{folder} holds another data set (expected {record}, got {cached}); choose another data.folder or remove "
            "it"
        )
    if cached != record:
        write_json(folder / "set.json", record)


# --- the models ------------------------------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> str:
    """Fingerprint of the weights (12 hex digits), independent of their dtype."""
    digest = hashlib.sha256()
    for name, w in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(w.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def stored_name(data: DataConfig, fingerprint: str | None) -> str | None:
    """Name under which the cache stores an encoder's embeddings; None where it stores pictures instead."""
    if fingerprint is None or data.text_storage == "live":
        return None
    return fingerprint + (FP8 if data.text_storage == "fp8" else "")


def run(config: RunConfig, part: CachePart = CachePart()) -> None:
    """Build all caches of a config and its stages: one model in memory at a time, and none before rows are checked."""
    if config.stages:
        for stage in config.stages:
            run(stage, part)
        return
    if config.data is None or config.network is None:
        raise ConfigError(f"method {config.method} needs no data cache")
    if config.data.kind == "scenes":
        raise ConfigError("data.kind scenes needs no cache; its scenes are drawn during training")
    validation = required(config.validation)
    user_previews = config.preview is not None and config.preview.own
    preview = config.preview if user_previews or not validation.holds_out else None
    for i, data in enumerate(config.data.parts):
        build_one(config, data, None if i else preview, part)
    if validation.data is not None:
        build_one(config, validation.data, None, part)


def build_one(config: RunConfig, data: DataConfig, preview: PreviewConfig | None, part: CachePart) -> None:
    """Build the part's share of the cache of one data set. preview: preview samples to encode with it."""
    folder = Path(required(config.network).model)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    trains_encoder = config.sft is not None and config.sft.train_text_encoder
    checked = check_rows(data, part)
    preview = preview if part.is_first else None
    grid_rows = preview_rows(data, preview, checked)
    name = None if trains_encoder else stored_name(data, text_fingerprint(folder))
    announce(data, len(checked.digests) - len(checked.bad), None if name is None else text_width(folder))
    vae = load_image_vae(folder / "vae", torch.bfloat16, device)
    shards = encode_latents(data, checked, vae, name, preview, grid_rows, part)
    del vae
    if name is not None:
        # bfloat16 is slow on a CPU, and only small encoders run there
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        add_text(data, name, lambda: TextEncoder.from_pretrained(folder, dtype, device), preview, shards)
    with suppress(ConfigError):  # other parts are still at work; the last one makes it
        open_index(Path(data.folder), cached_shards(data), name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.cache", description=__doc__)
    parser.add_argument("config", help="a YAML file, see trainers/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.workers=4")
    parser.add_argument(
        "--part",
        metavar="i/n",
        help="encode every n-th shard from the i-th on, beside other processes or machines; under accelerate launch "
        "each process takes its part by itself",
    )
    args = parser.parse_intermixed_args(argv)
    return exit_code(
        lambda: run(load_config(args.config, args.overrides), part_named(args.part)),
        "run the same command again to continue",
    )


if __name__ == "__main__":
    sys.exit(main())
