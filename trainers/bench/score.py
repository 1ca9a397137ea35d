"""Score pictures with a judge on a server, with recorded answers, or without a judge."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..judges.vlm import AnswerError, LineFile, Shown, in_order, judge_case, load_picture, transfer_notice
from ..progress import Progress
from .aggregates import case_score
from .cases import Case, Plan
from .controls import ControlRun
from .make import result_path
from .mico_weights import judged_weight
from .pixels import score_pixels
from .setup import JudgeSetup, check_options, open_judge, read_by_judge, read_rows, write_by_judge

Rows = dict[tuple[str, str, str], dict[str, Any]]
"""Score rows by (system, case, judge)."""


def score(args: argparse.Namespace) -> None:
    """Append missing scores to ``out``/scores.jsonl; failed rows are retried. Raises ValueError."""
    plan = Plan.load(args.out)
    check_options(args, plan.bench)
    file, done = LineFile(args.out / "scores.jsonl"), finished(args.out)
    if not args.judge and not args.replay:
        return score_pixels(plan, args.out, file, set(done))
    setup = open_judge(args, plan)
    config = setup.asker.config
    jobs = [(label, case) for label in plan.systems for case in plan.cases if (label, case.id, setup.name) not in done]
    controls = ControlRun(plan, setup, args.out) if args.controls else None
    if not args.replay:
        questions, pictures = controls.counts() if controls else (0, 0)
        counts = [setup.questions_and_pictures(case) for _, case in jobs]
        print(transfer_notice(config, pictures + sum(p for _, p in counts), questions + sum(q for q, _ in counts)))
    path = args.out / "judge.json"
    about = {"settings": config.public(), "abilities": vars(setup.asker.abilities)}
    others = {name: judge for name, judge in read_by_judge(path).items() if name != setup.name}
    write_by_judge(path, others | {setup.name: about})  # the judge that scored last is last
    if controls:
        print(controls.run())
    score_cases(plan, setup, args.out, file, jobs)
    print(outcome(plan, setup.name, args.out))


def score_cases(plan: Plan, setup: JudgeSetup, out: Path, file: LineFile, jobs: Sequence[tuple[str, Case]]) -> None:
    """Ask about each picture and append its row at once, so that a fault of another case loses no answer."""
    progress = Progress("score", len(jobs))

    def ask(job: tuple[str, Case]) -> None:
        label, case = job
        file.add(judged_row(plan, setup, out, label, case) | {"judge": setup.name})

    for _ in in_order(ask, jobs, setup.asker.config.concurrency):
        progress.add()
    progress.close()


def outcome(plan: Plan, judge: str, out: Path) -> str:
    """One sentence: pictures with a score, and those without one by failure."""
    rows = [row for (_, _, name), row in all_rows(out).items() if name == judge]
    failures = Counter(row["failure"] for row in rows if row.get("failure"))
    scored = sum(row["score"] is not None for row in rows)
    text = f"{judge}: {scored} of {len(plan.systems) * len(plan.cases)} pictures have a score"
    kinds = ", ".join(f"{kind} {count}" for kind, count in failures.most_common())
    return text + (f"; without one: {kinds} (run again to ask about them again)" if kinds else "")


def finished(out: Path) -> Rows:
    """Latest rows without failed ones."""
    rows = all_rows(out)
    return {key: row for key, row in rows.items() if not row.get("failure")}


def all_rows(out: Path) -> Rows:
    """Latest row of each system, case and judge."""
    path = out / "scores.jsonl"
    rows = read_rows(path, "system", "id", "judge")
    return {(row["system"], row["id"], row["judge"]): row for row in rows}


def shown_case(plan: Plan, case: Case, output: Path, max_side: int) -> Shown:
    """Load a case as the judge sees it; for GEdit-Bench the output is resized to its source. Raises AnswerError."""
    sources = tuple(load_picture(Path(path), max_side) for path in case.sources)
    size = sources[0].size if plan.bench == "gedit" else None
    reference = load_picture(Path(case.truth), max_side) if case.truth else None
    kinds = tuple(case.extra.get("kinds", ()))
    return Shown(case.instruction, load_picture(output, max_side, size), sources, reference, kinds=kinds)


def judged_row(plan: Plan, setup: JudgeSetup, out: Path, label: str, case: Case) -> dict[str, Any]:
    """Row of one case of one system, without the judge's name; "failure" says why there is no score."""
    row: dict[str, Any] = {"system": label, "id": case.id, "score": None}
    try:
        shown = shown_case(plan, case, result_path(out, label, case), setup.asker.config.image_max_side)
    except AnswerError as error:
        return row | {"failure": error.kind, "message": str(error)}
    weight: float | None = 1.0
    if setup.weights == "judge":
        weight, row["weight_readings"] = judged_weight(setup.asker, case, shown)
        if weight is None:
            return row | {"failure": "weight", "message": "the judge's answer about a source is missing"}
    elif isinstance(setup.weights, Mapping):
        weight = setup.weights.get(case.id)
        if weight is None:
            return row | {"failure": "weight", "message": f"expected a weight for {case.id}, got none"}
    judgement = judge_case(setup.asker, setup.template_of(case), shown)
    plain = judgement.as_row()
    row |= {"values": plain["values"], "weight": weight, "passes": plain["passes"], "readings": plain["readings"]}
    if judgement.failures:
        first = judgement.failures[0]
        return row | {"failure": first.failure, "message": first.message}
    return row | {"score": case_score(plan.bench, judgement.score, judgement.values, weight)}
