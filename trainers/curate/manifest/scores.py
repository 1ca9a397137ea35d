"""Stored measurements: (measurement, picture) -> value, in one SQLite file.

Measurements are expensive and thresholds are not, so they are kept apart: another threshold measures nothing again, and
a kill loses a few seconds of work. Keys are digests of the picture's bytes, so renamed files are known too.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CurateError

AT_ONCE = 500
"""Keys per query."""

NOT_RUN = "not run"
"""Key of a stored value that says why there is no score. A later run tries again, unless the value is FINAL."""

FINAL = "final"
"""Key beside NOT_RUN where the pictures themselves give no score, as without transparency or without a face."""


def is_open(value: Any) -> bool:
    """True for a stored value without a score that a later run may replace."""
    return isinstance(value, dict) and NOT_RUN in value and not value.get(FINAL)


class Scores:
    """Store of one run; used by one process. Raises CurateError for a damaged file and a full disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._db = sqlite3.connect(path, timeout=60)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS scores (measure TEXT, picture TEXT, value TEXT,"
                " PRIMARY KEY (measure, picture)) WITHOUT ROWID"
            )
            self._db.commit()

    def known(self, measure: str, pictures: Sequence[str]) -> dict[str, Any]:
        """Stored values of these pictures."""
        found: dict[str, Any] = {}
        for at in range(0, len(pictures), AT_ONCE):
            some = pictures[at : at + AT_ONCE]
            marks = ",".join("?" * len(some))
            query = f"SELECT picture, value FROM scores WHERE measure = ? AND picture IN ({marks})"
            with self._errors():
                rows = self._db.execute(query, (measure, *some)).fetchall()
            found |= {picture: json.loads(value) for picture, value in rows}
        return found

    def final(self, measure: str, pictures: Sequence[str]) -> dict[str, Any]:
        """Stored values of these pictures that no later run replaces."""
        known = self.known(measure, pictures)
        return {key: value for key, value in known.items() if not is_open(value)}

    def add(self, measure: str, values: Mapping[str, Any]) -> None:
        """Store the values of one measurement."""
        self.add_all({measure: values})

    def add_all(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Store values by measurement and picture in one transaction: all of them or, on an error, none."""
        rows = [
            (measure, picture, json.dumps(value))
            for measure, found in values.items()
            for picture, value in found.items()
        ]
        with self._errors(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise CurateError(
                f"cannot use {self.path}: {error}; free some space and run the same command again to continue"
            ) from None
        except sqlite3.DatabaseError as error:
            raise CurateError(f"{self.path} is damaged ({error}); remove it, its measurements are made anew") from None
