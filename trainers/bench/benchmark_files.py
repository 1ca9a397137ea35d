"""Scores in the benchmarks' own files, so that their scripts can read them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unipic_core.replacing import replacing, write_json

from .aggregates import OMNIREF_DIMENSIONS, Scored, group_means
from .cases import MICO_TASKS, Case, Plan, file_name
from .make import result_path
from .score import Rows

Row = dict[str, Any]
"""A row of scores.jsonl."""
CaseRow = tuple[Case, Row]
GEDIT_HEADS = (
    "source_image",
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)


def write_benchmark_files(plan: Plan, rows: Rows, judge: str, out: Path) -> None:
    """Write the files of each system's scores under ``out``/results/SYSTEM.

    GEdit-Bench: SYSTEM_GROUP_gpt_score.csv. MICo-Bench: scores/TASK.json and summary.json. ImgEdit-Bench: result.json,
    average_score.json and typescore.json. OmniRef-Bench: vlm_results.jsonl.
    """
    for label in plan.systems:
        folder = out / "results" / file_name(label)
        judged = [(case, rows[key]) for case in plan.cases if (key := (label, case.id, judge)) in rows]
        scored = [(case, row) for case, row in judged if row.get("score") is not None]
        if plan.bench == "gedit":
            write_gedit(scored, folder, label, out)
        elif plan.bench == "mico":
            write_mico(scored, folder)
        elif plan.bench == "imgedit":
            write_imgedit(scored, folder)
        elif plan.bench == "omniref":
            write_omniref(scored, folder)


def write_gedit(scored: Sequence[CaseRow], folder: Path, label: str, out: Path) -> None:
    """Write a CSV per group with the judge's two values of each row."""
    for group in sorted({case.task for case, _ in scored}):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(GEDIT_HEADS)
        for case, row in scored:
            if case.task == group:
                values, output = row["values"], result_path(out, label, case)
                row_start = [case.sources[0], output, case.instruction, values["semantics"], values["quality"]]
                writer.writerow([*row_start, case.extra["intersection"], case.extra["language"]])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_name(label)}_{file_name(group)}_gpt_score.csv"
        path.write_text(text.getvalue(), encoding="utf-8", newline="")


def write_mico(scored: Sequence[CaseRow], folder: Path) -> None:
    """Write the cases of each task, and the mean and the number of cases by task and overall."""
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    for task in MICO_TASKS:
        cases = {case.id.partition("/")[2]: mico_entry(row) for case, row in scored if case.task == task}
        if cases:
            write_json(folder / "scores" / f"{task}.json", cases)
            summary[task] = mean_and_count([one["final"] for one in cases.values()])
    finals = [row["score"] for _, row in scored]
    if finals:
        summary["overall"] = mean_and_count(finals)
    write_json(folder / "summary.json", summary)


def mean_and_count(values: Sequence[float]) -> dict[str, float]:
    """Entry of summary.json; at least one value."""
    return {"mean": round(sum(values) / len(values), 2), "count": len(values)}


def mico_entry(row: Row) -> dict[str, float]:
    """Entry of a case in scores/TASK.json; the two numbers of a question are those of the first pass."""
    names = {"pq": ("pq_naturalness", "pq_artifacts"), "sc": ("sc_prompt_following", "sc_subject_resemblance")}
    entry = {"weight": row["weight"]}
    for question, (first, second) in names.items():
        numbers = next(one["numbers"] for one in row["readings"] if one["question"] == question)
        entry |= {first: numbers[0], second: numbers[1], question: row["values"][question]}
    return entry | {"final": row["score"]}


def write_imgedit(scored: Sequence[CaseRow], folder: Path) -> None:
    """Write the answers of the first pass, the score of each case, and the mean of each edit type."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", {case.id: row["readings"][0]["answer"] for case, row in scored})
    write_json(folder / "average_score.json", {case.id: round(row["score"], 2) for case, row in scored})
    means = group_means([Scored(case.task, 1, round(row["score"], 2)) for case, row in scored], lambda one: one.score)
    write_json(folder / "typescore.json", {task: round(value, 2) for task, value in means.items()})


def write_omniref(scored: Sequence[CaseRow], folder: Path) -> None:
    """Write a line per case with the score of each dimension, -1 for one that does not apply."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for case, row in scored:
        marks = {name: {"score": row["values"].get(name, -1)} for name in OMNIREF_DIMENSIONS}
        index = int(case.id) if case.id.isdecimal() else case.id
        lines.append(json.dumps({**marks, "overall_average_score": row["score"], "index": index}) + "\n")
    with replacing(folder / "vlm_results.jsonl") as path:
        path.write_text("".join(lines), encoding="utf-8")
