"""Summary of a stage: rows kept, dropped and not run, in all and by filter, with the commonest reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unipic_core.errors import printable

from .shards import Row

VERDICTS = {True: "kept", False: "dropped", None: "not run"}
SHOWN = 3
MOST_REASONS = 1000


@dataclass
class StageSummary:
    """Counts of one stage. rows, filters: by verdict; ranks: of the filters; rejected: proposals by conflict rule."""

    name: str
    rows: Counter[str] = field(default_factory=Counter)
    filters: dict[str, Counter[str]] = field(default_factory=dict)
    ranks: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, name: str, rows: Iterable[Row]) -> StageSummary:
        """Count rows."""
        summary = cls(name)
        for row in rows:
            summary.rows[VERDICTS[row["keep"]]] += 1
            summary.rejected.update(row.get("rejected", {}))
            for one, verdict in row.get("filters", {}).items():
                summary.filters.setdefault(one, Counter())[VERDICTS[verdict["keep"]]] += 1
                summary.ranks[one] = verdict["rank"]
            shown = row["keep"] is not True and not row.get("filters")
            if shown and (len(summary.reasons) < MOST_REASONS or row["reason"] in summary.reasons):
                summary.reasons[row["reason"]] += 1
        return summary

    def as_row(self) -> dict[str, Any]:
        """Plain values for JSON."""
        filters = {name: {"rank": self.ranks[name], **dict(counts)} for name, counts in self.filters.items()}
        values: dict[str, Any] = {"stage": self.name, **dict(self.rows)}
        values |= {"filters": filters} if filters else {}
        values |= {"rejected": dict(self.rejected.most_common())} if self.rejected else {}
        return values | ({"reasons": dict(self.reasons.most_common(50))} if self.reasons else {})

    def text(self) -> str:
        """Lines for the terminal."""
        counts = ", ".join(f"{self.rows[verdict]:,} {verdict}" for verdict in VERDICTS.values() if self.rows[verdict])
        lines = [f"{self.name}: {counts or 'no rows'}"]
        for name, found in self.filters.items():
            verdicts = ", ".join(f"{found[verdict]:,} {verdict}" for verdict in VERDICTS.values() if found[verdict])
            lines.append(f"  {name} ({self.ranks[name]}): {verdicts}")
        if self.rejected:
            shown = ", ".join(f"{rule} {count:,}" for rule, count in self.rejected.most_common(8))
            lines.append(f"  proposals that the rules refused: {shown}")
        lines += [f"  {count:,} x {reason}" for reason, count in self.reasons.most_common(SHOWN)]
        if len(self.reasons) > SHOWN:
            lines.append(f"  and {len(self.reasons) - SHOWN:,} more reasons, in the manifest")
        return printable("\n".join(lines), keep="\n")
