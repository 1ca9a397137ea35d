"""Prompt: the instruction of each composition row, by templates or by the user's judge model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unipic_core.errors import UniPicError

from ...data.rows import BadRow, check_prompt
from ...digests import digest
from ...judges.vlm import AnswerError, Question, in_order, load_picture, object_schema, parse_object, transfer_notice
from ...progress import Progress
from ..config import Stages
from ..conflicts.rules import Rules
from ..conflicts.solve import Seat
from ..conflicts.wording import FRAMES, instruction
from ..errors import CurateError
from ..manifest.shards import Row, StageFolder
from .questions import Judge
from .tools import Tools

VERSION = 1
SALT = 1777
ASK = (
    "Write one instruction for a program that composes a single new picture from the {count} pictures above. A "
    "plain version is: {plain}\nUse its places and relations. Name every source by its number as 'image 1', each once. "
    'Invent a fitting scene, light and mood in one or two sentences. Answer as JSON: {{"instruction": "..."}}'
)


def prompt(stages: Stages, before: StageFolder, rules: Rules | None, tools: Tools) -> StageFolder:
    """Write the rows with `instruction`; a row without one has `keep` null."""
    kind = stages.prompt.kind
    judge = tools.judge if kind == "endpoint" else None
    if kind == "endpoint" and judge is None:
        raise CurateError("prompt.kind endpoint needs the section judge with base_url and model")
    wording = [rules.phrases, sorted(rules.person_categories)] if rules and kind != "drawn" else []
    settings = [kind, judge.key if judge else "", stages.seed, *wording]
    folder = StageFolder(stages.folder, "prompt", digest("prompt", VERSION, settings, before.content), before.count)
    progress = Progress("prompt", sum(1 for _ in before.rows()), unit="rows")
    if judge and judge.remote:
        pictures = [len(row["sources"]) for row in before.rows() if row["keep"] is True]
        print(transfer_notice(judge.asker.config, sum(pictures), len(pictures)))
    for index in range(before.count):
        rows = before.read(index)
        if judge is None and folder.done(index):
            progress.skip(len(rows))
            continue
        rows = [worded(row, kind, rules, stages.seed) for row in rows]
        if judge is not None:
            rows = _asked(rows, judge, tools, stages.folder)
        folder.write(index, rows)
        progress.add(len(rows))
    progress.close()
    return folder


def worded(row: Row, kind: str, rules: Rules | None, seed: int) -> Row:
    """Row with an instruction by templates."""
    row = {key: value for key, value in row.items() if key != "rejected"}
    if row["keep"] is not True:
        return row
    rng = np.random.default_rng([SALT, seed, row["row"]])
    try:
        if kind == "drawn":
            from ..synthesis.drawn import drawn_instruction

            text = drawn_instruction(row, rng)
        else:
            text = by_template(row, rules, rng)
        check_prompt(text, len(row["sources"]))
    except (BadRow, CurateError) as error:
        return {**row, "keep": False, "reason": f"no instruction: {error}"}
    return {**row, "instruction": text}


def by_template(row: Row, rules: Rules | None, rng: np.random.Generator) -> str:
    """Instruction out of the rules' phrases; for De&Re, whose sources have no slots, a list of them."""
    names = [source["name"] for source in row["sources"]]
    frame = FRAMES[int(rng.integers(len(FRAMES)))]
    if rules is None or "slots" not in row:
        listed = [f"the {name} from image {i}" for i, name in enumerate(names, 1)]
        return frame.format(listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}")
    seats = [Seat(tuple(slots), host) for slots, host in zip(row["slots"], row["hosts"], strict=True)]
    return instruction(rules, [source["category"] for source in row["sources"]], seats, names, frame)


def _asked(rows: Sequence[Row], judge: Judge, tools: Tools, out: Path) -> list[Row]:
    """Rows with the judge model's instruction in place of the template's; stored answers are not asked again."""
    key = f"prompt {VERSION} {judge.key}"
    ids = [digest(row["id"], row.get("instruction")) for row in rows]
    known = tools.scores.known(key, ids)
    new = [
        (one, row)
        for one, row in zip(ids, rows, strict=True)
        if row["keep"] is True and not isinstance(known.get(one), str)
    ]
    for one, value in in_order(partial(_written, judge, out), new, judge.asker.config.concurrency):
        known[one] = value
        tools.scores.add(key, {one: value})
    return [_with_text(row, known.get(one)) for one, row in zip(ids, rows, strict=True)]


def _with_text(row: Row, value: Any) -> Row:
    if row["keep"] is not True:
        return row
    if isinstance(value, str):
        return {**row, "plain_instruction": row["instruction"], "instruction": value}
    return {
        **row,
        "keep": None,
        "reason": f"the judge wrote no instruction: {(value or {}).get('failure', 'not asked')}",
    }


def _written(judge: Judge, out: Path, job: tuple[str, Row]) -> tuple[str, Any]:
    """Instruction by the judge model, or {"failure": reason}."""
    one, row = job
    try:
        pictures = [load_picture(out / source["path"], judge.asker.config.image_max_side) for source in row["sources"]]
        parts = [part for i, picture in enumerate(pictures, 1) for part in (f"Image {i}:", picture)]
        text = ASK.format(count=len(pictures), plain=row["instruction"])
        schema = object_schema({"instruction": {"type": "string"}})
        answer = judge.asker.ask(Question((*parts, text), schema))
        return one, checked(parse_object(answer.text).get("instruction"), len(pictures))
    except (AnswerError, UniPicError) as error:
        return one, {"failure": str(error)}


def checked(text: object, count: int) -> str:
    """Instruction that names every source by its number. Raises UniPicError."""
    check_prompt(text, count)
    assert isinstance(text, str)
    missing = [i for i in range(1, count + 1) if f"image {i}" not in text.lower()]
    if missing:
        raise UniPicError(f"the instruction does not name image {missing[0]}")
    return " ".join(text.split())
