"""Dry run: pictures, calls and megapixels of a run, from headers and the config; nothing is sent or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unipic_core.conditioning.picture_files import open_picture
from unipic_core.errors import UniPicError

from ..judges.vlm import JudgeConfig, parse_judge
from .config import Stages
from .filters.catalogue import Filter, chosen
from .stages.listing import entries
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
    for entry in entries(stages):
        one = counts.setdefault(entry.subject, Count())
        one.pictures += 1
        try:
            if entry.fault:
                raise UniPicError(entry.fault)
            if entry.draw:
                one.megapixels += drawn_side(entry.draw) ** 2 / MEGA
            else:
                with open_picture(entry.path) as picture:
                    one.megapixels += picture.width * picture.height / MEGA
        except UniPicError:
            one.unreadable += 1
    return counts


def drawn_side(recipe: Mapping[str, Any]) -> int:
    """Side in pixels of a drawn picture, by its recipe."""
    return int(recipe["scene"][-1] if "scene" in recipe else recipe["size"])


def judge_side(stages: Stages) -> int:
    """Longest side in pixels of the pictures that the judge is sent; that of a recording is not read."""
    settings = {key: value for key, value in stages.judge.items() if key not in ("record", "replay")}
    return parse_judge(settings).image_max_side if settings else JudgeConfig.image_max_side


def calls(stages: Stages, counts: dict[str, Count]) -> Iterator[tuple[str, str]]:
    """Yield (stage, calls and megapixels) of every stage that asks a server or runs a model."""
    side = judge_side(stages)
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
    yield "pair" if stages.pair else "decompose", f"{rows:,} rows with at most {sources:,} sources"
    if stages.decompose is not None:
        yield from _decompose(stages, stages.decompose.kind, rows, sources, side)
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


def _decompose(stages: Stages, kind: str, rows: int, sources: int, side: int) -> Iterator[tuple[str, str]]:
    """Questions for the parts of photographs, and pictures of the parts."""
    if kind != "drawn" and stages.judge:
        yield "decompose, parts", f"{rows:,} calls, {rows * side**2 / MEGA:,.1f} megapixels"
    if kind == "endpoint":
        yield "decompose", _images(stages, sources, sources)
    elif kind == "pipeline":
        yield "decompose", f"{sources:,} pictures of this machine"


def _images(stages: Stages, number: int, pictures: int) -> str:
    images = stages.images
    assert images is not None  # checked by the config
    price = (
        f", at {images.price_per_call:g} each: {number * images.price_per_call:,.2f}" if images.price_per_call else ""
    )
    return f"{number:,} calls, {pictures * images.image_max_side**2 / MEGA:,.1f} megapixels{price}"


def _checks(one: Filter, rows: int, sources: int, side: int) -> str:
    """Calls of a check: one per target, but one per source for presence and identity."""
    number = sources if one.name in ("presence", "identity") else rows
    pictures = rows + sources if one.needs_sources else rows
    return f"{number:,} calls, {pictures * side**2 / MEGA:,.1f} megapixels in each attempt"
