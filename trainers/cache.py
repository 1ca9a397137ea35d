"""`python -m trainers.cache CONFIG [key=value]`: encode a data set once; training then needs no VAE and no encoder.

First the latents of every sample, then (unless the text encoder is to train along) its text embeddings with and without
prompt, in shards that data/shards.py describes; the samples of the preview grid likewise. A shard is written aside and
renamed, and one that is there is not made again: after an interrupt, run the same command. Rows that cannot be used are
left out and listed in report.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
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

from .config.run import ConfigError, DataConfig, PreviewConfig, RunConfig, given, load_config
from .data.checking import Checked, check_rows, load_rows, report, require_good
from .data.encoding import Encoded
from .data.previews import PreviewRow, preview_path, preview_rows, read_preview_file, write_preview
from .data.rows import Row
from .data.shards import Bucket, Part, Rows, Shard, TextShard, drop_vision, has_text, parts_of, shard_path, text_path
from .data.text_embeddings import encode_text, encoder_fingerprint, text_fingerprint
from .terminal import exit_code

__all__ = ["Bucket", "PreviewRow", "Rows", "build", "fingerprint", "load_image_vae", "read_cache", "read_preview"]

COMMAND = "run python -m trainers.cache with the same config"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_cache(data: DataConfig, text: str | None = None) -> dict[str, Bucket]:
    """The samples that the config asks for, by shapes; only headers are read.

    text: fingerprint of the frozen encoder whose embeddings must be there (the samples then come with them and without
    pictures); None: for an encoder that trains along, whose pictures must be there. ConfigError names what is missing
    and the command that makes it.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for path in cached_shards(data):
        shard = Shard(path)
        if text is None and not shard.has_vision:
            raise ConfigError(f"{path} keeps no pictures for a text encoder that trains along; {COMMAND}")
        if text is not None and not has_text(shard, text):
            raise ConfigError(f"{path} has no text embeddings by this encoder; {COMMAND}")
        embeddings = TextShard(text_path(path, text)) if text is not None else None
        for shapes, part in parts_of(shard, embeddings, vision=text is None):
            parts[shapes].append(part)
    if not parts:
        raise ConfigError(f"{data.folder} holds no sample; see its report.json")
    return {shapes: Bucket(parts[shapes]) for shapes in sorted(parts)}


def cached_shards(data: DataConfig) -> list[Path]:
    """The files of a complete cache, or ConfigError."""
    folder = Path(data.folder)
    record = read_record(folder)
    if record is None:
        raise ConfigError(f"there is no cache in {folder}; {COMMAND}")
    found = {"kind": "nano", **record}
    asked = {"kind": data.kind, "seed": data.seed, **settings_of(data)}
    other = [f"{k} {found[k]}, not {v}" for k, v in asked.items() if found.get(k, v) != v]
    if other:
        raise ConfigError(f"{folder} holds another set ({'; '.join(other)}); choose another data.folder or remove it")
    rows = {"path": data.path, "samples": data.samples} if data.kind != "nano" else {}
    if changed := [f"data.{k} {found[k]}, not {v}" for k, v in rows.items() if found[k] != v]:
        raise ConfigError(f"{folder} was made with {', '.join(changed)}; {COMMAND}")
    count = data.samples if data.kind == "nano" else found["rows"]
    paths = [shard_path(folder, i) for i in range(math.ceil(count / data.samples_per_shard))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(paths)} shards are missing in {folder}, first {missing[0]}; {COMMAND}"
        )
    return paths


