"""Pictures of each system for each case; existing ones are kept."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from unipic_core.conditioning.picture_files import open_picture
from unipic_core.errors import UniPicError
from unipic_core.replacing import replacing

from ..evaluate import System, find_device, size_of, systems_of
from ..judges.vlm import AnswerError, LineFile, load_picture
from ..nano.emoji import Bank
from ..progress import Progress
from .cases import Case, Plan, draw_inputs, file_name, read_cases

if TYPE_CHECKING:
    from unipic_core.pipeline import UniPicPipeline

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of another program's pictures, in the order of preference."""


def result_path(out: Path, label: str, case: Case) -> Path:
    """Path of a system's picture of a case."""
    return out / "results" / file_name(label) / case.result


def run(args: argparse.Namespace) -> None:
    """Generate the pictures of models, and copy those of other programs.

    Raises ValueError in one sentence; a command that is refused changes nothing.
    """
    systems = systems_of(args) if args.model else []
    earlier = Plan.load(args.out) if (args.out / "bench.json").exists() else None
    plan = read_plan(args, systems, earlier)
    device = device_of(args.device) if systems else "cpu"
    about = {one.label: settings_of(one, args) for one in systems}
    folders = picture_folders(args.pictures, list(about))
    if not systems and not folders:
        raise ValueError("expected --model PATH, or --pictures LABEL=DIR for pictures of another program")
    new_systems = {**about, **{label: {"pictures": path} for label, path in folders.items()}}
    check_systems(plan, new_systems, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if plan.bench == "nano":
        draw_inputs(plan, anew=earlier is None)
    plan.with_systems(new_systems).save(args.out)
    for label, folder in folders.items():
        collect(plan, args.out, label, Path(folder))
    for one in systems:
        generate(plan, args.out, one, device, args.budget, args.seed)


def device_of(asked: str) -> str:
    """Device of --device. Raises UniPicError if this machine does not have it."""
    from unipic_core.pipeline.offload import checked_device

    return str(checked_device(find_device(asked)))


def settings_of(system: System, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of a system in bench.json. Raises UniPicError for values out of range."""
    return system.about(args.budget) | {"budget": args.budget, "seed": args.seed, "files": system.files()}


def read_plan(args: argparse.Namespace, systems: Sequence[System], earlier: Plan | None) -> Plan:
    """Run of these cases: the ``earlier`` one of the folder, or a new one. Raises ValueError if the cases differ."""
    size = scene_size(args, systems, earlier)
    if earlier is not None and earlier.bench == args.bench == "nano":
        earlier.scenes()  # of other assets: refused as such before the cases are compared
    cases, left_out = read_cases(args.bench, args.root, args.n, args.seed, args.out, size)
    assets = Bank.open().digest if args.bench == "nano" else ""
    plan = Plan(args.bench, args.seed, tuple(cases), tuple(left_out), {}, size, assets)
    if earlier is None:
        return plan
    if (earlier.bench, earlier.seed, earlier.cases) != (plan.bench, plan.seed, plan.cases):
        raise ValueError(f"{args.out} holds a run of other cases; choose another --out")
    return earlier


def check_systems(plan: Plan, new_systems: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Raise ValueError for a folder of pictures that is none, and for a label that the run has with other settings or
    whose folder is another label's."""
    for label, settings in new_systems.items():
        if "pictures" in settings and not Path(settings["pictures"]).is_dir():
            raise ValueError(f"--pictures {label}=DIR: expected a folder, got {settings['pictures']}")
        if label in plan.systems and _as_json(plan.systems[label]) != _as_json(settings):
            raise ValueError(f"{out} holds another system named {label!r}; choose another --label")
    check_folders([*plan.systems, *new_systems])


def scene_size(args: argparse.Namespace, systems: Sequence[System], earlier: Plan | None) -> int:
    """Side of drawn scenes in pixels: of --size, else of the run, else in the first --model's recipe.

    Raises ValueError before a picture of another size replaces one of the run.
    """
    if args.bench != "nano":
        if args.size is not None:
            raise ValueError(f"--size is for the bench nano, whose scenes are drawn; got {args.bench}: remove it")
        return Plan.size
    if args.size is None:
        return earlier.size if earlier is not None else size_of(systems)
    if earlier is not None and earlier.size != args.size:
        raise ValueError(
            f"{args.out} holds scenes of {earlier.size} pixels, got --size {args.size}; choose another --out"
        )
    return int(args.size)


def check_folders(labels: Iterable[str]) -> None:
    """Raise ValueError for two labels of one folder of pictures, such as "a b" and "a_b"."""
    labels_by_folder: dict[str, str] = {}
    for label in labels:
        other = labels_by_folder.setdefault(file_name(label), label)
        if other != label:
            raise ValueError(f"the systems {other!r} and {label!r} share a folder; choose another --label")


def picture_folders(options: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Folders of other programs' pictures by label. Raises ValueError for anything but LABEL=DIR with a new label."""
    folders: dict[str, str] = {}
    for option in options:
        label, _, folder = option.partition("=")
        if not label or not folder:
            raise ValueError(f"--pictures: expected LABEL=DIR, got {option!r}")
        if label in folders or label in labels:
            raise ValueError(f"--pictures: there are two systems named {label!r}; choose another label")
        folders[label] = folder
    return folders


def _as_json(settings: Mapping[str, object]) -> str:
    """Settings as bench.json stores them, where tuples are lists."""
    return json.dumps(settings, sort_keys=True)


def collect(plan: Plan, out: Path, label: str, folder: Path) -> None:
    """Copy pictures of another program: ``folder``/RESULT of the benchmark's layout, or ``folder``/ID.png.

    PNG, JPEG or WebP; pictures are read by their content, so the copy is named .png.
    """
    for case in plan.cases:
        target = result_path(out, label, case)
        stems = (folder / case.result, folder / f"{file_name(case.id)}.png")
        candidates = [path for one in stems for path in map(one.with_suffix, ENDINGS) if path.is_file()]
        if candidates and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                shutil.copyfile(candidates[0], partial)


def generate(plan: Plan, out: Path, system: System, device: str, budget: int | None, seed: int) -> None:
    """Generate missing pictures. Cases that fail are listed in failures.jsonl; raises ValueError if all do."""
    missing = [(i, case) for i, case in enumerate(plan.cases) if not result_path(out, system.label, case).exists()]
    if not missing:
        return
    from unipic_core.pipeline import UniPicPipeline
    from unipic_core.pipeline.offload import default_dtype

    pipe = UniPicPipeline.from_pretrained(system.model, torch_dtype=default_dtype(device), device=device)
    if system.lora:
        pipe.load_lora(system.lora)
    failures, failed = LineFile(out / "failures.jsonl"), 0
    progress = Progress(system.label, len(plan.cases), len(plan.cases) - len(missing))
    for index, case in missing:
        try:
            picture = composed(pipe, plan, case, system, budget, seed + index)
        except (AnswerError, UniPicError) as error:
            failures.add({"system": system.label, "id": case.id, "failure": str(error)})
            failed, message = failed + 1, f"case {case.id}: {error}"
            continue
        path = result_path(out, system.label, case)
        path.parent.mkdir(parents=True, exist_ok=True)
        if plan.bench == "gedit":  # first, since a case with a picture is done
            shutil.copyfile(case.sources[0], path.with_name(f"{path.stem}_SRCIMG.png"))
        with replacing(path) as partial:
            picture.save(partial)
        progress.add()
    progress.close()
    if failed == len(plan.cases):
        raise ValueError(f"{system.label} made no picture; {message}")
    if failed:
        print(f"{system.label}: {failed} of {len(plan.cases)} cases have no picture; see {out / 'failures.jsonl'}")


def composed(
    pipe: UniPicPipeline, plan: Plan, case: Case, system: System, budget: int | None, seed: int
) -> Image.Image:
    """Picture of one case. Raises AnswerError for unreadable sources, UniPicError for a case that is out of range."""
    size: tuple[int | None, int | None] = (None, None)
    if plan.bench == "nano" and case.truth:
        with open_picture(case.truth) as truth:
            size = truth.size
    output = pipe(
        images=[load_picture(Path(path)).image for path in case.sources],
        prompt=case.instruction,
        width=size[0],
        height=size[1],
        num_inference_steps=system.steps,
        true_cfg_scale=system.cfg,
        sampler=system.sampler,
        seed=seed,
        reference_budget=budget,
    )
    return output.images[0]


def described(plan: Plan) -> dict[str, Any]:
    """Settings of the systems for a report, without the list of their weight files."""
    return {
        label: {key: value for key, value in settings.items() if key != "files"}
        for label, settings in plan.systems.items()
    }
