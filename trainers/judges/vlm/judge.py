"""Judge one case: ask a template's questions, parse and combine the answers; None if an answer is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .client import Asker, object_schema
from .errors import AnswerError
from .grounding import changed_parts
from .parse import parse_lines, parse_named, parse_scores, parse_yes_no
from .pictures import Picture, encode_picture, side_by_side
from .probabilities import expected_digit, yes_probability
from .question import Answer, Part, Question
from .templates import SOURCE_KINDS, QuestionTemplate, Template
from .values import Combine, combine


@dataclass(frozen=True)
class Shown:
    """Pictures and texts of one case.

    ``captions``: one per source, for questions about a single source; ``kinds``: of each source, for templates that
    show or need sources of a kind.
    """

    instruction: str
    output: Picture
    sources: tuple[Picture, ...] = ()
    reference: Picture | None = None
    captions: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Answer to one question in one pass. value: combined, None after a failure. how: "text" or "logprobs".

    names: of the numbers, for answers by name.
    """

    question: str
    seed: int
    numbers: tuple[float, ...] = ()
    value: float | None = None
    how: str = "text"
    answer: str = ""
    key: str = ""
    seconds: float = 0.0
    failure: str | None = None
    message: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """score: 0..10, mean over the passes; None if any answer of any pass is missing. values: by question."""

    score: float | None
    values: Mapping[str, float | None]
    passes: tuple[float | None, ...]
    readings: tuple[Reading, ...] = field(repr=False)

    @property
    def failures(self) -> list[Reading]:
        return [one for one in self.readings if one.failure]

    def as_row(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge_case(asker: Asker, template: Template, shown: Shown) -> Judgement:
    """Ask every question of the template in every pass. Raises only JudgeError."""
    config = asker.config
    readings: list[Reading] = []
    passes: list[float | None] = []
    for which in range(config.passes):
        answers = _one_pass(asker, template, shown, config.seed + which)
        readings += answers
        values = [None if one.value is None else _scaled(template, one) for one in answers]
        passes.append(_combined(values, template.overall))
    by_question = {
        one.id: _combined([r.value for r in readings if r.question.split("#")[0] == one.id], "mean")
        for one in template.questions
    }
    return Judgement(_combined(passes, "mean"), by_question | named_values(readings), tuple(passes), tuple(readings))


def named_values(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Mean over the passes of each number that has a name."""
    found: dict[str, list[float]] = {}
    for reading in readings:
        for name, number in zip(reading.names, reading.numbers, strict=bool(reading.names)):
            found.setdefault(name, []).append(number)
    return {name: _combined(numbers, "mean") for name, numbers in found.items()}


def _one_pass(asker: Asker, template: Template, shown: Shown, seed: int) -> list[Reading]:
    crops: tuple[Part, ...] = ()
    if template.grounded:
        try:
            crops = changed_parts(asker, shown.sources, shown.output, seed)
        except AnswerError as error:
            return [Reading("boxes", seed, failure=error.kind, message=str(error))]
    readings = []
    for question in template.questions:
        for index in range(len(shown.sources)) if question.per_source else (None,):
            readings.append(ask_question(asker, question, shown, seed, index, crops))
    return readings


def ask_question(
    asker: Asker,
    question: QuestionTemplate,
    shown: Shown,
    seed: int,
    index: int | None = None,
    crops: Sequence[Part] = (),
) -> Reading:
    """Ask one question, about source ``index`` if given. A failure is part of the reading."""
    name = question.id if index is None else f"{question.id}#{index + 1}"
    try:
        asked = build_question(question, shown, index, crops)
        answer = asker.ask(asked, seed)
    except AnswerError as error:
        return Reading(name, seed, failure=error.kind, message=str(error))
    try:
        numbers, how = read_numbers(question, answer, shown)
    except AnswerError as error:
        return Reading(name, seed, answer=answer.text, key=answer.key, failure=error.kind, message=str(error))
    value = combine(numbers, question.combine)
    names = answer_names(question, shown) if question.kind == "named" else ()
    return Reading(name, seed, tuple(numbers), value, how, answer.text, answer.key, answer.seconds, names=names)


def answer_names(question: QuestionTemplate, shown: Shown) -> tuple[str, ...]:
    """Names of the expected numbers, without those whose kind of source the case lacks."""
    return tuple(name for name in question.answers if question.needs.get(name) in (None, *shown.kinds))


def answer_count(question: QuestionTemplate, shown: Shown) -> int:
    """Number of expected numbers: the named ones, and one per source if the template asks for it."""
    return len(answer_names(question, shown)) + (len(shown.sources) if question.per_source_answers else 0)


def build_question(
    question: QuestionTemplate, shown: Shown, index: int | None = None, crops: Sequence[Part] = ()
) -> Question:
    """Assemble texts and pictures in order. Raises AnswerError if a picture is missing."""
    parts: list[Part] = [question.rules.strip()] if question.rules.strip() else []
    pictures = [labelled for role in question.pictures for labelled in _pictures(role, shown, index)]
    caption = shown.captions[index] if index is not None and index < len(shown.captions) else "the main subject"
    placeholders = {
        "count": str(len(shown.sources)),
        "caption": caption,
        "answers": ", ".join(answer_names(question, shown)),
        "instruction": shown.instruction,
    }
    ask = question.ask.strip()
    for key, text in placeholders.items():
        ask = ask.replace("{" + key + "}", text)
    if question.text_file and question.kind != "named":
        return Question((ask, *(picture for _, picture in pictures)), first_tokens=question.kind in ("yes_no", "digit"))
    for label, picture in pictures:
        parts += [label, picture]
    parts += [*crops, ask]
    return Question(tuple(parts), _schema(question, shown), first_tokens=question.kind in ("yes_no", "digit"))


def _schema(question: QuestionTemplate, shown: Shown) -> dict[str, Any] | None:
    """JSON schema of the answer: reasoning first, so that the numbers follow from it."""
    if question.kind == "named":
        named: dict[str, Any] = {name: {"type": "number"} for name in answer_names(question, shown)}
        return object_schema({"reasoning": {"type": "string"}} | named)
    if question.kind != "scores":
        return None
    count = answer_count(question, shown)
    numbers = {"type": "array", "items": {"type": "number"}, "minItems": count, "maxItems": count}
    return object_schema({"reasoning": {"type": "string"}, "score": numbers})


def _pictures(role: str, shown: Shown, index: int | None) -> list[tuple[str, Picture]]:
    if role == "output":
        return [("The picture to judge:", shown.output)]
    if role == "reference":
        if shown.reference is None:
            raise AnswerError("picture", "this template needs a reference picture, got none")
        return [("The reference picture:", shown.reference)]
    if role in SOURCE_KINDS:
        found = [one for one, kind in zip(shown.sources, shown.kinds, strict=False) if kind == role]
        return [(f"The {role} reference{f' {i}' * (len(found) > 1)}:", one) for i, one in enumerate(found, 1)]
    if not shown.sources:
        raise AnswerError("picture", "this template needs a source picture, got none")
    if role == "sources_row":
        row = side_by_side([one.image for one in shown.sources])
        return [("The source pictures, numbered from the left:", encode_picture(row))]
    if role == "source":
        return [("The source picture:", shown.sources[index or 0])]
    return [(f"Source picture {number}:", one) for number, one in enumerate(shown.sources, 1)]


def read_numbers(question: QuestionTemplate, answer: Answer, shown: Shown) -> tuple[list[float], str]:
    """Read the numbers of an answer and their origin, "logprobs" or "text". Raises AnswerError."""
    count = answer_count(question, shown)
    if question.kind == "named":
        return parse_named(answer.text, answer_names(question, shown), question.low, question.high), "text"
    if question.kind == "yes_no":
        share = yes_probability(answer.tokens)
        if share is not None:
            return [share], "logprobs"
        return [float(parse_yes_no(answer.text))], "text"
    if question.kind == "digit":
        digit = expected_digit(answer.tokens, int(question.low), int(question.high))
        if digit is not None:
            return [digit], "logprobs"
        text = answer.text if "[" in answer.text else f"[{answer.text.strip().rstrip('.')}]"
        return parse_scores(text, 1, question.low, question.high), "text"
    if question.kind == "lines":
        return parse_lines(answer.text, count, question.low, question.high), "text"
    return parse_scores(answer.text, count, question.low, question.high), "text"


def _scaled(template: Template, reading: Reading) -> float:
    """Scale a value to 0..10."""
    assert reading.value is not None
    question = next(one for one in template.questions if one.id == reading.question.split("#")[0])
    return 10 * reading.value / (1.0 if question.kind == "yes_no" else question.high)


def _combined(values: Sequence[float | None], how: Combine) -> float | None:
    """Combine values; None without any, or if one is missing."""
    known = [one for one in values if one is not None]
    return combine(known, how) if values and len(known) == len(values) else None
