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
from ..nano.render import Sample
from ..nano.scene import Scene
from ..nano.scenes import TASKS, make_scene
from .comparison import comparison, comparison_table, gains_table
from .panel import CONTROL_NAMES, JUDGES, TRUTH, Case, Panel, control_pictures
from .retention import SPREAD_MEASURE, Report, equal_steps, pairwise_rms
from .saved_pictures import KeptPictures
from .sheet import Row
from .statistics import Bootstrap, interval, rounded
from .summary import Scores, empty, summarise, table

Generate = Callable[[Sample, int], Image.Image]
"""A sample and a noise seed in, the composed picture out."""

WHOLE = frozenset(judge.name for judge in JUDGES if judge.whole)
SEED_STRIDE = 1_000_000  # between the noise seeds of one scene: further than there are scenes


@dataclass(frozen=True)
class Plan:
    """What is measured on: ``n`` scenes of a seed and split, of the given tasks in turn or of the natural mixture.

    Each system makes ``seeds_per_scene`` pictures of a scene. The judges see the first; all of them give the spread.
    ``size``: side in pixels of the targets and of the longer side of their references.
    """

    n: int
    seed: int = 0
    split: Split = "heldout"
    tasks: tuple[str, ...] = ()
    progress: bool = True
    seeds_per_scene: int = 1
    size: int = 128

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % REFERENCE_MULTIPLE:
            raise ValueError(f"the size must be a multiple of {REFERENCE_MULTIPLE} from 64 on, got {self.size}")
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for an interval, got {self.n}")
        if self.seeds_per_scene < 1:
            raise ValueError(f"the seeds per scene must be at least 1, got {self.seeds_per_scene}")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {unknown[0]!r}")

    def scene(self, bank: Bank, index: int) -> Scene:
        task = self.tasks[index % len(self.tasks)] if self.tasks else None
        return make_scene(bank, self.split, self.seed, index, task=task, size=self.size)

    def noise_seeds(self, index: int) -> list[int]:
        """Of scene ``index``; the first does not depend on how many there are."""
        return [self.seed + index + SEED_STRIDE * which for which in range(self.seeds_per_scene)]

    def bar(self, what: str) -> tqdm[int]:
        pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between updates: few lines in a log
        return tqdm(range(self.n), what, unit="scene", mininterval=pause, disable=not self.progress)


@dataclass(frozen=True)
class Made:
    """What one system made: each scene's first picture at its target's size, and the seconds that one of them took.

    ``spread``: float [n, 1], ``pairwise_rms`` of each scene; None with one seed per scene.
    """

    pictures: list[Image.Image]
    seconds: float
    spread: np.ndarray | None


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
    pictures, spent, spreads = [], 0.0, []
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
        sample = Case.of(bank, plan.scene(bank, index)).sample
        first, *more = plan.noise_seeds(index)
        made, seconds = picture(sample, first)
        spent += seconds
        pictures.append(made)
        if more:
            spreads.append(pairwise_rms([made, *(picture(sample, seed)[0] for seed in more)]))
    return Made(pictures, spent / plan.n, np.array(spreads)[:, None] if spreads else None)


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
    scores = Scores([], {label: empty(plan.n) for label in made}, {name: empty(plan.n) for name in CONTROL_NAMES})
    scores.hidden_spread = np.full((plan.n, 1), np.nan)
    rows: list[Row] = []
    for index in plan.bar("judging"):
        scene = plan.scene(bank, index)
        case = Case.of(bank, scene)
        controls = control_pictures(bank, scene, case.sample)
        scores.hidden_spread[index] = pairwise_rms([controls[TRUTH][0], controls["recomposed"][0]])
        own = {label: pictures[index] for label, pictures in made.items()}
        judged = panel.judge(case, [*own.values(), *(picture for picture, _ in controls.values())])
        scores.tasks.append(scene.task)
        for judge, values in judged.items():
            for row, label in enumerate(own):
                scores.systems[label][judge][index] = values[row]
            for row, (name, (_, items)) in enumerate(controls.items(), start=len(own)):
                scores.controls[name][judge][index] = np.where(items | (judge in WHOLE), values[row], np.nan)
        if len(rows) < sheet_rows:
            captions = {label: caption(judged, row) for row, label in enumerate(own)}
            rows.append(Row(case.sample, own, captions))
    return scores, rows


def caption(judged: Mapping[str, np.ndarray], row: int) -> str:
    """The judges' view of one picture in a few words."""
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
    bootstrap = Bootstrap(plan.n, plan.seed)
    reports = summarise(scores, bootstrap)
    for one in reports:
        if one["model"]:
            label = one["model"]["label"]
            one["model"] |= {"seconds_per_picture": round(made[label].seconds, 4), **about.get(label, {})}
    tables = [table(one) for one in reports]
    report, *others = reports
    report |= {"n": plan.n, "seed": plan.seed, "split": plan.split, "size": plan.size}
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
    """How the spread was measured, and what it is between the truth and the truth drawn again.

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
