"""Synthesise: a target for each row, one file each, so that a kill loses one picture; failed checks come again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from unipic_core.errors import UniPicError

from ...digests import digest
from ...judges.vlm import AnswerError
from ...progress import Progress
from ..config import Stages, SynthesiseConfig
from ..filters.picture import content_id, decode, read_bytes
from ..manifest.shards import Row, StageFolder
from ..synthesis.endpoint import ImagesClient
from .ingest import write_picture
from .tools import Tools, maker_settings

VERSION = 1
PER_FOLDER = 1000


def synthesise(
    stages: Stages, config: SynthesiseConfig, before: StageFolder, tools: Tools, attempt: int
) -> StageFolder:
    """Write the rows with their targets. attempt: from 1; later ones take the rows whose target the check dropped."""
    settings = {**asdict(config), "attempts": 0}
    maker = digest(VERSION, settings, maker_settings(config, stages.images), stages.seed)
    key = digest("synthesise", maker, attempt, before.content)
    folder = StageFolder(stages.folder, f"synthesise-{attempt}", key, before.count)
    client = ImagesClient(stages.images) if stages.images and config.kind == "endpoint" else None
    jobs = sum(1 for row in before.rows() if wanted(row, attempt))
    if client is not None and jobs:
        pictures = sum(len(row["sources"]) for row in before.rows() if wanted(row, attempt))
        print(f"synthesise: {jobs} calls with {pictures} pictures {client.notice}")
    progress = Progress(f"synthesise, attempt {attempt}", jobs, unit="targets")
    make = partial(target_row, stages.folder, config, client, maker[:12], stages.seed, attempt)

    def targets(rows: list[Row]) -> Iterator[Row]:
        for row in tools.map_rows(make, rows, client):
            progress.add()
            yield row

    for index in range(before.count):
        rows = [row for row in before.read(index) if wanted(row, attempt)]
        progress.skip(folder.complete(index, rows, targets, lambda row: row["keep"] is not None))
    progress.close()
    return folder


def wanted(row: Row, attempt: int) -> bool:
    """First attempt: every row with an instruction. Later ones: rows whose target a check dropped."""
    return row["keep"] is True if attempt == 1 else row["keep"] is False and "filters" in row


def target_row(
    out: Path, config: SynthesiseConfig, client: ImagesClient | None, maker: str, seed: int, attempt: int, row: Row
) -> Row:
    """Row of one target. `keep` is null with the reason if it could not be made: a later run tries again.

    A target that is there is used.
    """
    parent = row["id"] if attempt > 1 else None
    row = {key: value for key, value in row.items() if key not in ("filters", "rejected")}
    name = digest(row["composition"], row["instruction"], attempt)
    path = f"targets/{maker}/{row['row'] // PER_FOLDER:04d}/{name}.png"
    about: dict[str, Any] = {"subject": "target", "name": "the picture", "attempt": attempt, "parent": parent}
    try:
        if not (out / path).exists():
            sources = [out / source["path"] for source in row["sources"]]
            write_picture(out / path, _made(config, client, row, sources, seed, attempt))
        data = read_bytes(str(out / path))
        picture = decode(data, path)
    except (AnswerError, UniPicError) as error:
        return {**row, **about, "path": path, "keep": None, "reason": f"not synthesised: {error}"}
    size = {"width": picture.size[0], "height": picture.size[1]}
    return {**row, "id": content_id(data), **about, "path": path, **size, "keep": True, "reason": ""}


def _made(
    config: SynthesiseConfig, client: ImagesClient | None, row: Row, sources: Sequence[Path], seed: int, attempt: int
) -> bytes:
    """PNG of one target. Raises AnswerError, UniPicError."""
    if config.kind == "drawn":
        from ..synthesis.drawn import draw_target

        return draw_target(row, config.size, attempt)
    seed = int(digest(seed, row["composition"], attempt)[:7], 16)
    if client is not None:
        return client.edit(sources, row["instruction"], seed)
    from ..synthesis.pipeline import compose

    assert config.model is not None
    return compose(config.model, sources, row["instruction"], seed, config.steps, config.size, config.guidance)
