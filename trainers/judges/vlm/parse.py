"""Parse numbers and decisions from a judge's text. Unparsable answers raise AnswerError; nothing is guessed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import AnswerError, FailureKind, one_line

REFUSAL = re.compile(
    r"\b(?:I(?:'|’)?m sorry|I am sorry|I cannot|I can(?:'|’)?t|(?:I(?:'|’)?m|I am) (?:not able|unable))\b",
    re.I,
)
SCORE_LIST = re.compile(r'"score"\s*:\s*(\[[^\[\]]*\])')
SCORE_NUMBER = re.compile(r'"score"\s*:\s*(-?\d+(?:\.\d+)?)')
NUMBER_LIST = re.compile(r"\[\s*-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)*\s*\]")
NAMED_LINE = re.compile(r"^\W*([A-Za-z][\w ,&/-]*?)\W*:\W*(\d+(?:\.\d+)?)(?:\s*/\s*\d+)?\W*$")


def without_thinking(text: str) -> str:
    """Text after a thinking model's reasoning. Raises AnswerError if the reasoning does not end."""
    rest = re.split(r"</think(?:ing)?>", text)[-1]
    if re.search(r"<think(?:ing)?>", rest):
        raise AnswerError("cut", "the answer ends inside its thinking; increase judge.max_tokens")
    return rest.strip()


def _unreadable(text: str, expected: str) -> NoReturn:
    kind: FailureKind = "refused" if REFUSAL.search(text) else "unparsed"
    raise AnswerError(kind, f"expected {expected}, got {one_line(text, 120)!r}")


def parse_scores(text: str, count: int, low: float = 0, high: float = 10) -> list[float]:
    """Parse ``count`` numbers in [low, high]: the last "score" list, else the last list of numbers.

    For one number, also a "score" without brackets. Raises AnswerError; never clips or fills in.
    """
    answer = without_thinking(text)
    found = SCORE_LIST.findall(answer) or NUMBER_LIST.findall(answer)
    if not found and count == 1:
        found = [f"[{number}]" for number in SCORE_NUMBER.findall(answer)]
    expected = f"{count} number{'s' * (count != 1)} from {low:g} to {high:g}"
    if not found:
        _unreadable(answer, expected)
    try:
        values = json.loads(found[-1])
    except ValueError:
        _unreadable(answer, expected)
    if len(values) != count or not all(_is_number(value) and low <= value <= high for value in values):
        _unreadable(found[-1], expected)
    return [float(value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_lines(text: str, count: int, low: float = 1, high: float = 5) -> list[float]:
    """Parse the last ``count`` lines "Name: number" (ImgEdit's format). Raises AnswerError."""
    answer = without_thinking(text)
    found = [float(match[2]) for line in answer.splitlines() if (match := NAMED_LINE.match(line.strip()))]
    if len(found) < count or not all(low <= value <= high for value in found[-count:]):
        _unreadable(answer, f"{count} lines 'Name: number' from {low:g} to {high:g}")
    return found[-count:]


def parse_named(text: str, names: Sequence[str], low: float = 0, high: float = 10) -> list[float]:
    """Parse the numbers of a JSON object by name: {"NAME": number} or {"NAME": {"score": number}}, others ignored.

    Raises AnswerError if one is missing or outside [low, high].
    """
    found = parse_object(text)
    numbers = []
    for name in names:
        value = found.get(name)
        value = value.get("score") if isinstance(value, dict) else value
        if value is None or not _is_number(value) or not low <= value <= high:
            _unreadable(text, f"{name}, a number from {low:g} to {high:g}")
        numbers.append(float(value))
    return numbers


def parse_yes_no(text: str) -> bool:
    """True for yes. Raises AnswerError if the text has neither or both; JSON {"answer": "yes"} is accepted."""
    answer = without_thinking(text)
    words = set(re.findall(r"\b(yes|no)\b", answer.lower()))
    first = re.match(r"\W*(yes|no)\W*[.,;:!\n]", answer.lower())
    if first and len(words) == 2:
        words = {first[1]}  # "No, yes-sayers aside": the decision comes first
    if len(words) != 1:
        _unreadable(answer, "yes or no")
    return words == {"yes"}


def parse_object(text: str) -> dict[str, Any]:
    """Parse the last JSON object of the text, ignoring fences and text around it. Raises AnswerError."""
    answer = without_thinking(text)
    decoder = json.JSONDecoder()
    found, at = None, answer.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            end = at + 1
        at = answer.find("{", end)
    if not isinstance(found, dict):
        _unreadable(answer, "a JSON object")
    return found


def parse_boxes(text: str, most: int = 4, grid: int = 1000) -> list[tuple[float, float, float, float]]:
    """Parse boxes left, top, right, bottom in 0..1 from {"boxes": [[x1, y1, x2, y2], ...]} on a grid of 0..1000.

    At most ``most``, in their order; [] if nothing changed. Raises AnswerError.
    """
    boxes = parse_object(text).get("boxes")
    expected = f"boxes of four numbers from 0 to {grid}"
    if not isinstance(boxes, list):
        _unreadable(text, expected)
    result = []
    for box in boxes[:most]:
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) and 0 <= v <= grid for v in box):
            _unreadable(str(box), expected)
        left, top, right, bottom = box
        if left >= right or top >= bottom:
            _unreadable(str(box), "a box whose right and lower sides come last")
        result.append((left / grid, top / grid, right / grid, bottom / grid))
    return result
