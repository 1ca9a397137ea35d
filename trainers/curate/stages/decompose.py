"""Decompose (De&Re): each part of a photograph as a clean source; the photograph stays as the reference of quality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from unipic_core.errors import UniPicError

from ...digests import digest
from ...judges.vlm import AnswerError, png_of, transfer_notice
from ...nano.backgrounds import draw
from ...progress import Progress
from ..config import DecomposeConfig, Stages
from ..filters.picture import content_id
from ..manifest.shards import Row, StageFolder
from ..synthesis.endpoint import ImagesClient
from .drawn_sources import bank_of, cut_out, scene_of
from .ingest import write_picture
from .parts import MOST_PARTS, Part, unlisted, with_parts
from .tools import Tools, maker_settings

VERSION = 1
EXTRACT = "Extract {name} from the picture: the whole of it, alone on a plain white background, unchanged."
EXTRACT_GROUND = "Remove every person and every thing that stands in front, and show the empty background."


def decompose(stages: Stages, config: DecomposeConfig, photographs: StageFolder, tools: Tools) -> StageFolder:
    """Write one composition row per kept photograph, with its parts as sources and itself as `reference`."""
    judge = tools.judge.key if tools.judge else ""
    maker = maker_settings(config, stages.images)
    key = digest("decompose", VERSION, asdict(config), maker, judge, stages.seed, photographs.content)
    folder = StageFolder(stages.folder, "decompose", key, photographs.count)
    client = ImagesClient(stages.images) if stages.images and config.kind == "endpoint" else None
    if config.kind != "drawn" and tools.judge is not None and tools.judge.remote:
        shards = (usable(photographs.read(index)) for index in range(photographs.count))
        asked = sum(unlisted(rows, tools.judge, tools.scores) for rows in shards)
        if asked:
            print(transfer_notice(tools.judge.asker.config, asked, asked))
    if client is not None:
        count = sum(len(row.get("parts", ())) or MOST_PARTS for row in photographs.rows() if row["keep"] is True)
        print(f"decompose: at most {count} calls with one picture each {client.notice}")
    total = sum(len(usable(photographs.read(index))) for index in range(photographs.count))
    progress = Progress("decompose", total, unit="photographs")
    make = partial(composition, stages.folder, config, client, key[:12], stages.seed)

    def compositions(rows: list[Row]) -> Iterator[Row]:
        if config.kind != "drawn":
            rows = with_parts(rows, tools.judge, tools.scores, stages.folder)
        for row in tools.map_rows(make, rows, client):
            progress.add()
            yield row

    for index in range(photographs.count):
        rows = usable(photographs.read(index))
        progress.skip(folder.complete(index, rows, compositions, lambda row: row["keep"] is not None))
    progress.close()
    return folder


def usable(rows: Sequence[Row]) -> list[Row]:
    """Photographs that the filters kept."""
    return [row for row in rows if row["keep"] is True and row["subject"] == "photograph"]


def composition(
    out: Path, config: DecomposeConfig, client: ImagesClient | None, folder: str, seed: int, photograph: Row
) -> Row:
    """Row of one photograph. `keep` is false with the reason if it has no usable parts, and null if they could not be
    listed or made: a later run tries again.
    """
    about: Row = {"row": photograph["row"], "reference": photograph["path"]}
    if config.kind == "drawn":
        about |= {"scene": photograph.get("drawn", {}).get("scene")}
    try:
        parts = _parts(config, photograph)
    except UniPicError as error:
        return _failed(about, error, None if photograph.get("again") else False)
    try:
        sources = _sources(out, config, client, folder, seed, photograph, parts)
    except (AnswerError, UniPicError) as error:
        return _failed(about, error, None)
    key = digest(photograph["id"], [source["id"] for source in sources])
    return {**about, "id": key, "composition": key, "sources": sources, "keep": True, "reason": ""}


def _failed(about: Row, error: Exception, keep: bool | None) -> Row:
    return {**about, "id": "", "sources": [], "keep": keep, "reason": f"not decomposed: {error}"}


def _parts(config: DecomposeConfig, photograph: Row) -> list[tuple[Part, bytes]]:
    """Parts with the pictures that are known: PNG of drawn ones. Raises UniPicError for a photograph without parts."""
    if config.kind == "drawn":
        return _layers(photograph)
    if "fault" in photograph:
        raise UniPicError(photograph["fault"])
    parts = photograph.get("parts", [])
    if not 1 <= len(parts) <= MOST_PARTS:
        raise UniPicError(f"expected 1 to {MOST_PARTS} parts, got {len(parts)}")
    return [(part, b"") for part in parts]


def _sources(
    out: Path,
    config: DecomposeConfig,
    client: ImagesClient | None,
    folder: str,
    seed: int,
    photograph: Row,
    parts: Sequence[tuple[Part, bytes]],
) -> list[Row]:
    """Sources of one photograph, their pictures written. Raises AnswerError, UniPicError."""
    sources = []
    for number, (part, data) in enumerate(parts, 1):
        path = f"parts/{folder}/{digest(photograph['id'], part, number)}.png"
        if not data and not (out / path).exists():
            data = _extracted(config, client, out / photograph["path"], part, seed + number)
        if data:
            write_picture(out / path, data)
        found = content_id((out / path).read_bytes())
        known = part["category"] if part["category"] in ("person", "background") else "object"
        subject = part.get("subject", known)
        sources.append(
            {"id": found, "path": path, "category": part["category"], "subject": subject, "name": part["name"]}
        )
    return sources


def _layers(photograph: Row) -> list[tuple[Part, bytes]]:
    """Exact parts of a drawn photograph: each item as a cut-out, and the empty background, in the scene's order."""
    recipe = photograph.get("drawn", {})
    if "scene" not in recipe:
        raise UniPicError(f"{photograph['path']} is not drawn; use decompose.kind pipeline or endpoint")
    scene, _ = scene_of(recipe)
    size = scene.size
    bank = bank_of(size)
    layers = [
        (
            {"name": one.asset.name, "category": one.asset.category, "subject": one.asset.kind},
            png_of(cut_out(bank, one, size)),
        )
        for one in scene.items
    ]
    ground = draw(scene.background, size, size)
    name = scene.background.place.name
    layers.append(({"name": name, "category": "background", "subject": "background"}, png_of(ground)))
    return [layers[source] for source in scene.order]


def _extracted(config: DecomposeConfig, client: ImagesClient | None, photograph: Path, part: Part, seed: int) -> bytes:
    """PNG of one part. Raises AnswerError, UniPicError."""
    text = EXTRACT_GROUND if part["category"] == "background" else EXTRACT.format(name=part["name"])
    if client is not None:
        return client.edit([photograph], text, seed)
    from ..synthesis.pipeline import compose

    assert config.model is not None
    return compose(config.model, [photograph], text, seed, config.steps, config.size, None)
