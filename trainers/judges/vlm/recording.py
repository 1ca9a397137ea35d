"""Answers in a file: record them beside a server, replay them without one.

A recording is JSON lines: a head with the judge's settings and abilities, then one line per question that was asked.
Lines are appended and flushed one by one, so a run killed at any moment leaves a file that the next run goes on with.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from .client import Abilities, Asker
from .config import JudgeConfig, parse_judge
from .errors import AnswerError, FailureKind, JudgeError
from .question import Answer, Question, TokenChoice

HEAD = "judge recording"
FORMAT = 1
KEPT_TOKENS = 64
"""Log-probabilities are kept of the last tokens only: the answer follows the thinking."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file of lines; a last line that a kill cut short is left out.

    Raises JudgeError for a missing file and for a damaged line elsewhere.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JudgeError(f"cannot read {path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise JudgeError(f"{path}, line {number} is not JSON; remove the line or the file") from None
        if not isinstance(value, dict):
            raise JudgeError(f"{path}, line {number} is not a JSON object; remove the line or the file")
        yield value


class LineFile:
    """Append JSON objects, each safe on disk before ``add`` returns. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)

    def add(self, value: dict[str, Any]) -> None:
        """Raises JudgeError when the disk is full; what was written before stays readable."""
        line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                if self.path.exists():
                    os.truncate(self.path, before)
                raise JudgeError(
                    f"cannot write {self.path}: {error.strerror or error}; free some space and run again"
                ) from None


def _drop_cut_line(path: Path) -> None:
    """Remove a last line without its end."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


class Recorder:
    """Ask another asker and write down each answer and each failure of a question."""

    def __init__(self, asker: Asker, path: Path) -> None:
        self.asker, self.config = asker, asker.config
        known = list(read_lines(path)) if path.exists() else []
        self._file = LineFile(path)
        if not known:
            self._file.add({HEAD: FORMAT, "judge": self.config.public(), "abilities": vars(self.abilities)})

    @property
    def abilities(self) -> Abilities:
        return self.asker.abilities

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        seed = self.config.seed if seed is None else seed
        row = _row(question, self.config, seed)
        try:
            answer = self.asker.ask(question, seed)
        except AnswerError as error:
            self._file.add(row | {"failure": {"kind": error.kind, "message": str(error)}})
            raise
        row |= {"answer": answer.text, "model": answer.model, "seconds": answer.seconds, "tries": answer.tries}
        if answer.tokens:
            row["tokens"] = [[one.token, dict(one.alternatives)] for one in answer.tokens[-KEPT_TOKENS:]]
        self._file.add(row)
        return answer


def _row(question: Question, config: JudgeConfig, seed: int) -> dict[str, Any]:
    pictures = [{"sha256": one.digest, "size": one.size, "bytes": len(one.png)} for one in question.pictures]
    texts = [part for part in question.parts if isinstance(part, str)]
    key = question.key(config.model, config.temperature, seed)
    return {"key": key, "seed": seed, "texts": texts, "pictures": pictures}


class Replay:
    """Answers out of a recording; the last one of a key counts. ``config`` replaces the recorded settings."""

    def __init__(self, path: Path, config: JudgeConfig | None = None) -> None:
        self.path = path
        rows = read_lines(path)
        head = next(rows, {})
        if head.get(HEAD) != FORMAT:
            raise JudgeError(f"{path} is no recording of a judge; make one with --record")
        try:
            self.config = config or parse_judge(head["judge"], f"the judge in {path}")
            self.abilities = Abilities(**head["abilities"])
            self._rows: dict[str, dict[str, Any]] = {str(row["key"]): row for row in rows}
        except (KeyError, TypeError):
            raise JudgeError(f"{path} is a damaged recording; make it anew with --record") from None

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        """Raises JudgeError for a question that was never asked, AnswerError as it was recorded."""
        config = self.config
        key = question.key(config.model, config.temperature, config.seed if seed is None else seed)
        row = self._rows.get(key)
        if row is None:
            raise JudgeError(
                f"{self.path} has no answer for a question of this run (key {key}): pictures, template, seed or model "
                "differ from the recorded ones; score with --judge to ask the server"
            )
        failure = row.get("failure")
        if failure is not None:
            kind: FailureKind = failure["kind"] if failure.get("kind") in get_args(FailureKind) else "unparsed"
            raise AnswerError(kind, str(failure.get("message", "")))
        tokens = tuple(TokenChoice(token, others) for token, others in row.get("tokens", []))
        return Answer(str(row["answer"]), key, str(row.get("model", "")), float(row.get("seconds", 0)), tokens=tokens)
