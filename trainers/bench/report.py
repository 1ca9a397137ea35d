"""Report of a run: tables, result files in the benchmarks' formats, page and sheet."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from unipic_core import __version__
from unipic_core.replacing import replacing

from ..judges.statistics import Bootstrap, interval, rounded
from .aggregates import Scored, aggregate
from .cases import MICO_TASKS, Case, Plan, file_name
from .make import described, result_path
from .page import page
from .pictures import sheet
from .pixels import PIXELS
from .score import Rows, all_rows


def report(out: Path) -> dict[str, Any]:
    """Write report.json, report.html, sheet.png and the benchmark's files; return report.json. Raises JudgeError."""
    plan, rows = Plan.load(out), all_rows(out)
    judges = sorted({judge for _, _, judge in rows})
    summary: dict[str, Any] = {
        "bench": plan.bench,
        "version": __version__,
        "seed": plan.seed,
        "cases": len(plan.cases),
        "not_covered": list(plan.not_covered),
        "systems": described(plan),
        "judge": _json(out / "judge.json"),
        "controls": _json(out / "controls.json"),
        "scores": {judge: summarise(plan, rows, judge) for judge in judges},
    }
    with replacing(out / "report.json") as path:
        path.write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
    for judge in judges:
        if not judge.startswith(PIXELS):
            write_benchmark_files(plan, rows, judge, out)
    with replacing(out / "report.html") as path:
        path.write_text(page(plan, rows, summary, out), encoding="utf-8")
    with replacing(out / "sheet.png") as path:
        sheet(plan, rows, out).save(path)
    return summary


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def summarise(plan: Plan, rows: Rows, judge: str) -> dict[str, Any]:
    """Summarise per system: the benchmark's aggregate, by task and number of sources, failures, paired difference."""
    bootstrap = Bootstrap(len(plan.cases), plan.seed)
    columns: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {}
    bench = "own" if judge.startswith(PIXELS) else plan.bench
    for label in plan.systems:
        judged = [rows.get((label, case.id, judge), {}) for case in plan.cases]
        scored = [Scored(c.task, len(c.sources), r.get("score")) for c, r in zip(plan.cases, judged, strict=True)]
        total = aggregate(bench, scored)
        by_count: dict[str, list[float]] = defaultdict(list)
        failures: dict[str, int] = defaultdict(int)
        for one, row in zip(scored, judged, strict=True):
            if one.score is not None:
                by_count[str(one.sources)].append(one.score)
            else:
                failures[str(row.get("failure", "nothing to judge" if row else "not scored"))] += 1
        columns[label] = np.array([[np.nan if one.score is None else one.score] for one in scored])
        over_cases = bootstrap.mean(columns[label])
        gap = bootstrap.difference(columns[label], next(iter(columns.values()))) if len(columns) > 1 else None
        result[label] = {
            "name": total.name,
            "value": total.value,
            "judged": f"{total.judged} of {total.total}",
            "mean_over_cases": rounded(over_cases),
            "ci95": interval(over_cases),
            "minus_first": rounded(gap),
            "minus_first_ci95": interval(gap),
            "by_task": dict(total.groups),
            "by_sources": {count: sum(v) / len(v) for count, v in sorted(by_count.items())},
            "failures": dict(failures),
        }
    return result


def write_benchmark_files(plan: Plan, rows: Rows, judge: str, out: Path) -> None:
    """Write GEdit-Bench's CSV per group, or MICo-Bench's scores/TASK.json and summary.json, per system."""
    for label in plan.systems:
        folder = out / "results" / file_name(label)
        judged = [(case, rows[key]) for case in plan.cases if (key := (label, case.id, judge)) in rows]
        scored = [(case, row) for case, row in judged if row.get("score") is not None]
        if plan.bench == "gedit":
            _gedit_files(scored, folder, label, out)
        if plan.bench == "mico":
            _mico_files(scored, folder)


def _gedit_files(scored: list[tuple[Case, dict[str, Any]]], folder: Path, label: str, out: Path) -> None:
    heads = ["source_image", "edited_image", "instruction", "sementics_score", "quality_score"]
    for group in sorted({case.task for case, _ in scored}):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*heads, "intersection_exist", "instruction_language"])
        for case, row in scored:
            if case.task == group:
                values, output = row["values"], result_path(out, label, case)
                start = [case.sources[0], output, case.instruction, values["semantics"], values["quality"]]
                writer.writerow([*start, case.extra["intersection"], case.extra["language"]])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{file_name(label)}_{file_name(group)}_all_vie_score.csv"
        (folder / name).write_text(text.getvalue(), encoding="utf-8")


def _mico_files(scored: list[tuple[Case, dict[str, Any]]], folder: Path) -> None:
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    for task in MICO_TASKS:
        cases = {
            case.id.partition("/")[2]: {"weight": row["weight"], **row["values"], "final": row["score"]}
            for case, row in scored
            if case.task == task
        }
        if cases:
            (folder / "scores" / f"{task}.json").write_text(json.dumps(cases, indent=2), encoding="utf-8")
            mean = sum(one["final"] for one in cases.values()) / len(cases)
            summary[task] = {"mean": round(mean, 2), "count": len(cases)}
    finals = [row["score"] for _, row in scored]
    if finals:
        summary["overall"] = {"mean": round(sum(finals) / len(finals), 2), "count": len(finals)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
