"""Evaluation of systems on the same scenes with the same noise seeds: pictures, judgements, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ..nano.emoji import Bank
from ..nano.render import Sample, render
from ..nano.scene import SQUARE, Scene
from .comparison import comparison, comparison_table, gains_table
from .drawings.sheet import Row
from .kinds import CONTROL_NAMES, JUDGES, OPEN_CONTROL_NAMES, OPEN_JUDGES, TRUTH
from .open_scenes import Control, OpenCase, judge_open, open_controls
from .panel import Case, Panel, control_pictures
from .retention import SPREAD_MEASURE, Report, equal_steps, pairwise_rms
from .saved_pictures import PictureStore
from .scene_plan import Plan
from .statistics import Bootstrap, interval, rounded
from .summary import Scores, empty, summarise, table

Generate = Callable[[Sample, int], Image.Image]
"""(sample, noise seed) -> composed picture."""

WHOLE = frozenset(judge.name for judge in (*JUDGES, *OPEN_JUDGES) if judge.whole)


@dataclass(frozen=True)
class SystemPictures:
    """Pictures of one system: the first of each scene, at its target's size, and the mean seconds per picture.

    ``spread``: float [n, 1], ``pairwise_rms`` of each scene; None with one seed per scene. ``reached``: float [n, 1],
    different answers among them; None of closed scenes.
    """

    pictures: list[Image.Image]
    seconds: float
    spread: np.ndarray | None
    reached: np.ndarray | None = None


@dataclass
class Evaluation:
    """``report``: the JSON report. ``tables``: its text. ``rows``: first rows of the sheet."""

    report: dict[str, Any]
    tables: list[str]
    rows: list[Row]


def generate_all(
    label: str, opener: Callable[[], Generate], bank: Bank, plan: Plan, store: PictureStore | None = None
) -> SystemPictures:
    """Generate all pictures of one system, which is opened for the first picture that is not in the store.

    Only the first picture of a scene is timed: the others reuse its encoded inputs.
    """
    pictures, spent, spreads, reached = [], 0.0, [], []
    opened = cache(opener)

    def picture(sample: Sample, seed: int) -> tuple[Image.Image, float]:
        stored = store.find(seed) if store else None
        if stored is not None:
            return stored
        generate = opened()
        start = time.perf_counter()
        output = generate(sample, seed)
        seconds = time.perf_counter() - start
        output = fitted(output, sample)
        if store:
            store.put(seed, output, seconds)
        return output, seconds

    for index in plan.bar(label):
        scene = plan.scene(bank, index)
        sample = Case.of(bank, scene).sample
        first, *more = plan.noise_seeds(index)
        output, seconds = picture(sample, first)
        spent += seconds
        pictures.append(output)
        if more:
            outputs = [output, *(picture(sample, seed)[0] for seed in more)]
            spreads.append(pairwise_rms(outputs))
            if plan.open:
                reached.append(OpenCase.of(bank, scene).reached(outputs))
    return SystemPictures(pictures, spent / plan.n, column(spreads), column(reached))


def column(values: Sequence[float]) -> np.ndarray | None:
    """float [n, 1]; None without values."""
    return np.array(values, float)[:, None] if values else None


def fitted(picture: Image.Image, sample: Sample) -> Image.Image:
    """Convert to RGB at the size of the target."""
    picture = picture.convert("RGB")
    if picture.size == sample.target.size:
        return picture
    return picture.resize(sample.target.size, Image.Resampling.LANCZOS)


def judge_all(
    pictures: Mapping[str, Sequence[Image.Image]], panel: Panel, bank: Bank, plan: Plan, sheet_rows: int
) -> tuple[Scores, list[Row]]:
    """Judge the systems (label -> pictures) and the controls of every scene; returns scores and rows of the sheet."""
    judges, names = (OPEN_JUDGES, OPEN_CONTROL_NAMES) if plan.open else (JUDGES, CONTROL_NAMES)
    systems, controlled = ({name: empty(plan.n, judges) for name in group} for group in (pictures, names))
    scores = Scores([], systems, controlled, judges=judges)
    scores.hidden_spread = np.full((plan.n, 1), np.nan)
    scores.reachable = np.full((plan.n, 1), np.nan) if plan.open else None
    judge_scene = judge_open_scene if plan.open else judge_closed_scene
    rows: list[Row] = []
    for index in plan.bar("judging"):
        scene = plan.scene(bank, index)
        outputs = {label: drawn[index] for label, drawn in pictures.items()}
        sample, controls, judged, scores.hidden_spread[index] = judge_scene(panel, bank, scene, list(outputs.values()))
        if scores.reachable is not None:
            scores.reachable[index] = OpenCase.of(bank, scene).reachable(plan.seeds_per_scene)
        scores.tasks.append(scene.task)
        for judge, values in judged.items():
            for row, label in enumerate(outputs):
                scores.systems[label][judge][index] = values[row]
            for row, (name, (_, items)) in enumerate(controls.items(), start=len(outputs)):
                scores.controls[name][judge][index] = np.where(items | (judge in WHOLE), values[row], np.nan)
        if len(rows) < sheet_rows:
            captions = {label: caption(judged, row) for row, label in enumerate(outputs)}
            rows.append(Row(sample, outputs, captions))
    return scores, rows


Judged = tuple[Sample, dict[str, Control], dict[str, np.ndarray], float]
"""Truth, controls, scores of the systems' pictures and then of the controls', spread of the truth."""


def judge_closed_scene(panel: Panel, bank: Bank, scene: Scene, outputs: Sequence[Image.Image]) -> Judged:
    """Judge the systems' pictures of a scene with one right answer, and its controls."""
    case = Case.of(bank, scene)
    controls = control_pictures(bank, scene, case.sample)
    judged = panel.judge(case, [*outputs, *(picture for picture, _ in controls.values())])
    return case.sample, controls, judged, pairwise_rms([controls[TRUTH][0], controls["recomposed"][0]])


