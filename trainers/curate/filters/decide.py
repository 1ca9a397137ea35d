"""Decisions: scores and thresholds become `filters`, `keep` and `reason` of a manifest row.

keep is true if every filter that applies passed, false if one dropped the picture, null if one did not run: a filter
that did not run never counts as passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...digests import digest
from ..manifest.scores import NOT_RUN, Scores
from ..manifest.shards import Row
from .calibration import Calibration
from .catalogue import Filter
from .duplicates import Duplicates

Values = Mapping[str, Mapping[str, Any]]
"""filter name -> picture -> stored value."""


class Decisions:
    """Decisions of one stage, row by row in order. calibration: of `clutter`."""

    def __init__(self, filters: Sequence[Filter], calibration: Calibration | None = None) -> None:
        self.filters, self.calibration = filters, calibration
        self.duplicates = Duplicates(next((one.least or 0.0 for one in filters if one.name == "duplicates"), 0.0))

    def decide(self, row: Row, values: Values) -> Row:
        """Row with verdicts. A row that is dropped already, such as an unreadable picture, stays as it is."""
        if row["keep"] is not True:
            return row
        verdicts: dict[str, Row] = {}
        for one in self.filters:
            if row["subject"] in one.subjects and one.name != "duplicates":
                verdicts[one.name] = self._verdict(one, values[one.name].get(store_id(one, row)))
        self._add_duplicates(row, values, verdicts)
        return {**row, "filters": verdicts, **outcome(verdicts)}

    def _verdict(self, one: Filter, value: Any) -> Row:
        if value is None or (isinstance(value, dict) and NOT_RUN in value):
            missing = "no judge is configured" if one.rank == "endpoint" else "it was not measured"
            why = missing if value is None else value[NOT_RUN]
            return {"score": None, "keep": None, "reason": f"{one.name} {NOT_RUN}: {why}", "rank": one.rank}
        if one.name == "clutter":
            assert self.calibration is not None
            value = self.calibration.rank(value)
        score = float(value)
        reason = one.reason(score)
        return {"score": score, "keep": not reason, "reason": reason, "rank": one.rank}

    def _add_duplicates(self, row: Row, values: Values, verdicts: dict[str, Row]) -> None:
        """Compare with the pictures that stayed so far; one that a local filter drops is no original."""
        one = next((each for each in self.filters if each.name == "duplicates"), None)
        if one is None or row["subject"] not in one.subjects:
            return
        value = values[one.name].get(row["id"])
        if value is None or NOT_RUN in value:
            verdicts[one.name] = self._verdict(one, value)
            return
        bits, original = self.duplicates.nearest(value)
        reason = f"a near duplicate of row {original} ({bits} bits differ)" if one.reason(float(bits)) else ""
        verdicts[one.name] = {"score": float(bits), "keep": not reason, "reason": reason, "rank": one.rank}
        local = {name: verdict for name, verdict in verdicts.items() if verdict["rank"] != "endpoint"}
        if outcome(local)["keep"] is not False:
            self.duplicates.add(value, row["row"])


def outcome(verdicts: Mapping[str, Row]) -> Row:
    """keep and reason of a row: the first filter that dropped it, else the first that did not run."""
    for verdict in (False, None):
        for one in verdicts.values():
            if one["keep"] is verdict:
                return {"keep": verdict, "reason": one["reason"]}
    return {"keep": True, "reason": ""}


def values_of(
    scores: Scores, filters: Sequence[Filter], rows: Sequence[Row], key_of: Callable[[Filter], str]
) -> dict[str, dict[str, Any]]:
    """Stored values of these rows by filter. key_of: the key of a filter's values in the store."""
    return {one.name: scores.known(key_of(one), [store_id(one, row) for row in rows]) for one in filters}


def store_id(one: Filter, row: Row) -> str:
    """Key of a row's value in the store: its picture, and the sources, instruction or name that the filter needs."""
    if one.needs_sources:
        return digest(row["id"], row.get("instruction"), [source["id"] for source in row.get("sources", [])])
    return digest(row["id"], row["name"]) if one.asks_by_name else str(row["id"])
