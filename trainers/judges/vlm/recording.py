"""Record answers of a server, and replay them without one.

A recording is JSON lines: a head with the judge's settings and abilities, then one line per question. Lines are
flushed one by one, so a killed run leaves a file that the next run continues.
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
STORED_TOKENS = 64
"""Log-probabilities are stored for the last tokens only: the answer follows the thinking."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a file of lines, without an incomplete last line of a killed run.

    Raises JudgeError for a missing file and for other damaged lines.
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
    """Append JSON objects, each synced to disk before ``add`` returns; thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)

    def add(self, value: dict[str, Any]) -> None:
        """Append one object. Raises JudgeError on a full disk; earlier lines stay readable."""
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
    """Remove an incomplete last line."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


class Recorder:
    """Asker that records each answer and failure of another asker."""

    def __init__(self, asker: Asker, path: Path) -> None:
        self.asker, self.config = asker, asker.config
        self._has_head = path.exists() and any(True for _ in read_lines(path))
        self._file = LineFile(path)
        self._lock = threading.Lock()

    @property
    def abilities(self) -> Abilities:
        return self.asker.abilities

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        seed = self.config.seed if seed is None else seed
        row = _row(question, self.config, seed)
        self._write_head()
        try:
            answer = self.asker.ask(question, seed)
        except AnswerError as error:
            self._file.add(row | {"failure": {"kind": error.kind, "message": str(error)}})
            raise
        row |= {"answer": answer.text, "model": answer.model, "seconds": answer.seconds, "tries": answer.tries}
        if answer.tokens:
            row["tokens"] = [[one.token, dict(one.alternatives)] for one in answer.tokens[-STORED_TOKENS:]]
        self._file.add(row)
        return answer

    def _write_head(self) -> None:
        """Write the head before the first answer; nothing is asked of the server before that."""
        with self._lock:
            if not self._has_head:
                self._file.add({HEAD: FORMAT, "judge": self.config.public(), "abilities": vars(self.abilities)})
                self._has_head = True


def _row(question: Question, config: JudgeConfig, seed: int) -> dict[str, Any]:
    pictures = [{"sha256": one.digest, "size": one.size, "bytes": len(one.png)} for one in question.pictures]
    texts = [part for part in question.parts if isinstance(part, str)]
    key = question.key(config.model, config.temperature, seed)
    return {"key": key, "seed": seed, "texts": texts, "pictures": pictures}


class Replay:
    """Asker that replays a recording; the last answer of a key counts. ``config`` replaces the recorded settings."""

    def __init__(self, path: Path, config: JudgeConfig | None = None) -> None:
        self.path = path
        rows = read_lines(path)
        head = next(rows, {})
        if head.get(HEAD) != FORMAT:
            raise JudgeError(f"{path} is not a recording of a judge; make one with --record")
        try:
            self.config = config or parse_judge(head["judge"], f"the judge in {path}")
            self.abilities = Abilities(**head["abilities"])
            self._rows: dict[str, dict[str, Any]] = {str(row["key"]): row for row in rows}
        except (KeyError, TypeError):
            raise JudgeError(f"{path} is a damaged recording; make it again with --record") from None

    def ask(self, question: Question, seed: int | None = None) -> Answer:
        """Return the recorded answer. Raises JudgeError for an unrecorded question, and recorded AnswerErrors."""
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
