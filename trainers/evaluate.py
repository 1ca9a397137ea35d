"""Measure models on persons and objects they have never seen, beside controls that say what the numbers are worth.

    python -m trainers.evaluate --model PATH [--lora FILE] [--steps N] [--cfg S] --n 600 --json FILE --sheet FILE.png
    python -m trainers.evaluate --model A --model B --steps 8 --steps 4 ...     several systems, paired sample by sample
    python -m trainers.evaluate --controls-only --n 100                         what the judges say of the controls

Sample i is scene i of (seed, split) for every system, and is made with the noise seed SEED + i.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from .data.catalogue import Split
from .data.emoji import Bank
from .data.render import Sample
from .data.scenes import TASKS, Scene, make_scene
from .judges.panel import CONTROL_NAMES, JUDGES, Case, Panel, control_pictures
from .judges.sheet import Row, draw_sheet
from .judges.statistics import Bootstrap
from .judges.summary import Scores, empty, summarise, table

Generate = Callable[[Sample, int], Image.Image]
"""A sample and a noise seed in, the composed picture out."""

T = TypeVar("T")
WHOLE = frozenset(judge.name for judge in JUDGES if judge.whole)


@dataclass(frozen=True)
class System:
    """Something to measure. None: what the weights' recipe says."""

    label: str
    model: str
    lora: str | None = None
    steps: int | None = None
    cfg: float | None = None
    sampler: str | None = None

    def open(self, device: str, threads: int | None = None) -> Generate:
        """Load it. Raises UniPicError when the model or the LoRA cannot be read."""
        import torch

        from unipic_core.pipeline import UniPicPipeline

        if threads:
            torch.set_num_threads(threads)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        pipe = UniPicPipeline.from_pretrained(self.model, torch_dtype=dtype, device=device)
        if self.lora:
            pipe.load_lora(self.lora)

        def generate(sample: Sample, seed: int) -> Image.Image:
            width, height = sample.target.size
            made = pipe(
                images=sample.references,
                prompt=sample.instruction,
                width=width,
                height=height,
                num_inference_steps=self.steps,
                true_cfg_scale=self.cfg,
                sampler=self.sampler,
                seed=seed,
            )
            return made.images[0]

        return generate


@dataclass(frozen=True)
class Plan:
    """What is measured on: ``n`` scenes of a seed and split, of the given tasks in turn or of the natural mixture."""

    n: int
    seed: int = 0
    split: Split = "heldout"
    tasks: tuple[str, ...] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for an interval, got {self.n}")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {unknown[0]!r}")

    def scene(self, bank: Bank, index: int) -> Scene:
        task = self.tasks[index % len(self.tasks)] if self.tasks else None
        return make_scene(bank, self.split, self.seed, index, task=task)

    def bar(self, what: str) -> tqdm[int]:
        pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between updates: few lines in a log
        return tqdm(range(self.n), what, unit="picture", mininterval=pause, disable=not self.progress)


@dataclass
class Evaluation:
    """``report``: what goes into the JSON. ``tables``: for reading. ``rows``: for the sheet."""

    report: dict[str, Any]
    tables: list[str]
    rows: list[Row]


def generate_all(label: str, generate: Generate, bank: Bank, plan: Plan) -> tuple[list[Image.Image], float]:
    """The pictures of one system, at the size of their targets, and the seconds one of them took."""
    pictures, spent = [], 0.0
    for index in plan.bar(label):
        sample = Case.of(bank, plan.scene(bank, index)).sample
        start = time.perf_counter()
        picture = generate(sample, plan.seed + index).convert("RGB")
        spent += time.perf_counter() - start
        if picture.size != sample.target.size:
            picture = picture.resize(sample.target.size, Image.Resampling.LANCZOS)
        pictures.append(picture)
    return pictures, spent / plan.n


def judge_all(
    made: Mapping[str, Sequence[Image.Image]], panel: Panel, bank: Bank, plan: Plan, sheet_rows: int
) -> tuple[Scores, list[Row]]:
    """Judge the systems and the controls of every scene; also the first rows of the sheet."""
    scores = Scores([], {label: empty(plan.n) for label in made}, {name: empty(plan.n) for name in CONTROL_NAMES})
    rows: list[Row] = []
    for index in plan.bar("judging"):
        scene = plan.scene(bank, index)
        case = Case.of(bank, scene)
        controls = control_pictures(bank, scene, case.sample)
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
    systems: Mapping[str, Callable[[], Generate]], bank: Bank, plan: Plan, *, sheet_rows: int = 12
) -> Evaluation:
    """Measure systems, each opened only when its turn comes, on the same scenes; without any, the controls alone.

    The report's top level is the first system's; ``others`` holds the rest, each with its paired difference
    ``versus_first``.
    """
    made: dict[str, list[Image.Image]] = {}
    seconds: dict[str, float] = {}
    for label, opener in systems.items():
        made[label], seconds[label] = generate_all(label, opener(), bank, plan)
    scores, rows = judge_all(made, Panel(bank), bank, plan, sheet_rows)
    reports = summarise(scores, Bootstrap(plan.n, plan.seed))
    for one in reports:
        if one["model"]:
            one["model"]["seconds_per_picture"] = round(seconds[one["model"]["label"]], 4)
    tables = [table(one) for one in reports]
    report, *others = reports
    report |= {"n": plan.n, "seed": plan.seed, "split": plan.split, "tasks": list(plan.tasks) or "mixture"}
    report["bank"] = {"objects": len(bank.objects("all")), "persons": len(bank.persons("all"))}
    if others:
        report["others"] = others
    return Evaluation(report, tables, rows)