def judge_open_scene(panel: Panel, bank: Bank, scene: Scene, outputs: Sequence[Image.Image]) -> Judged:
    """Judge the systems' pictures of a scene with several right answers, and its controls."""
    case = OpenCase.of(bank, scene)
    controls = open_controls(bank, case)
    judged = judge_open(panel, case, [*outputs, *(picture for picture, _ in controls.values())])
    return render(bank, scene), controls, judged, case.spread(bank)


def caption(judged: Mapping[str, np.ndarray], row: int) -> str:
    """Caption of one picture with its main scores."""
    if "sharpness" in judged:
        values = judged["sharpness"][row]
        words = [f"IoU {judged['match_iou'][row, 0]:.2f}", f"{judged['match_psnr'][row, 0]:.1f} dB"]
        return " · ".join(words + [f"sharp {np.nanmean(values):.2f}"] * bool(np.isfinite(values).any()))
    columns = [judged[name][row] for name in ("object_retrieval_top1", "person_retrieval_top1")]
    identities = np.concatenate([values[np.isfinite(values)] for values in columns])
    appearance = judged["masked_psnr"][row]
    words = [f"IoU {judged['placement_iou'][row, 0]:.2f}"]
    if np.isfinite(appearance).any():
        words.append(f"{np.nanmean(appearance):.1f} dB")
    if len(identities):
        words.append(f"found {int(identities.sum())} of {len(identities)}")
    return " · ".join(words)


def compare(
    systems: Mapping[str, Callable[[], Generate]],
    bank: Bank,
    plan: Plan,
    *,
    about: Mapping[str, Report] | None = None,
    stores: Mapping[str, PictureStore] | None = None,
    sheet_rows: int = 12,
) -> Evaluation:
    """Evaluate systems, opened one after the other, on the same scenes; without any, only the controls.

    The report's top level is the first system; ``others`` holds the rest, each with its paired difference
    ``versus_first`` and the quality ``retained`` of the first; ``comparison`` has all of them in one table.
    ``about``: label -> settings for the report; systems with equal ``steps`` are paired. ``stores``: label -> store of
    its pictures.
    """
    about, stores = about or {}, stores or {}
    drawn = {label: generate_all(label, opener, bank, plan, stores.get(label)) for label, opener in systems.items()}
    scores, rows = judge_all({label: one.pictures for label, one in drawn.items()}, Panel(bank), bank, plan, sheet_rows)
    scores.spreads = {label: one.spread for label, one in drawn.items() if one.spread is not None}
    scores.reached = {label: one.reached for label, one in drawn.items() if one.reached is not None}
    bootstrap = Bootstrap(plan.n, plan.seed)
    reports = summarise(scores, bootstrap)
    for one in reports:
        if one["model"]:
            label = one["model"]["label"]
            one["model"] |= {"seconds_per_picture": round(drawn[label].seconds, 4), **about.get(label, {})}
    tables = [table(one) for one in reports]
    report, *others = reports
    report |= describe_scenes(plan, bank)
    if scores.spreads:
        report["diversity"] = diversity(scores, plan, bootstrap)
    if others:
        truth_spread = report["diversity"]["truth_drawn_again"]["value"] if scores.spreads else None
        report["others"] = others
        report["comparison"] = comparison(reports, truth_spread)
        steps = {label: settings.get("steps") for label, settings in about.items()}
        report["equal_steps"] = equal_steps(steps, scores.systems, report["judges"], bootstrap)
        tables += summary_tables(report)
    return Evaluation(report, tables, rows)


def describe_scenes(plan: Plan, bank: Bank) -> dict[str, Any]:
    """Scenes of an evaluation, for its report."""
    about: dict[str, Any] = {"n": plan.n, "seed": plan.seed, "split": plan.split, "size": plan.size}
    if plan.open:
        about["scenes"] = "open"
    if plan.shape != SQUARE:
        about["shape"] = list(plan.shape)
    about["tasks"] = list(plan.tasks) or "mixture"
    about["bank"] = {"objects": len(bank.objects("all")), "persons": len(bank.persons("all"))}
    return about


def diversity(scores: Scores, plan: Plan, bootstrap: Bootstrap) -> dict[str, Any]:
    """Definition of the spread, and its value between the truth and the truth drawn again (open: any two answers).

    The latter is the variation that the inputs leave open: a system below it repeats itself, one above it makes
    different errors with each seed.
    """
    assert scores.hidden_spread is not None
    estimate = bootstrap.mean(scores.hidden_spread)
    hidden = {"value": rounded(estimate), "ci95": interval(estimate)}
    return {"seeds_per_scene": plan.seeds_per_scene, "measure": SPREAD_MEASURE, "truth_drawn_again": hidden}


def summary_tables(report: Report) -> list[str]:
    """Text tables that compare several systems."""
    text = (
        f"Compared with '{report['comparison']['reference']}': the value; below it the ratio retained (for error "
        "metrics the ratio is inverted; dB rows show differences), in brackets the lower end of its 95% interval\n"
    )
    text += comparison_table(report["comparison"])
    if "diversity" in report:
        text += f"\nspread: {report['diversity']['measure']}; truth: between the truth and the truth drawn again"
    if not report["equal_steps"]:
        return [text]
    head = "At equal steps (higher is better, error metrics negated; * the 95% interval excludes zero)\n"
    return [text, head + gains_table(report["equal_steps"])]
