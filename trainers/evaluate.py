"""Measure models on unseen persons and objects, together with controls that calibrate the judges.

    python -m trainers.evaluate --model PATH [--lora FILE] [--steps N] [--cfg S] --n 600 --json FILE --sheet FILE.png
    python -m trainers.evaluate --model A --model B --steps 8 --steps 4 ...     several systems, paired by sample
    python -m trainers.evaluate --controls-only --n 100                         scores of the controls
    python -m trainers.evaluate --scenes open --seeds-per-scene 4 ...           several pictures of a scene are right
    python -m trainers.evaluate --model PATH --seed weights --sheet FILE.png    scenes that nobody has chosen

Sample i is scene i of (seed, split) for every system, drawn with the noise seed SEED + i. The first system is the
reference: the report has the quality that the others retain of it, and compares systems with equal steps in pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from unipic_core import __version__
from unipic_core.replacing import replacing

from .digests import add_file
from .judges.drawings.plot import AXES, draw_plot
from .judges.drawings.sheet import draw_sheet
from .judges.measure import Evaluation, Generate, compare
from .judges.saved_pictures import PictureStore, files_stamp, model_stamp
from .judges.scene_plan import Plan
from .nano.catalogue import Split
from .nano.emoji import Bank
from .nano.open_scenes.answers import OPEN_TASKS
from .nano.render import Sample
from .nano.scene import SQUARE, Shape
from .nano.scenes import TASKS
from .terminal import exit_code

if TYPE_CHECKING:
    from unipic_core.run.plan import Settings

T = TypeVar("T")

FROM_WEIGHTS = "weights"
"""Value of --seed."""


@dataclass(frozen=True)
class System:
    """System to measure. None: the value of the weights' recipe."""

    label: str
    model: str
    lora: str | None = None
    steps: int | None = None
    cfg: float | None = None
    sampler: str | None = None

    def settings(self, budget: int | None = None) -> Settings:
        """Resolve options and recipes to settings without loading weights. Raises UniPicError as ``open`` does.

        budget: side of the reference budget in pixels; None: of the recipe.
        """
        from unipic_core.pipeline.loading import open_pipeline
        from unipic_core.run.plan import resolve
        from unipic_core.weights.lora import read_lora

        recipe = open_pipeline(self.model).model.recipe
        if self.lora:
            recipe = recipe.merge(read_lora(self.lora, mapped=True).recipe)
        return resolve(recipe, self.steps, self.cfg, self.sampler, budget)

    def about(self, budget: int | None = None) -> dict[str, Any]:
        """Resolved settings for the report; ``series``: label without the number of steps. budget: as ``settings``."""
        run = self.settings(budget)
        options = asdict(self) | {"series": describe(asdict(self) | {"steps": None})}
        return options | {"steps": run.steps, "cfg": run.guidance, "sampler": run.sampler}

    def files(self) -> list[tuple[str, int, int]]:
        """Paths, sizes and times of the weight files."""
        return [*model_stamp(Path(self.model)), *files_stamp(*([Path(self.lora)] if self.lora else []))]

    def open(self, device: str, threads: int | None = None) -> Generate:
        """Load the system. Raises UniPicError if the model or the LoRA cannot be read."""
        import torch

        from unipic_core.pipeline import UniPicPipeline
        from unipic_core.pipeline.offload import default_dtype

        if threads:
            torch.set_num_threads(threads)
        pipe = UniPicPipeline.from_pretrained(self.model, torch_dtype=default_dtype(device), device=device)
        if self.lora:
            pipe.load_lora(self.lora)

        def generate(sample: Sample, seed: int) -> Image.Image:
            width, height = sample.target.size
            output = pipe(
                images=sample.references,
                prompt=sample.instruction,
                width=width,
                height=height,
                num_inference_steps=self.steps,
                true_cfg_scale=self.cfg,
                sampler=self.sampler,
                seed=seed,
            )
            return output.images[0]

        return generate


def evaluate(
    generate: Generate | None,
    bank: Bank,
    n: int,
    seed: int = 0,
    *,
    label: str = "model",
    tasks: Sequence[str] = (),
    split: Split = "heldout",
    size: int = Plan.size,
    sheet_rows: int = 12,
    progress: bool = False,
) -> Evaluation:
    """Measure one function (sample, seed) -> picture; None: only the controls. Raises ValueError for n < 2."""
    systems = {} if generate is None else {label: lambda: generate}
    return compare(systems, bank, Plan(n, seed, split, tuple(tasks), progress, size=size), sheet_rows=sheet_rows)