def evaluate(
    generate: Generate | None,
    bank: Bank,
    n: int,
    seed: int = 0,
    *,
    label: str = "model",
    tasks: Sequence[str] = (),
    split: Split = "heldout",
    sheet_rows: int = 12,
    progress: bool = False,
) -> Evaluation:
    """Measure one function from samples to pictures; None: only the controls. Raises ValueError for n < 2."""
    systems = {} if generate is None else {label: lambda: generate}
    return compare(systems, bank, Plan(n, seed, split, tuple(tasks), progress), sheet_rows=sheet_rows)


# --- the command line ------------------------------------------------------------------------------------------------


def systems_of(args: argparse.Namespace) -> list[System]:
    """One system per repetition of the repeated options; an option given once holds for all of them.

    Raises ValueError when the counts do not fit, or without a model.
    """
    given = {name: getattr(args, name) for name in ("label", "model", "lora", "steps", "cfg", "sampler")}
    if args.controls_only:
        return []
    if not given["model"]:
        raise ValueError("--model is missing; give a model folder, or --controls-only")
    count = max(map(len, given.values()))
    for name, values in given.items():
        if len(values) not in (0, 1, count):
            raise ValueError(f"--{name} was given {len(values)} times; expected once or {count} times, one per system")
    columns = {name: spread(values, count) for name, values in given.items()}
    systems: list[System] = []
    for index in range(count):
        fields: dict[str, Any] = {name: column[index] for name, column in columns.items()}
        fields["lora"] = None if fields["lora"] in (None, "none") else fields["lora"]
        fields["label"] = fields["label"] or describe(fields)
        if any(fields["label"] == other.label for other in systems):
            fields["label"] += f" #{index + 1}"
        systems.append(System(**fields))
    return systems


def spread(values: Sequence[T], count: int) -> list[T | None]:
    if not values:
        return [None] * count
    return list(values) if len(values) == count else [values[0]] * count


def describe(fields: Mapping[str, Any]) -> str:
    """A label such as 'unipic-nano + dmd, 4 steps'."""
    name = Path(fields["model"]).resolve().name
    if fields["lora"]:
        name += f" + {Path(fields['lora']).stem}"
    words = [name]
    if fields["steps"] is not None:
        words.append(f"{fields['steps']} step" + "s" * (fields["steps"] != 1))
    if fields["cfg"] is not None:
        words.append(f"cfg {fields['cfg']:g}")
    if fields["sampler"]:
        words.append(fields["sampler"])
    return ", ".join(words)


def check_writable(path: Path | None) -> None:
    """Raises ValueError in one sentence now rather than after an hour."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the place and rename, so that a file at ``path`` is always whole."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="trainers.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = top.add_argument_group("systems (each option may be repeated, once per system)")
    group.add_argument("--model", action="append", default=[], metavar="PATH", help="a model folder")
    group.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA over it, or none")
    group.add_argument("--steps", action="append", default=[], type=int, help="default: the recipe's")
    group.add_argument("--cfg", action="append", default=[], type=float, help="guidance scale; default: the recipe's")
    group.add_argument("--sampler", action="append", default=[], choices=["consistency", "euler"])
    group.add_argument("--label", action="append", default=[], help="a name for the table")
    group.add_argument("--controls-only", action="store_true", help="no model: judge the controls")
    top.add_argument("--n", type=int, default=600, help="number of scenes (%(default)s)")
    top.add_argument("--seed", type=int, default=0, help="of the scenes and of the noise (%(default)s)")
    top.add_argument("--split", default="heldout", choices=["heldout", "train", "all"], help="%(default)s")
    top.add_argument("--task", action="append", default=[], metavar="NAME", help=f"only these: {', '.join(TASKS)}")
    top.add_argument("--data", metavar="DIR", help="pictures of the assets (default: the fetched set, else the subset)")
    top.add_argument("--device", default="auto", help="auto, cuda or cpu (%(default)s)")
    top.add_argument("--threads", type=int, help="CPU threads of the model")
    top.add_argument("--json", type=Path, metavar="FILE", help="the numbers")
    top.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="instruction, inputs, truth and outputs as a picture"
    )
    top.add_argument("--sheet-rows", type=int, default=12, help="%(default)s")
    return top


def run(args: argparse.Namespace) -> None:
    """Everything but the exit code. Raises ValueError in one sentence for bad input."""
    systems, tasks = systems_of(args), tuple(args.task)
    plan = Plan(args.n, args.seed, args.split, tasks, progress=True)
    if args.sheet and (args.sheet.suffix.lower() != ".png" or args.sheet_rows < 1):
        raise ValueError(
            f"--sheet must end in .png and have at least one row, got {args.sheet}, {args.sheet_rows} rows"
        )
    for path in (args.json, args.sheet):
        check_writable(path)
    bank = Bank.open(args.data)
    print(f"{plan.n} scenes of {plan.split} assets, seed {plan.seed}; {bank.note}")
    device = args.device
    if device == "auto" and systems:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    openers = {one.label: (lambda one=one: one.open(device, args.threads)) for one in systems}
    result = compare(openers, bank, plan, sheet_rows=args.sheet_rows)
    settings = {one.label: asdict(one) for one in systems}
    for report in (result.report, *result.report.get("others", ())):
        if report["model"]:
            report["model"] |= {**settings[report["model"]["label"]], "device": device}
    print("\n" + "\n\n".join(result.tables))
    print("* not beaten with 95% confidence; controls are judged on the items that they change")
    if args.json:
        text = json.dumps(result.report, indent=1, allow_nan=False) + "\n"
        write_aside(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    if args.sheet and result.rows:
        title = f"{plan.n} unseen scenes, seed {plan.seed}: the first {len(result.rows)}"
        write_aside(args.sheet, draw_sheet(result.rows, title).save)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once")
            run(args)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"trainers.evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
