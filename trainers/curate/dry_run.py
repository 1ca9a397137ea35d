"""Dry run: pictures, calls and megapixels of a run, from headers and the config; nothing is sent or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unipic_core.conditioning.picture_files import open_picture
from unipic_core.errors import UniPicError

from ..judges.vlm import parse_judge
from .config import Stages
from .filters.catalogue import Filter, chosen
from .stages.listing import Entry, entries
from .stages.parts import MOST_PARTS

MEGA = 1e6


@dataclass
class Count:
    """Pictures of one subject, and their megapixels."""

    pictures: int = 0
    unreadable: int = 0
    megapixels: float = 0.0


def describe(stages: Stages) -> str:
    """Text: pictures by subject, then calls and megapixels of each stage, as upper bounds."""
    counts = count_pictures(stages)
    total = sum(one.pictures for one in counts.values())
    lines = [f"ingest: {total:,} pictures"]
    for subject, one in counts.items():
        bad = f", {one.unreadable:,} of them unreadable" if one.unreadable else ""
        lines.append(f"  {subject}: {one.pictures:,} pictures, {one.megapixels:,.1f} megapixels{bad}")
    lines += [f"{stage}: {text}" for stage, text in calls(stages, counts)]
    lines.append("all counts are upper bounds: dropped pictures are not asked about, and stored answers are reused")
    return "\n".join(lines)


def count_pictures(stages: Stages) -> dict[str, Count]:
    """Counts by subject, from the headers."""
    counts: dict[str, Count] = {}
    for entry, config in _with_config(stages):
        one = counts.setdefault(entry.subject, Count())
        one.pictures += 1
        try:
            if entry.fault:
                raise UniPicError(entry.fault)
            if entry.draw:
                one.megapixels += config**2 / MEGA
            else:
                with open_picture(entry.path) as picture:
                    one.megapixels += picture.width * picture.height / MEGA
        except UniPicError:
            one.unreadable += 1
    return counts


def _with_config(stages: Stages) -> Iterator[tuple[Entry, int]]:
    """Entries with the side of a drawn picture."""
    for entry in entries(stages):
        recipe = entry.draw
        yield entry, int(recipe["scene"][-1] if "scene" in recipe else recipe.get("size", 0))


def calls(stages: Stages, counts: dict[str, Count]) -> Iterator[tuple[str, str]]:
    """(stage, calls and megapixels) of every stage that asks a server."""
    side = (
        parse_judge({k: v for k, v in stages.judge.items() if k not in ("record", "replay")}).image_max_side
        if ("base_url" in stages.judge)
        else 1024
    )
    for one in chosen(stages.filter.filters, "filter"):
        if one.rank == "endpoint":
            found = [counts[subject] for subject in one.subjects if subject in counts]
            number = sum(count.pictures for count in found)
            pixels = sum(min(count.megapixels, count.pictures * side**2 / MEGA) for count in found)
            yield f"filter {one.name}", f"{number:,} calls, {pixels:,.1f} megapixels"
    if stages.synthesise is None:
        return
    rows = stages.pair.rows if stages.pair else counts.get("photograph", Count()).pictures
    sources = rows * (max(stages.pair.counts) if stages.pair else MOST_PARTS)
    yield "compose", f"{rows:,} rows with at most {sources:,} sources"
    if stages.decompose is not None and stages.decompose.kind == "endpoint":
        yield "decompose", _images(stages, sources, sources)
    if stages.prompt.kind == "endpoint":
        yield "prompt", f"{rows:,} calls, {sources * side**2 / MEGA:,.1f} megapixels"
    attempts = stages.synthesise.attempts
    if stages.synthesise.kind == "endpoint":
        yield "synthesise", f"{_images(stages, rows, sources)}; with every attempt {rows * attempts:,} calls"
    elif stages.synthesise.kind == "pipeline":
        made = rows * stages.synthesise.size**2 / MEGA
        yield (
            "synthesise",
            f"{rows:,} targets of this machine, {made:,.1f} megapixels; at most {attempts} attempts each",
        )
    for one in chosen(stages.check.filters, "check"):
        if one.rank == "endpoint":
            yield f"check {one.name}", _checks(one, rows, sources, side)


def _images(stages: Stages, number: int, pictures: int) -> str:
    images = stages.images
    assert images is not None  # checked by the config
    price = (
        f", at {images.price_per_call:g} each: {number * images.price_per_call:,.2f}" if images.price_per_call else ""
    )
    return f"{number:,} calls, {pictures * images.image_max_side**2 / MEGA:,.1f} megapixels{price}"


def _checks(one: Filter, rows: int, sources: int, side: int) -> str:
    """Per source for presence and identity, which ask about each."""
    number = sources if one.name in ("presence", "identity") else rows
    pictures = rows + sources if one.needs_sources else rows
    return f"{number:,} calls, {pictures * side**2 / MEGA:,.1f} megapixels in each attempt"
