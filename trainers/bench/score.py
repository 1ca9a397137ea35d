"""Score pictures with a judge on a server, with recorded answers, or without a judge."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unipic_core.replacing import write_json

from ..judges.measure import Plan as Scenes
from ..judges.panel import Case as Scene
from ..judges.panel import control_pictures
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
from ..nano.emoji import Bank
from .aggregates import case_score
from .cases import TEMPLATES, Case, Plan
from .make import result_path
from .mico_weights import judged_weight, read_weights
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


@dataclass(frozen=True)
class JudgeSetup:
    """A judge for a run: who is asked, with which questions, and MICo-Bench's weights.

    templates: by task, if a checkout has a text per task. weights: by case; None: 1; "judge": asked.
    """

    asker: Asker
    template: Template
    templates: Mapping[str, Template]
    weights: Mapping[str, float] | Literal["judge"] | None

    @property
    def name(self) -> str:
        """Name of the judge in scores.jsonl."""
        asked = ", W by the judge" if self.weights == "judge" else ""
        return f"{self.asker.config.model}, {self.template.title}{asked}"

    def template_of(self, case: Case) -> Template:
        return self.templates.get(case.task, self.template)

    def questions_and_pictures(self, case: Case) -> tuple[int, int]:
        """Numbers of questions and pictures of one case."""
        passes = self.asker.config.passes
        counts = pictures_per_case(self.template_of(case), len(case.sources))
        questions, pictures = (passes * count for count in counts)
        if self.weights == "judge":
            return questions + len(case.sources), pictures + 2 * len(case.sources)
        return questions, pictures


def score(args: argparse.Namespace) -> None:
    """Append missing scores to ``out``/scores.jsonl; failed rows are retried. Raises ValueError."""
    plan = Plan.load(args.out)
    file = LineFile(args.out / "scores.jsonl")
    if not args.judge and not args.replay:
        return score_pixels(plan, args.out, file, set(finished(args.out)))
    setup = open_judge(args, plan)
    config, done = setup.asker.config, finished(args.out)
    jobs = [(label, case) for label in plan.systems for case in plan.cases if (label, case.id, setup.name) not in done]
    if args.judge and not args.replay:
        counts = [setup.questions_and_pictures(case) for _, case in jobs]
        print(transfer_notice(config, sum(p for _, p in counts), sum(q for q, _ in counts)))
    head = {"judge": setup.name, "settings": config.public(), "abilities": vars(setup.asker.abilities)}
    write_json(args.out / "judge.json", head)
    if args.controls:
        print(control_sentence(plan, setup.asker, setup.template, args.out))

    def one(job: tuple[str, Case]) -> None:
        """Written at once, so that a fault of another case loses no answer."""
        label, case = job
        file.add(judged_row(plan, setup, args.out, label, case) | {"judge": setup.name})

    for _ in in_order(one, jobs, config.concurrency):
        pass


def open_judge(args: argparse.Namespace, plan: Plan) -> JudgeSetup:
    """Open the server or the recording, the question templates, and the weights. Raises ValueError."""
    weights: Mapping[str, float] | Literal["judge"] | None = None
    if plan.bench == "mico" and not args.w_one:
        weights = "judge" if args.w_judge else read_weights(args.weights) if args.weights else {}
        if not weights:
            case_score("mico", 0, {}, None)
    config = read_judge(args.judge) if args.judge else None
    asker: Asker
    if args.replay:
        asker = Replay(args.replay, config)
    else:
        assert config is not None
        asker = Client(config)
        if args.record:
            asker = Recorder(asker, args.record)
    name, tasks = args.template or TEMPLATES[plan.bench], sorted({case.task for case in plan.cases})
    texts = {task: capped(load_template(name, args.templates, task), args.enforce_cap) for task in tasks}
    return JudgeSetup(asker, texts[tasks[0]], texts, weights)


def capped(template: Template, enforce: bool) -> Template:
    """With ``enforce``, no mark of a case is higher than its first, as ImgEdit-Bench asks of the judge.

    Raises ValueError for templates whose answers are not lines of marks.
    """
    if not enforce:
        return template
    if any(question.kind != "lines" for question in template.questions):
        raise ValueError(f"--enforce-cap is for answers in lines of marks, as of imgedit; {template.name} has none")
    questions = tuple(replace(question, combine="capped_mean") for question in template.questions)
    return replace(template, version=f"{template.version}, capped", questions=questions)


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
    elif setup.weights is not None:
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


def control_sentence(plan: Plan, asker: Asker, template: Template, out: Path) -> str:
    """Judge the controls of drawn scenes, write controls.json and return its sentence. ValueError for other sets."""
    if plan.bench != "nano":
        raise ValueError("--controls needs drawn scenes: run with --bench nano")
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
    write_json(out / "controls.json", result.as_dict())
    return result.sentence