# --- the command line ------------------------------------------------------------------------------------------------


def systems_of(args: argparse.Namespace) -> list[System]:
    """One system per repetition of the repeated options; an option given once holds for all of them.

    Raises ValueError when the counts do not fit, or without a model.
    """
    options = {name: getattr(args, name) for name in ("label", "model", "lora", "steps", "cfg", "sampler")}
    if args.controls_only:
        return []
    if not options["model"]:
        raise ValueError("--model is missing; give a model folder, or --controls-only")
    count = max(map(len, options.values()))
    for name, values in options.items():
        if len(values) not in (0, 1, count):
            raise ValueError(f"--{name}: expected once or {count} times, one per system, got {len(values)} times")
    columns = {name: spread(values, count) for name, values in options.items()}
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
    """Raise ValueError before the run for a path that cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def shape_of(text: str) -> Shape:
    """As "3x4". Raises ArgumentTypeError beyond 1:2 and 2:1."""
    wide, _, high = text.partition("x")
    if not (wide.isdecimal() and high.isdecimal() and int(high) and 0.5 <= int(wide) / int(high) <= 2):
        raise argparse.ArgumentTypeError(f"expected a ratio from 1x2 to 2x1, such as 3x4; got {text!r}")
    return int(wide), int(high)


def seed_of(text: str) -> int | None:
    """Read --seed; None for the word weights. Raises ArgumentTypeError for anything else."""
    if text == FROM_WEIGHTS:
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, or {FROM_WEIGHTS}; got {text!r}")
    return int(text)


def weights_seed(folder: Path) -> int:
    """Seed of scenes that nobody can have chosen: the first 4 bytes of the SHA-256 of a model's weights, without LoRAs.

    Raises ValueError for a folder without safetensors files.
    """
    files = [path for path in sorted(folder.glob("*/*.safetensors")) if path.parent.name != "loras"]
    if not files:
        raise ValueError(f"--seed {FROM_WEIGHTS}: {folder} has no safetensors files in its parts; give a number")
    digest = hashlib.sha256()
    for path in files:
        add_file(digest, path)
    return int.from_bytes(digest.digest()[:4], "big")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="trainers.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = top.add_argument_group("systems (each option may be repeated, once per system)")
    group.add_argument("--model", action="append", default=[], metavar="PATH", help="a model folder")
    group.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA for it, or none")
    group.add_argument("--steps", action="append", default=[], type=int, help="default: the recipe's")
    group.add_argument("--cfg", action="append", default=[], type=float, help="guidance scale; default: the recipe's")
    group.add_argument("--sampler", action="append", default=[], choices=["consistency", "euler"])
    group.add_argument("--label", action="append", default=[], help="a name for the table")
    group.add_argument("--controls-only", action="store_true", help="no model: judge the controls")
    top.add_argument("--n", type=int, default=600, help="number of scenes (%(default)s)")
    top.add_argument(
        "--seed",
        type=seed_of,
        default=0,
        help=f"of the scenes and of the noise; {FROM_WEIGHTS}: the SHA-256 of the first model's weights (%(default)s)",
    )
    top.add_argument(
        "--size",
        type=int,
        help=f"side of the pictures in pixels (in the recipe of the first --model; {Plan.size} for controls only)",
    )
    top.add_argument("--shape", type=shape_of, default=SQUARE, metavar="WxH", help="ratio of the targets' sides (1x1)")
    top.add_argument("--scenes", default="closed", choices=["closed", "open"], help="%(default)s")
    top.add_argument("--split", default="heldout", choices=["heldout", "train", "all"], help="%(default)s")
    top.add_argument(
        "--seeds-per-scene",
        type=int,
        default=1,
        metavar="K",
        help="above 1: also measure the spread over seeds (%(default)s)",
    )
    tasks = f"only these: {', '.join(TASKS)}; with --scenes open: {', '.join(OPEN_TASKS)}"
    top.add_argument("--task", action="append", default=[], metavar="NAME", help=tasks)
    top.add_argument("--data", metavar="DIR", help="pictures of the assets (default: the fetched set, else the subset)")
    top.add_argument("--device", default="auto", help="auto, cuda or cpu (%(default)s)")
    top.add_argument("--threads", type=int, help="CPU threads of the model")
    top.add_argument(
        "--keep", type=Path, metavar="DIR", help="store the pictures there, and generate only missing ones"
    )
    top.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    top.add_argument(
        "--sheet", type=Path, metavar="FILE", help="instruction, inputs, truth and outputs as a picture, .png or .jpg"
    )
    top.add_argument("--sheet-rows", type=int, default=12, help="%(default)s")
    top.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot the quality retained of the first system against steps"
    )
    top.add_argument(
        "--plot-against", default="steps", choices=list(AXES), help="seconds: what is best in equal time (%(default)s)"
    )
    return top


def size_of(systems: Sequence[System]) -> int:
    """Side of the pictures that the first model was made for, in pixels."""
    return systems[0].settings().output_budget if systems else Plan.size


def run(args: argparse.Namespace) -> None:
    """Run the evaluation. Raises ValueError in one sentence for bad input."""
    systems = systems_of(args)
    if args.seed is None and not systems:
        raise ValueError(f"--seed {FROM_WEIGHTS} needs --model; give one, or a number")
    seed = weights_seed(Path(systems[0].model)) if args.seed is None else args.seed
    plan = Plan(
        args.n,
        seed,
        args.split,
        tuple(args.task),
        seeds_per_scene=args.seeds_per_scene,
        size=size_of(systems) if args.size is None else args.size,
        open=args.scenes == "open",
        shape=args.shape,
    )
    check_outputs(args, len(systems))
    device = find_device(args.device) if systems else None
    about = {one.label: one.about() | {"device": device} for one in systems}
    bank = Bank.open(args.data, plan.size)
    print(f"{plan.n} scenes of {plan.split} assets, seed {plan.seed}; {bank.note}")
    openers = {one.label: (lambda one=one: one.open(device, args.threads)) for one in systems}
    stores = picture_stores(args, systems, plan, bank, about)
    result = compare(openers, bank, plan, about=about, stores=stores, sheet_rows=args.sheet_rows if args.sheet else 0)
    print("\n" + "\n\n".join(result.tables))
    print("\n* of a control: not beaten with 95% confidence; controls are judged on the items that they change")
    write_outputs(args, result, plan)


def picture_stores(
    args: argparse.Namespace,
    systems: Sequence[System],
    plan: Plan,
    bank: Bank,
    about: Mapping[str, Mapping[str, object]],
) -> dict[str, PictureStore]:
    """By label; empty without --keep. Other weights, scenes or settings have folders of their own, other labels not.

    The same seed and split draw other scenes of other assets.
    """
    if args.keep is None:
        return {}
    scenes: dict[str, object] = {"seed": plan.seed, "split": plan.split, "size": plan.size, "tasks": plan.tasks}
    scenes |= {"assets": bank.digest}
    scenes |= {"open": True} if plan.open else {}
    scenes |= {"shape": plan.shape} if plan.shape != SQUARE else {}
    shared = scenes | {"threads": args.threads, "version": __version__}
    kept: dict[str, PictureStore] = {}
    for one in systems:
        runs = {name: value for name, value in about[one.label].items() if name not in ("label", "series")}
        kept[one.label] = PictureStore(args.keep, {**runs, **shared, "files": one.files()})
    return kept


def check_outputs(args: argparse.Namespace, count: int) -> None:
    """Raise ValueError before the run for bad output options. ``count``: of systems."""
    if args.sheet_rows < 1:
        raise ValueError(f"--sheet-rows must be at least 1, got {args.sheet_rows}")
    for name, path, ends in (("--sheet", args.sheet, (".png", ".jpg")), ("--plot", args.plot, (".png",))):
        if path and path.suffix.lower() not in ends:
            raise ValueError(f"{name} must end in {' or '.join(ends)}, got {path}")
    if args.plot and count < 2:
        raise ValueError(f"--plot compares systems with the first one; expected at least 2, got {count}")
    for path in (args.json, args.sheet, args.plot):
        check_writable(path)


def write_outputs(args: argparse.Namespace, result: Evaluation, plan: Plan) -> None:
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(result.report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.sheet:
        title = f"{plan.n} unseen scenes, seed {plan.seed}: the first {len(result.rows)}"
        with replacing(args.sheet) as path:
            sheet = draw_sheet(result.rows, title, result.report.get("comparison"))
            sheet.save(path, quality=90, subsampling=0)  # of a JPEG, a third of the PNG
    if args.plot:
        with replacing(args.plot) as path:
            draw_plot(result.report["comparison"], path, args.plot_against)


def find_device(asked: str) -> str:
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    again = "run the same command again to continue" if args.keep else "with --keep DIR the next run continues"
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        return exit_code(lambda: run(args), f"nothing half-written is left; {again}")


if __name__ == "__main__":
    sys.exit(main())
