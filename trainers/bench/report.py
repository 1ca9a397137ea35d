"""Report of a run: tables, result files in the benchmarks' formats, page and sheet."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from unipic_core import __version__
from unipic_core.replacing import replacing, write_json

from ..judges.statistics import Bootstrap, interval, rounded
from .aggregates import COMPLETE, Scored, aggregate, columns, group_means, mean, without_none
from .benchmark_files import write_benchmark_files
from .cases import Plan
from .make import described, result_path
from .page import page
from .pictures import sheet
from .pixels import PIXELS
from .score import Rows, all_rows
from .setup import read_by_judge


def report(out: Path) -> dict[str, Any]:
    """Write report.json, report.html, cases.jsonl, sheet.png and the benchmark's files; return report.json.

    The benchmark's files have one place, so they are of the judge that scored last. Raises JudgeError.
    """
    plan, rows = Plan.load(out), all_rows(out)
    pixel_judges = read_by_judge(out / "pixel_controls.json")
    not_reported = {judge: tested["note"] for judge, tested in pixel_judges.items() if not tested["valid"]}
    judges = sorted(
        {judge for _, _, judge in rows} - not_reported.keys(), key=lambda one: (one.startswith(PIXELS), one)
    )
    summary: dict[str, Any] = {
        "bench": plan.bench,
        "version": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "seed": plan.seed,
        "cases": len(plan.cases),
        "not_covered": list(plan.not_covered),
        "systems": described(plan),
        "judges": read_by_judge(out / "judge.json"),
        "controls": read_by_judge(out / "controls.json"),
        "scores": {judge: summarise(plan, rows, judge) for judge in judges},
        "lower_is_better": sorted(judge for judge, tested in pixel_judges.items() if tested["better"] == "lower"),
        "not_reported": not_reported,
    }
    write_json(out / "report.json", summary, indent=1)
    scored_last = [name for name in summary["judges"] if name in judges][-1:]
    for judge in scored_last:
        write_benchmark_files(plan, rows, judge, out)
    with replacing(out / "cases.jsonl") as path:
        path.write_text("".join(f"{json.dumps(one)}\n" for one in case_rows(plan, rows, out)), encoding="utf-8")
    with replacing(out / "report.html") as path:
        path.write_text(page(plan, rows, summary, out), encoding="utf-8", errors="replace")
    with replacing(out / "sheet.png") as path:
        sheet(plan, rows, out).save(path)
    return summary


def commit() -> str | None:
    """Commit of this project's checkout; None for an installed package."""
    top = Path(__file__).parents[2]
    if not (top / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=top, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def case_rows(plan: Plan, rows: Rows, out: Path) -> Iterator[dict[str, Any]]:
    """Row per case, system and judge: the case, the picture, and all that scores.jsonl has about it."""
    for case in plan.cases:
        about = {"id": case.id, "task": case.task, "n_refs": len(case.sources), "instruction": case.instruction}
        about |= {"sources": list(case.sources), "truth": case.truth}
        for (label, name, judge), row in rows.items():
            if name == case.id:
                path = result_path(out, label, case)
                seconds = sum(one["seconds"] for one in row.get("readings", ()))
                yield {**about, "system": label, "judge": judge, "output": str(path), **row, "seconds": seconds}


def summarise(plan: Plan, rows: Rows, judge: str) -> dict[str, Any]:
    """Summarise per system: the benchmark's aggregate, by task and number of sources, failures, paired difference."""
    bootstrap = Bootstrap(len(plan.cases), plan.seed)
    bench = "own" if judge.startswith(PIXELS) else plan.bench
    first: np.ndarray | None = None
    result: dict[str, Any] = {}
    for label in plan.systems:
        judged = [rows.get((label, case.id, judge), {}) for case in plan.cases]
        scored = [
            Scored(case.task, len(case.sources), row.get("score"), row.get("values", {}), case.extra)
            for case, row in zip(plan.cases, judged, strict=True)
        ]
        table = np.array(list(columns(bench, scored).values()), float).T
        total = aggregate(bench, scored)
        result[label] = {
            "name": total.name,
            "value": total.value,
            **intervals(table, first, bootstrap, bench in COMPLETE),
            "judged": f"{total.judged} of {total.total}",
            "mean_over_cases": mean(without_none(one.score for one in scored)),
            "by_task": dict(total.groups),
            "by_sources": group_means(scored, lambda one: one.score, lambda one: str(one.sources)),
            "parts": total.parts,
            "failures": count_failures(judged),
            "read_from": dict(Counter(how for row in judged for how in ways_of_reading(row))),
            **repeatability([row.get("passes", ()) for row in judged if row.get("score") is not None]),
        }
        first = table if first is None else first
    return result


def intervals(table: np.ndarray, first: np.ndarray | None, bootstrap: Bootstrap, complete: bool) -> dict[str, Any]:
    """95% interval of an aggregate, and its paired difference from the first system's over cases that both score.

    table, first: scores [n, k] by column (``columns``), NaN if missing; complete: as ``mean_of_columns``.
    """
    gap = None if first is None else bootstrap.mean_of_columns(table - first, complete)
    return {
        "ci95": interval(bootstrap.mean_of_columns(table, complete)),
        "minus_first": rounded(gap),
        "minus_first_ci95": interval(gap),
    }


def count_failures(judged: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Numbers of rows without a score by kind of failure; {} is a row that was never scored."""
    missing = (row for row in judged if row.get("score") is None)
    return dict(Counter(str(row.get("failure", "nothing to judge" if row else "not scored")) for row in missing))


def ways_of_reading(row: dict[str, Any]) -> list[str]:
    """Origin of each answer of a row that was read: "text" or "logprobs"."""
    return [one["how"] for one in row.get("readings", ()) if one["numbers"]]


def repeatability(passes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Standard deviation between a case's passes, mean over cases, and the share of cases where all are equal."""
    several = [np.array(scores) for scores in passes if len(scores) > 1]
    if not several:
        return {}
    deviations = [float(scores.std(ddof=1)) for scores in several]
    ties = sum(deviation == 0 for deviation in deviations) / len(several)
    return {"sd_between_passes": sum(deviations) / len(several), "equal_passes": ties}
