"""Scores without a judge on a server: PSNR to a truth, and for drawn scenes the pixel judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unipic_core.replacing import write_json

from ..judges.arrays import picture_psnr
from ..judges.kinds import JUDGES
from ..judges.measure import judge_all
from ..judges.panel import Case as Scene
from ..judges.panel import Panel
from ..judges.scene_plan import Plan as Scenes
from ..judges.statistics import Bootstrap
from ..judges.summary import entry
from ..judges.vlm import AnswerError, LineFile, load_picture
from ..nano.emoji import Bank
from .cases import Case, Plan
from .make import result_path

PIXELS = "pixels"
PSNR = f"{PIXELS}: PSNR to the truth, dB"


def score_pixels(plan: Plan, out: Path, file: LineFile, done: set[tuple[str, str, str]]) -> None:
    """Append missing scores to ``file``. Raises ValueError if no case has a truth."""
    if not any(case.truth for case in plan.cases):
        raise ValueError("no case has a truth to compare with; use --judge FILE.yaml or --replay FILE")
    for label in plan.systems:
        for case in plan.cases:
            if case.truth and (label, case.id, PSNR) not in done:
                result = psnr_row(result_path(out, label, case), Path(case.truth))
                file.add({"system": label, "id": case.id, "judge": PSNR, **result})
    if plan.bench == "nano":
        score_scenes(plan, out, file, done)


def psnr_row(path: Path, truth_path: Path) -> dict[str, Any]:
    """PSNR of one picture in dB as "score", or the failure; the output is resized to the truth."""
    try:
        truth = load_picture(truth_path)
        output = load_picture(path, size=truth.size)
    except AnswerError as error:
        return {"score": None, "failure": error.kind, "message": str(error)}
    return {"score": picture_psnr(output.image, truth.image)}


def score_scenes(plan: Plan, out: Path, file: LineFile, done: set[tuple[str, str, str]]) -> None:
    """Apply the judges of drawn scenes: placement, appearance, identity; scores are means over a picture's items."""
    names = {judge.name: f"{PIXELS}: {judge.title}" for judge in JUDGES}
    jobs = [
        (label, index, case)
        for label in plan.systems
        for index, case in enumerate(plan.cases)
        if (label, case.id, next(iter(names.values()))) not in done
    ]
    if not jobs:
        return
    bank, scenes = plan.scenes()
    panel = Panel(bank)
    write_scene_controls(panel, bank, scenes, out)
    for label, index, case in jobs:
        scene = Scene.of(bank, scenes.scene(bank, index))
        row = _scene_row(panel, scene, result_path(out, label, case), case)
        # The first name marks the picture as done, so it is written last.
        for name, title in reversed(names.items()):
            file.add({"system": label, "id": case.id, "judge": title, **row[name]})


def write_scene_controls(panel: Panel, bank: Bank, scenes: Scenes, out: Path) -> None:
    """Write pixel_controls.json: per judge whether it separates its controls on these scenes, and their means."""
    controls = judge_all({}, panel, bank, scenes, 0)[0].controls
    bootstrap = Bootstrap(scenes.n, scenes.seed)
    found = {f"{PIXELS}: {judge.title}": entry(judge, None, controls, bootstrap) for judge in JUDGES}
    write_json(out / "pixel_controls.json", found)


def _scene_row(panel: Panel, scene: Scene, path: Path, case: Case) -> dict[str, dict[str, Any]]:
    """Score per judge, None if the scene has nothing to score, or the failure."""
    try:
        picture = load_picture(path, size=scene.sample.target.size).image
    except AnswerError as error:
        return {judge.name: {"score": None, "failure": error.kind, "message": str(error)} for judge in JUDGES}
    scores = {name: values[0][np.isfinite(values[0])] for name, values in panel.judge(scene, [picture]).items()}
    return {name: {"score": float(values.mean()) if len(values) else None} for name, values in scores.items()}
