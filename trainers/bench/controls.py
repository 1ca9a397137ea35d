"""Test of a judge on pictures of known order: truth, redrawn, shuffled, swapped, background alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..judges.panel import Case as Scene
from ..judges.panel import control_pictures
from ..judges.vlm import LineFile, Shown, fitness, in_order, judge_case, load_picture
from ..progress import Progress
from .cases import Case, Plan
from .setup import JudgeSetup, read_by_judge, read_rows, write_by_judge

CONTROLS = {
    "truth": "truth",
    "redrawn": "recomposed",
    "shuffled": "positions_shuffled",
    "swapped": "object_swapped",
    "background alone": "background_alone",
}
"""Control of the fitness test -> name in ``control_pictures``."""

Job = tuple[Case, str, Shown]
"""Case, name of the control, and the control's pictures."""


class ControlRun:
    """Run of the controls of one judge, in ``out``/controls.jsonl. Raises ValueError for cases that are not drawn."""

    def __init__(self, plan: Plan, setup: JudgeSetup, out: Path) -> None:
        if plan.bench != "nano":
            raise ValueError(f"--controls needs drawn scenes, got the bench {plan.bench}; run with --bench nano")
        self.plan, self.setup, self.out = plan, setup, out
        self.path = out / "controls.jsonl"
        scored = self.scores()
        self.missing = [(case, name) for case in plan.cases for name in CONTROLS if scored.get((case.id, name)) is None]

    def scores(self) -> dict[tuple[str, str], float | None]:
        """Latest score by case and control."""
        rows = read_rows(self.path, "id", "control", "judge")
        return {(row["id"], row["control"]): row["score"] for row in rows if row["judge"] == self.setup.name}

    def counts(self) -> tuple[int, int]:
        """Numbers of questions and pictures that are still to be sent."""
        counts = [self.setup.questions_and_pictures(case) for case, _ in self.missing]
        return sum(questions for questions, _ in counts), sum(pictures for _, pictures in counts)

    def run(self) -> str:
        """Ask what is missing, write controls.json and return the sentence about the judge."""
        file, asker = LineFile(self.path), self.setup.asker
        progress = Progress("controls", len(self.missing))

        def ask(job: Job) -> None:
            case, name, shown = job
            judgement = judge_case(asker, self.setup.template, shown)
            row: dict[str, Any] = {"judge": self.setup.name, "id": case.id, "control": name, "score": judgement.score}
            if judgement.failures:
                row |= {"failure": judgement.failures[0].failure, "message": judgement.failures[0].message}
            file.add(row)

        for _ in in_order(ask, self._jobs(), asker.config.concurrency):
            progress.add()
        progress.close()
        return self._result()

    def _jobs(self) -> Iterator[Job]:
        """Pictures of the missing controls, drawn when their turn comes."""
        bank, scenes = self.plan.scenes()
        side = self.setup.asker.config.image_max_side
        missing = {(case.id, name) for case, name in self.missing}
        for index, case in enumerate(self.plan.cases):
            names = [name for name in CONTROLS if (case.id, name) in missing]
            if not names:
                continue
            scene = scenes.scene(bank, index)
            pictures = control_pictures(bank, scene, Scene.of(bank, scene).sample)
            sources = tuple(load_picture(Path(path), side) for path in case.sources)
            truth = load_picture(pictures["truth"][0], side)
            for name in names:
                output = load_picture(pictures[CONTROLS[name]][0], side)
                yield case, name, Shown(case.instruction, output, sources, truth)

    def _result(self) -> str:
        scores = self.scores()
        columns = {
            name: np.array([scores.get((case.id, name)) for case in self.plan.cases], float) for name in CONTROLS
        }
        result = fitness(columns, self.plan.seed)
        path = self.out / "controls.json"
        write_by_judge(path, read_by_judge(path) | {self.setup.name: result.as_dict()})
        return result.sentence
