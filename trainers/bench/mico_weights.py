"""Weights W of MICo-Bench: the share of a case's sources that is found in the picture.

The benchmark asks ArcFace about persons (cosine similarity in steps) and a vision-language model about the rest;
its script writes weights/TASK.json. ``judged_weight`` asks the judge about both, so its W is not the benchmark's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from ..judges.vlm import Asker, JudgeError, Shown, ask_question, load_template
from ..judges.vlm.templates import Template
from .cases import Case

HIGHEST_DIGIT = 9


def read_weights(folder: Path) -> dict[str, float]:
    """Read weights/TASK.json of the benchmark as "TASK/ID" -> weight in 0..1. Raises JudgeError."""
    weights: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            values = {f"{path.stem}/{name}": float(value) for name, value in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            raise JudgeError(f"{path} holds no weights; expected a JSON object with a number per case") from None
        outside = [name for name, value in values.items() if not 0 <= value <= 1]
        if outside:
            raise JudgeError(f"{path}: expected weights from 0 to 1, got {values[outside[0]]:g} for {outside[0]}")
        weights |= values
    if not weights:
        raise JudgeError(f"{folder} holds no weights; expected TASK.json with a number per case")
    return weights


@cache
def weight_templates() -> tuple[Template, Template]:
    """Questions about a person's identity and about another source's presence."""
    return load_template("identity"), load_template("presence")


def judged_weight(asker: Asker, case: Case, shown: Shown) -> tuple[float | None, list[dict[str, Any]]]:
    """W by the judge and its readings: per source the certainty of the person's identity, or of presence, in 0..1.

    None if an answer is missing.
    """
    identity, presence = weight_templates()
    persons = set(case.extra.get("persons", ()))
    shares: list[float | None] = []
    readings = []
    for index in range(len(case.sources)):
        (question,) = (identity if index in persons else presence).questions
        reading = ask_question(asker, question, shown, asker.config.seed, index)
        high = HIGHEST_DIGIT if index in persons else 1
        shares.append(None if reading.value is None else reading.value / high)
        readings.append({"question": reading.question, "answer": reading.answer, "failure": reading.failure})
    known = [share for share in shares if share is not None]
    return (sum(known) / len(known) if known and len(known) == len(shares) else None), readings
