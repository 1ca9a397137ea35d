"""Questions to the user's judge about pictures that the other filters let through."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...judges.vlm import (
    AnswerError,
    Asker,
    Client,
    Recorder,
    Replay,
    Shown,
    Template,
    in_order,
    load_picture,
    parse_judge,
    transfer_notice,
)
from ...judges.vlm.judge import ask_question
from ...judges.vlm.templates import FOLDER, read_template
from ...progress import Progress
from ..errors import CurateError
from ..filters.catalogue import Filter
from ..filters.decide import store_id
from ..filters.measure import ROWS_AT_ONCE
from ..manifest.scores import NOT_RUN, Scores
from ..manifest.shards import Row, batches

QUESTIONS = Path(__file__).parents[1] / "questions"


@dataclass(frozen=True)
class Judge:
    """Judge of a run. remote: a server, not a recording."""

    asker: Asker
    remote: bool

    @property
    def key(self) -> str:
        """Settings on which answers depend."""
        config = self.asker.config
        named = ("temperature", "seed", "image_max_side")
        others = {name: value for name, value in config.changed_settings().items() if name not in named}
        key = f"{config.model} {config.temperature:g} {config.seed} {config.image_max_side}"
        return f"{key} {json.dumps(others, sort_keys=True)}" if others else key


def open_judge(settings: Mapping[str, Any]) -> Judge | None:
    """Judge of the section `judge`; None if it is empty. Raises CurateError or JudgeError in one sentence."""
    if not settings:
        return None
    values = dict(settings)
    for name in ("passes", "template"):
        if values.get(name) is not None:
            raise CurateError(
                f"judge.{name} has no effect here: each filter asks a question of its own, once; remove it"
            )
    record, replay = values.pop("record", None), values.pop("replay", None)
    if replay is not None:
        if record is not None:
            raise CurateError("judge takes either record or replay, got both; remove one")
        return Judge(Replay(Path(replay), parse_judge(values) if values else None), remote=False)
    client: Asker = Client(parse_judge(values))
    return Judge(Recorder(client, Path(record)) if record else client, remote=True)


@lru_cache(maxsize=32)
def template_of(name: str) -> Template:
    """Question file of a filter: of this package, else of the judge's templates."""
    path = QUESTIONS / f"{name}.yaml"
    return read_template(path if path.is_file() else FOLDER / f"{name}.yaml")


def with_judge(one: Filter, judge: Judge | None) -> str:
    """Key of a filter's answers in the store."""
    return f"{one.key} {template_of(one.name).version} {judge.key}" if judge else one.key


def ask_about_pictures(
    rows: Callable[[], Iterable[Row]],
    filters: Sequence[Filter],
    scores: Scores,
    judge: Judge | None,
    out: Path,
    title: str,
) -> None:
    """Ask what is not stored. rows: with `keep` after the local filters. Raises JudgeError if the server is lost."""
    asked = [one for one in filters if one.rank == "endpoint"]
    if not asked or judge is None:
        return
    questions = pictures = 0
    for one, row in _jobs(rows(), asked, scores, judge):
        questions, pictures = questions + 1, pictures + 1 + (len(row["sources"]) if one.needs_sources else 0)
    if questions and judge.remote:
        print(transfer_notice(judge.asker.config, pictures, questions))
    progress = Progress(f"{title}, questions", questions, unit="questions")
    answer = partial(_answer, judge, out)
    jobs = _jobs(rows(), asked, scores, judge)
    for one, key, value in in_order(answer, jobs, judge.asker.config.concurrency):
        scores.add(with_judge(one, judge), {key: value})
        progress.add()
    progress.close()


def _jobs(rows: Iterable[Row], filters: Sequence[Filter], scores: Scores, judge: Judge) -> Iterator[tuple[Filter, Row]]:
    """Yield the questions whose answers are not stored."""
    for some in batches(rows, ROWS_AT_ONCE):
        for one in filters:
            fitting = [row for row in some if row["keep"] is not False and row["subject"] in one.subjects]
            known = scores.final(with_judge(one, judge), [store_id(one, row) for row in fitting])
            for row in fitting:
                if store_id(one, row) not in known:
                    wanted = ("id", "path", "name", "category", "instruction", "sources")
                    yield one, {key: row[key] for key in wanted if key in row}


def _answer(judge: Judge, out: Path, job: tuple[Filter, Row]) -> tuple[Filter, str, Any]:
    """Score of one picture, or {"not run": reason}."""
    one, row = job
    key = store_id(one, row)
    try:
        return one, key, _score(judge, out, one, row)
    except AnswerError as error:
        return one, key, {NOT_RUN: str(error)}


def _score(judge: Judge, out: Path, one: Filter, row: Row) -> float:
    """Ask one question; of several sources the lowest answer counts. Raises AnswerError."""
    side = judge.asker.config.image_max_side
    sources = [source for source in row.get("sources", []) if one.name != "identity" or source["subject"] == "person"]
    captions = tuple(f"the {source['name']}" for source in sources)
    shown = Shown(
        row.get("instruction", ""),
        load_picture(out / row["path"], side),
        tuple(load_picture(out / source["path"], side) for source in sources) if one.needs_sources else (),
        captions=captions if one.needs_sources else (f"the {row['name']}",),
    )
    question = template_of(one.name).questions[0]
    if question.per_source and not shown.sources:
        raise AnswerError("picture", "there is no source to ask about")
    answers = []
    for index in range(len(shown.sources)) if question.per_source else (None if one.needs_sources else 0,):
        reading = ask_question(judge.asker, question, shown, judge.asker.config.seed, index)
        if reading.value is None:
            raise AnswerError("unparsed", f"{reading.failure}: {reading.message}")
        answers.append(reading.value)
    return float(f"{min(answers):.6g}")
