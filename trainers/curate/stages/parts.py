"""Parts of photographs for decompose: of the data set, of a drawn scene, or listed by the user's judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...judges.vlm import AnswerError, Question, in_order, load_picture, object_schema, parse_object
from ..manifest.scores import Scores
from ..manifest.shards import Row
from .drawn_sources import scene_of
from .questions import Judge

VERSION = 1
MOST_PARTS = 6
LIST = (
    "List the persons, things and garments that stand out in this photograph, and its background, at most six in all. "
    'Answer as JSON: {"parts": [{"name": "a red umbrella", "category": "umbrella"}, ...]}'
)
Part = dict[str, str]
"""name, category, and subject where the category does not say it."""


def unlisted(rows: Sequence[Row], judge: Judge, scores: Scores) -> int:
    """Number of photographs whose parts the judge is still to be asked for."""
    known = scores.known(_key(judge), [row["id"] for row in rows])
    return sum(_known_parts(row) is None and not isinstance(known.get(row["id"]), list) for row in rows)


def with_parts(rows: Sequence[Row], judge: Judge | None, scores: Scores, out: Path) -> list[Row]:
    """Rows with `parts`, or with `fault`, and `again` if a later run may find them."""
    parts = [_known_parts(row) for row in rows]
    wanted = [row for row, known in zip(rows, parts, strict=True) if known is None]
    listed: Mapping[str, Any] = _listed(wanted, judge, scores, out) if judge and wanted else {}
    return [_with(row, known, listed.get(row["id"])) for row, known in zip(rows, parts, strict=True)]


def _with(row: Row, parts: list[Part] | None, answer: Any) -> Row:
    if parts is None and isinstance(answer, list):
        parts = answer
    if parts is not None:
        return {**row, "parts": parts}
    if answer is None:
        return {**row, "fault": "its row has no parts, and no judge is configured that could list them"}
    return {**row, "fault": f"the judge listed no parts ({answer['failure']})", "again": True}


def _known_parts(row: Row) -> list[Part] | None:
    """Parts that need no judge."""
    if row.get("parts"):
        return list(row["parts"])
    if "scene" not in row.get("drawn", {}):
        return None
    scene, _ = scene_of(row["drawn"])
    parts = [{"name": one.asset.name, "category": one.asset.category, "subject": one.asset.kind} for one in scene.items]
    parts.append({"name": scene.background.place.name, "category": "background", "subject": "background"})
    return [parts[source] for source in scene.order]


def _key(judge: Judge) -> str:
    return f"parts {VERSION} {judge.key}"


def _listed(rows: Sequence[Row], judge: Judge, scores: Scores, out: Path) -> dict[str, Any]:
    """Answers of the judge by picture: a list of parts, or {"failure": reason}; stored ones are not asked again."""
    answers = scores.known(_key(judge), [row["id"] for row in rows])
    new = [row for row in rows if not isinstance(answers.get(row["id"]), list)]
    for name, answer in in_order(partial(_asked, judge, out), new, judge.asker.config.concurrency):
        answers[name] = answer
        scores.add(_key(judge), {name: answer})
    return answers


def _asked(judge: Judge, out: Path, row: Row) -> tuple[str, Any]:
    try:
        picture = load_picture(out / row["path"], judge.asker.config.image_max_side)
        one = {"type": "object", "properties": {"name": {"type": "string"}, "category": {"type": "string"}}}
        schema = object_schema({"parts": {"type": "array", "items": one}})
        answer = judge.asker.ask(Question(("The photograph:", picture, LIST), schema))
        return row["id"], read_parts(parse_object(answer.text).get("parts"))
    except AnswerError as error:
        return row["id"], {"failure": str(error)}


def read_parts(parts: object) -> list[Part]:
    """Names and categories of a judge's answer, each one line. Raises AnswerError."""
    if not isinstance(parts, list) or not 1 <= len(parts) <= MOST_PARTS:
        got = f"{len(parts)}" if isinstance(parts, list) else "none"
        raise AnswerError("unparsed", f"expected 1 to {MOST_PARTS} parts, got {got}")
    found = []
    for part in parts:
        texts = [part.get(key) if isinstance(part, dict) else None for key in ("name", "category")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise AnswerError("unparsed", "a part has no name or no category")
        name, category = (" ".join(str(text).split()) for text in texts)
        found.append({"name": name[:100], "category": category[:64]})
    return found
