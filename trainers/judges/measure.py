"""Systems measured on the same scenes with the same noise seeds: pictures, then judgements, then the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unipic_core.conditioning.reference_sizes import REFERENCE_MULTIPLE

from ..nano.catalogue import Split
from ..nano.emoji import Bank
from ..nano.open_scenes.answers import OPEN_TASKS
from ..nano.open_scenes.drawing import make_open_scene
from ..nano.render import Sample, render
from ..nano.scene import SQUARE, Scene, Shape
from ..nano.scenes import TASKS, make_scene, shaped
from .comparison import comparison, comparison_table, gains_table
from .kinds import CONTROL_NAMES, JUDGES, OPEN_CONTROL_NAMES, OPEN_JUDGES, TRUTH
from .open_scenes import Control, OpenCase, judge_open, open_controls
from .panel import Case, Panel, control_pictures
from .retention import SPREAD_MEASURE, Report, equal_steps, pairwise_rms
from .saved_pictures import KeptPictures
from .sheet import Row
from .statistics import Bootstrap, interval, rounded
from .summary import Scores, empty, summarise, table

Generate = Callable[[Sample, int], Image.Image]
"""A sample and a noise seed in, the composed picture out."""

WHOLE = frozenset(judge.name for judge in (*JUDGES, *OPEN_JUDGES) if judge.whole)
SEED_STRIDE = 1_000_000  # between the noise seeds of one scene: further than there are scenes


@dataclass(frozen=True)
class Plan:
    """What is measured on: ``n`` scenes of a seed and split, of the given tasks in turn or of the natural mixture.

    ``open``: scenes whose words leave something open, with judges of their own.

    Each system makes ``seeds_per_scene`` pictures of a scene. The judges see the first; all of them give the spread.
    ``size``: side in pixels of the targets and of the longer side of their references; of targets of another ``shape``
    (width and height as a ratio) the side of the square of about as many pixels.
    """

    n: int
    seed: int = 0
    split: Split = "heldout"
    tasks: tuple[str, ...] = ()
    progress: bool = True
    seeds_per_scene: int = 1
    size: int = 128
    open: bool = False
    shape: Shape = SQUARE

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % REFERENCE_MULTIPLE:
            raise ValueError(f"the size must be a multiple of {REFERENCE_MULTIPLE} from 64 on, got {self.size}")
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for an interval, got {self.n}")
        if self.seeds_per_scene < 1:
            raise ValueError(f"the seeds per scene must be at least 1, got {self.seeds_per_scene}")
        known = OPEN_TASKS if self.open else TASKS
        unknown = [task for task in self.tasks if task not in known]
        if unknown:
            raise ValueError(f"task must be one of {', '.join(known)}; got {unknown[0]!r}")

    def scene(self, bank: Bank, index: int) -> Scene:
        task = self.tasks[index % len(self.tasks)] if self.tasks else None
        make = make_open_scene if self.open else make_scene
        return shaped(make(bank, self.split, self.seed, index, task=task, size=self.size), self.shape)

    def noise_seeds(self, index: int) -> list[int]:
        """Of scene ``index``; the first does not depend on how many there are."""
        return [self.seed + index + SEED_STRIDE * which for which in range(self.seeds_per_scene)]

    def bar(self, what: str) -> tqdm[int]:
        pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between updates: few lines in a log
        return tqdm(range(self.n), what, unit="scene", mininterval=pause, disable=not self.progress)


@dataclass(frozen=True)
class Made:
    """What one system made: each scene's first picture at its target's size, and the seconds that one of them took.

    ``spread``: float [n, 1], ``pairwise_rms`` of each scene; None with one seed per scene. ``reached``: float [n, 1],
    different answers among them; None of closed scenes.
    """

    pictures: list[Image.Image]
    seconds: float
    spread: np.ndarray | None
    reached: np.ndarray | None = None


@dataclass
class Evaluation:
    """``report``: what goes into the JSON. ``tables``: for reading. ``rows``: for the sheet."""

    report: dict[str, Any]
    tables: list[str]
    rows: list[Row]


def generate_all(
    label: str, opener: Callable[[], Generate], bank: Bank, plan: Plan, kept: KeptPictures | None = None
) -> Made:
    """All pictures of one system, which is opened for the first that is not kept.

    Of a scene's pictures only the first is timed: the next find its inputs encoded.
    """
    pictures, spent, spreads, reached = [], 0.0, [], []
    opened = cache(opener)

    def picture(sample: Sample, seed: int) -> tuple[Image.Image, float]:
        found = kept.find(seed) if kept else None
        if found is not None:
            return found
        generate = opened()
        start = time.perf_counter()
        made = generate(sample, seed)
        seconds = time.perf_counter() - start
        made = fitted(made, sample)
        if kept:
            kept.put(seed, made, seconds)
        return made, seconds

    for index in plan.bar(label):
        scene = plan.scene(bank, index)
        sample = Case.of(bank, scene).sample
        first, *more = plan.noise_seeds(index)
        made, seconds = picture(sample, first)
        spent += seconds
        pictures.append(made)
        if more:
            several = [made, *(picture(sample, seed)[0] for seed in more)]
            spreads.append(pairwise_rms(several))
            if plan.open:
                reached.append(OpenCase.of(bank, scene).reached(several))
    return Made(pictures, spent / plan.n, column(spreads), column(reached))


def column(values: Sequence[float]) -> np.ndarray | None:
    """float [n, 1]; None without values."""
    return np.array(values, float)[:, None] if values else None


def fitted(picture: Image.Image, sample: Sample) -> Image.Image:
    """RGB, at the size of the target."""
    picture = picture.convert("RGB")
    if picture.size == sample.target.size:
        return picture
    return picture.resize(sample.target.size, Image.Resampling.LANCZOS)


def judge_all(
    made: Mapping[str, Sequence[Image.Image]], panel: Panel, bank: Bank, plan: Plan, sheet_rows: int
) -> tuple[Scores, list[Row]]:
    """Judge the systems and the controls of every scene; also the first rows of the sheet."""
    judges, names = (OPEN_JUDGES, OPEN_CONTROL_NAMES) if plan.open else (JUDGES, CONTROL_NAMES)
    systems, controlled = ({name: empty(plan.n, judges) for name in group} for group in (made, names))
    scores = Scores([], systems, controlled, judges=judges)
    scores.hidden_spread = np.full((plan.n, 1), np.nan)
    scores.reachable = np.full((plan.n, 1), np.nan) if plan.open else None
    judge_scene = judge_open_scene if plan.open else judge_closed_scene
    rows: list[Row] = []
    for index in plan.bar("judging"):
        scene = plan.scene(bank, index)
        own = {label: pictures[index] for label, pictures in made.items()}
        sample, controls, judged, scores.hidden_spread[index] = judge_scene(panel, bank, scene, list(own.values()))
        if scores.reachable is not None:
            scores.reachable[index] = OpenCase.of(bank, scene).reachable(plan.seeds_per_scene)
        scores.tasks.append(scene.task)
        for judge, values in judged.items():
            for row, label in enumerate(own):
                scores.systems[label][judge][index] = values[row]
            for row, (name, (_, items)) in enumerate(controls.items(), start=len(own)):
                scores.controls[name][judge][index] = np.where(items | (judge in WHOLE), values[row], np.nan)
        if len(rows) < sheet_rows:
            captions = {label: caption(judged, row) for row, label in enumerate(own)}
            rows.append(Row(sample, own, captions))
    return scores, rows


Judged = tuple[Sample, dict[str, Control], dict[str, np.ndarray], float]
"""Truth, controls, scores of the systems' pictures and then of the controls', spread of the truth."""


def judge_closed_scene(panel: Panel, bank: Bank, scene: Scene, own: Sequence[Image.Image]) -> Judged:
    case = Case.of(bank, scene)
    controls = control_pictures(bank, scene, case.sample)
    judged = panel.judge(case, [*own, *(picture for picture, _ in controls.values())])
    return case.sample, controls, judged, pairwise_rms([controls[TRUTH][0], controls["recomposed"][0]])


def judge_open_scene(panel: Panel, bank: Bank, scene: Scene, own: Sequence[Image.Image]) -> Judged:
    case = OpenCase.of(bank, scene)
    controls = open_controls(bank, case)
    judged = judge_open(panel, case, [*own, *(picture for picture, _ in controls.values())])
    return render(bank, scene), controls, judged, case.spread(bank)


def caption(judged: Mapping[str, np.ndarray], row: int) -> str:
    """The judges' view of one picture in a few words."""
    if "sharpness" in judged:
        values = judged["sharpness"][row]
        words = [f"IoU {judged['match_iou'][row, 0]:.2f}", f"{judged['match_psnr'][row, 0]:.1f} dB"]
        return " · ".join(words + [f"sharp {np.nanmean(values):.2f}"] * bool(np.isfinite(values).any()))
    found = [judged[name][row] for name in ("object_retrieval_top1", "person_retrieval_top1")]
    identities = np.concatenate([values[np.isfinite(values)] for values in found])
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
    kept: Mapping[str, KeptPictures] | None = None,
    sheet_rows: int = 12,
) -> Evaluation:
    """Measure systems, each opened only when its turn comes, on the same scenes; without any, the controls alone.

    The report's top level is the first system's; ``others`` holds the rest, each with its paired difference
    ``versus_first`` and what it keeps of the first, ``retained``; ``comparison`` is all of them in one table.
    ``about``: by label, what else is known of a system, for the report; by its ``steps`` those of as many are paired.
    ``kept``: by label, where its pictures are looked for and kept.
    """
    about, kept = about or {}, kept or {}
    made = {label: generate_all(label, opener, bank, plan, kept.get(label)) for label, opener in systems.items()}
    scores, rows = judge_all({label: one.pictures for label, one in made.items()}, Panel(bank), bank, plan, sheet_rows)
    scores.spreads = {label: one.spread for label, one in made.items() if one.spread is not None}
    scores.reached = {label: one.reached for label, one in made.items() if one.reached is not None}
    bootstrap = Bootstrap(plan.n, plan.seed)
    reports = summarise(scores, bootstrap)
    for one in reports:
        if one["model"]:
            label = one["model"]["label"]
            one["model"] |= {"seconds_per_picture": round(made[label].seconds, 4), **about.get(label, {})}
    tables = [table(one) for one in reports]
    report, *others = reports
    report |= {"n": plan.n, "seed": plan.seed, "split": plan.split, "size": plan.size}
    if plan.open:
        report["scenes"] = "open"
    if plan.shape != SQUARE:
        report["shape"] = list(plan.shape)
    report |= {"tasks": list(plan.tasks) or "mixture"}
    report["bank"] = {"objects": len(bank.objects("all")), "persons": len(bank.persons("all"))}
    truth_spread = None
    if scores.spreads:
        report["diversity"] = diversity(scores, plan, bootstrap)
        truth_spread = report["diversity"]["truth_drawn_again"]["value"]
    if others:
        report["others"] = others
        report["comparison"] = comparison(reports, truth_spread)
        steps = {label: facts.get("steps") for label, facts in about.items()}
        report["equal_steps"] = equal_steps(steps, scores.systems, report["judges"], bootstrap)
        tables += summary_tables(report)
    return Evaluation(report, tables, rows)


def diversity(scores: Scores, plan: Plan, bootstrap: Bootstrap) -> dict[str, Any]:
    """How the spread was measured, and what it is between the truth and the truth drawn again (open: any two answers).

    That is how much the inputs leave open: a system that varies less than this repeats itself, one that varies more
    errs in other ways each time.
    """
    assert scores.hidden_spread is not None
    found = bootstrap.mean(scores.hidden_spread)
    hidden = {"value": rounded(found), "ci95": interval(found)}
    return {"seeds_per_scene": plan.seeds_per_scene, "measure": SPREAD_MEASURE, "truth_drawn_again": hidden}


def summary_tables(report: Report) -> list[str]:
    """What several systems add to the tables of each."""
    text = (
        f"Beside '{report['comparison']['reference']}': the value; below it the ratio that is kept (errors inverted, "
        "decibels as a difference) and in brackets the lower end of its 95% interval\n"
    )
    text += comparison_table(report["comparison"])
    if "diversity" in report:
        text += f"\nspread: {report['diversity']['measure']}; of the truth: when it is drawn again"
    if not report["equal_steps"]:
        return [text]
    head = "At equal steps (more is better, errors turned round; * the 95% interval excludes zero)\n"
    return [text, head + gains_table(report["equal_steps"])]
