"""Score pictures with a judge on a server, with recorded answers, or without a judge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..judges.vlm import (
    AnswerError,
    Asker,
    Client,
    LineFile,
    Recorder,
    Replay,
    Shown,
    fitness,
    in_order,
    judge_case,
    load_picture,
    load_template,
    read_judge,
    read_lines,
    transfer_notice,
)
from ..judges.vlm.templates import Template
from ..judges.vlm.transfer import pictures_per_case
from .aggregates import case_score
from .cases import TEMPLATES, Case, Plan
from .make import result_path
from .pixels import score_pixels

CONTROLS = {
    "truth": "truth",
    "redrawn": "recomposed",
    "shuffled": "positions_shuffled",
    "swapped": "object_swapped",
    "background alone": "background_alone",
}

Rows = dict[tuple[str, str, str], dict[str, Any]]
"""Score rows by (system, case, judge)."""


def score(args: argparse.Namespace) -> None:
    """Append missing scores to ``out``/scores.jsonl; failed rows are retried. Raises ValueError."""
    plan = Plan.load(args.out)
    file = LineFile(args.out / "scores.jsonl")
    if not args.judge and not args.replay:
        return score_pixels(plan, args.out, file, set(finished(args.out)))
    asker, template = open_judge(args, plan)
    weights = read_weights(args.weights)
    name = f"{asker.config.model}, {template.title}"
    done = finished(args.out)
    jobs = [(label, case) for label in plan.systems for case in plan.cases if (label, case.id, name) not in done]
    if args.judge and not args.replay:
        counts = [pictures_per_case(template, len(case.sources)) for _, case in jobs]
        passes = asker.config.passes
        print(transfer_notice(asker.config, passes * sum(p for _, p in counts), passes * sum(q for q, _ in counts)))
    head = {"judge": name, "settings": asker.config.public(), "abilities": vars(asker.abilities)}
    (args.out / "judge.json").write_text(json.dumps(head, indent=1), encoding="utf-8")
    if args.controls:
        print(control_sentence(plan, asker, template, args.out))

    def one(job: tuple[str, Case]) -> None:
        """Written at once, so that a fault of another case loses no answer."""
        label, case = job
        weight = 1.0 if args.w_one else weights.get(case.id)
        file.add(judged_row(plan, asker, template, args.out, label, case, weight) | {"judge": name})

    if plan.bench == "mico":
        case_score("mico", 0, {}, 1.0 if args.w_one or weights else None)
    for _ in in_order(one, jobs, asker.config.concurrency):
        pass


def open_judge(args: argparse.Namespace, plan: Plan) -> tuple[Asker, Template]:
    """Open the server or the recording, and the question template."""
    config = read_judge(args.judge) if args.judge else None
    asker: Asker
    if args.replay:
        asker = Replay(args.replay, config)
    else:
        assert config is not None
        asker = Client(config)
        if args.record:
            asker = Recorder(asker, args.record)
    return asker, load_template(args.template or TEMPLATES[plan.bench], args.templates)


def read_weights(folder: Path | None) -> dict[str, float]:
    """Read MICo-Bench's weights/TASK.json as "TASK/ID" -> weight. Raises ValueError."""
    if folder is None:
        return {}
    weights = {
        f"{path.stem}/{name}": float(value)
        for path in sorted(folder.glob("*.json"))
        for name, value in json.loads(path.read_text(encoding="utf-8")).items()
    }
    if not weights:
        raise ValueError(f"{folder} holds no weights; expected TASK.json with a number per case")
    return weights


def finished(out: Path) -> Rows:
    """Latest rows without failed ones."""
    rows = all_rows(out)
    return {key: row for key, row in rows.items() if not row.get("failure")}


def all_rows(out: Path) -> Rows:
    """Latest row of each system, case and judge."""
    path = out / "scores.jsonl"
    rows = read_lines(path) if path.exists() else iter(())
    return {(row["system"], row["id"], row["judge"]): row for row in rows}


def shown_case(plan: Plan, case: Case, output: Path, max_side: int) -> Shown:
    """Load a case as the judge sees it; for GEdit-Bench the output is resized to its source. Raises AnswerError."""
    sources = tuple(load_picture(Path(path), max_side) for path in case.sources)
    size = sources[0].size if plan.bench == "gedit" else None
    reference = load_picture(Path(case.truth), max_side) if case.truth else None
    return Shown(case.instruction, load_picture(output, max_side, size), sources, reference)


def judged_row(
    plan: Plan, asker: Asker, template: Template, out: Path, label: str, case: Case, weight: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"system": label, "id": case.id, "score": None}
    try:
        shown = shown_case(plan, case, result_path(out, label, case), asker.config.image_max_side)
    except AnswerError as error:
        return row | {"failure": error.kind, "message": str(error)}
    if plan.bench == "mico" and weight is None:
        return row | {"failure": "weight", "message": f"expected a weight for {case.id}, got none"}
    judgement = judge_case(asker, template, shown)
    row |= {"values": dict(judgement.values), "weight": weight, "readings": judgement.as_row()["readings"]}
    if judgement.failures:
        first = judgement.failures[0]
        return row | {"failure": first.failure, "message": first.message}
    return row | {"score": case_score(plan.bench, judgement.score, judgement.values, weight)}


def control_sentence(plan: Plan, asker: Asker, template: Template, out: Path) -> str:
    """Judge the controls of drawn scenes, write controls.json and return its sentence. ValueError for other sets."""
    if plan.bench != "nano":
        raise ValueError("--controls needs drawn scenes: run with --bench nano")
    from ..judges.measure import Plan as Scenes
    from ..judges.panel import Case as Scene
    from ..judges.panel import control_pictures
    from ..nano.emoji import Bank

    bank, scenes = Bank.open(None), Scenes(max(2, len(plan.cases)), plan.seed, progress=False)
    side = asker.config.image_max_side
    jobs = []
    for index, case in enumerate(plan.cases):
        scene = scenes.scene(bank, index)
        pictures = control_pictures(bank, scene, Scene.of(bank, scene).sample)
        sources = tuple(load_picture(Path(path), side) for path in case.sources)
        truth = load_picture(pictures["truth"][0], side)
        for control in CONTROLS.values():
            jobs.append(Shown(case.instruction, load_picture(pictures[control][0], side), sources, truth))
    answers = in_order(lambda one: judge_case(asker, template, one).score, jobs, asker.config.concurrency)
    scores = np.array([np.nan if one is None else one for one in answers]).reshape(-1, len(CONTROLS))
    result = fitness({name: scores[:, column] for column, name in enumerate(CONTROLS)}, plan.seed)
    (out / "controls.json").write_text(json.dumps(result.as_dict(), indent=1), encoding="utf-8")
    return result.sentence