def read_preview(data: DataConfig, preview: PreviewConfig, text: str | None = None) -> list[PreviewRow]:
    """The samples of the grid, with their embeddings by the encoder `text`, or with pictures and prompts alone."""
    path = preview_path(data, preview, read_record(Path(data.folder)))
    if not path.exists():
        raise ConfigError(f"the samples of this preview grid are not in {data.folder}; {COMMAND}")
    return read_preview_file(path, text)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the shards of a folder have in common: set.json."""
    path = folder / "set.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def settings_of(data: DataConfig) -> dict[str, Any]:
    return {k: getattr(data, k) for k in ("size", "reference_budget", "samples_per_shard")}


# --- building --------------------------------------------------------------------------------------------------------


def build(data: DataConfig, vae: ImageVAE, text: TextEncoder | None, preview: PreviewConfig | None = None) -> None:
    """Bring the cache up to date. Without `text` the pictures are kept for an encoder that trains along."""
    checked = check_rows(data)
    name = encoder_fingerprint(text) if text is not None else None
    shown = preview_rows(data, preview, checked)
    encode_latents(data, checked, vae, name, preview, shown)
    if text is not None and name is not None:
        add_text(data, name, lambda: text, preview)


def encode_latents(
    data: DataConfig,
    checked: Checked,
    vae: ImageVAE,
    text: str | None,
    preview: PreviewConfig | None,
    shown: Sequence[Row],
) -> None:
    """Write every shard of latents that is missing, or not of these rows, or lacks pictures that are needed."""
    folder = Path(data.folder)
    check_same_set(folder, {**checked.source.record, **settings_of(data), "vae": fingerprint(vae)})
    for partial in folder.glob("*.partial-*"):  # of a run that was killed
        partial.unlink()
    count, size = len(checked.source), data.samples_per_shard
    ranges = {shard_path(folder, at // size): range(at, min(at + size, count)) for at in range(0, count, size)}
    for_text = None if keeps_vision(data, text) else text
    missing = [path for path, rows in ranges.items() if not is_current(path, checked.digest(rows), for_text)]
    with tqdm(total=sum(len(ranges[path]) for path in missing), unit=" samples", desc="latents") as bar:
        for path in missing:
            encode_shard(path, data, checked, vae, ranges[path], bar)
    bad = checked.bad | {i: reason for path in ranges for i, reason in Shard(path).metadata.get("skipped", [])}
    require_good(data, checked, bad)
    report(data, checked, bad)
    if preview:
        write_preview(preview_path(data, preview, read_record(folder)), vae, shown)


def encode_shard(
    path: Path, data: DataConfig, checked: Checked, vae: ImageVAE, indices: Sequence[int], bar: tqdm
) -> None:
    made, skipped = Encoded(), []
    done = bar.n
    for rows in load_rows(checked, indices, data.workers):
        skipped += [(i, row) for i, row in rows if isinstance(row, str)]
        made.add(vae, [row for _, row in rows if isinstance(row, Row)])
        bar.update(len(rows))
    made.write(path, {"rows": checked.digest(indices), "skipped": skipped})
    bar.update(done + len(indices) - bar.n)  # the rows that were left out


def add_text(data: DataConfig, name: str, load: Callable[[], TextEncoder], preview: PreviewConfig | None) -> None:
    """Text embeddings for all that `encode_latents` wrote; the encoder is loaded only if any are missing."""
    shards = [Shard(path) for path in cached_shards(data)]
    shown = [Shard(preview_path(data, preview, read_record(Path(data.folder))))] if preview else []
    missing = [shard for shard in (*shown, *shards) if not has_text(shard, name)]
    if missing:
        encode_text(missing, name, load(), keep_vision=lambda shard: keeps_vision(data, name) or shard in shown)
    for shard in shards:  # of a run that was killed between the two files
        if not keeps_vision(data, name):
            drop_vision(shard.path)


def keeps_vision(data: DataConfig, text: str | None) -> bool:
    """The composition set's pictures are small, and train an encoder first and serve a frozen one then."""
    return data.kind == "nano" or text is None


def is_current(path: Path, rows: str, text: str | None) -> bool:
    """Whether a shard is whole, of these rows, and has its pictures or already the embeddings made from them."""
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
    """Shards of another set, of another VAE or of fewer assets must not be mixed in. Rows may change: each shard knows
    its own."""
    found, rows = read_record(folder), dict.fromkeys(("rows", "path", "samples"))
    if found is not None and {**found, **rows} != {**record, **rows}:
        raise ConfigError(
            f"{folder} holds another set ({found}, not {record}); choose another data.folder or remove it"
        )
    write_json(folder / "set.json", record)


# --- the models ------------------------------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits of the weights, whatever type they are computed in."""
    digest = hashlib.sha256()
    for name, w in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(w.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def run(config: RunConfig) -> None:
    """Latents, then text embeddings: one model in memory at a time, and none before the rows are known to be good."""
    if config.data is None or config.network is None:
        raise ConfigError(f"method {config.method} takes no data cache")
    if config.data.kind == "scenes":
        raise ConfigError("data.kind scenes needs no cache: its scenes are drawn as training goes")
    validation = given(config.validation)
    own_previews = config.preview is not None and config.preview.own
    build_one(config, config.data, config.preview if own_previews or not validation.holds_out else None)
    if validation.data is not None:
        build_one(config, validation.data, None)


def build_one(config: RunConfig, data: DataConfig, preview: PreviewConfig | None) -> None:
    """The cache of one set. preview: samples that are encoded for the grid."""
    folder = Path(given(config.network).model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    live = config.sft is not None and config.sft.train_text_encoder
    checked = check_rows(data)
    shown = preview_rows(data, preview, checked)
    name = None if live else text_fingerprint(folder)
    vae = load_image_vae(folder / "vae", torch.bfloat16, device)
    encode_latents(data, checked, vae, name, preview, shown)
    del vae
    if name is not None:
        # a CPU has no use for bfloat16, and only small encoders run there
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        add_text(data, name, lambda: TextEncoder.from_pretrained(folder, dtype, device), preview)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.cache", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: run(load_config(args.config, args.overrides)), "run the same command to go on")


if __name__ == "__main__":
    sys.exit(main())
