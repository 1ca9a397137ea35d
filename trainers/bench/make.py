"""Pictures of each system for each case; those that lie there already are not made again."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unipic_core.conditioning.picture_files import open_picture
from unipic_core.replacing import replacing

from ..evaluate import System, find_device, systems_of
from ..judges.vlm import AnswerError, LineFile, load_picture
from .cases import Case, Plan, file_name, read_cases


def result_path(out: Path, label: str, case: Case) -> Path:
    return out / "results" / file_name(label) / case.result


def run(args: argparse.Namespace) -> None:
    """Make or collect the pictures. Raises ValueError in one sentence."""
    args.out.mkdir(parents=True, exist_ok=True)
    cases, left_out = read_cases(args.bench, args.root, args.n, args.seed, args.out)
    plan = Plan(args.bench, args.seed, tuple(cases), tuple(left_out), {})
    if (args.out / "bench.json").exists():
        earlier = Plan.load(args.out)
        if (earlier.bench, earlier.seed, earlier.cases) != (plan.bench, plan.seed, plan.cases):
            raise ValueError(f"{args.out} holds a run of other cases; give another --out")
        plan = earlier
    systems = systems_of(args) if args.model else []
    device = find_device(args.device)
    about = {
        one.label: one.about() | {"budget": args.budget, "seed": args.seed, "files": one.files()} for one in systems
    }
    folders = dict(one.partition("=")[::2] for one in args.pictures)
    if not systems and not folders:
        raise ValueError("expected --model PATH, or --pictures LABEL=DIR for pictures of another program")
    known: dict[str, Mapping[str, Any]] = {**about, **{label: {"pictures": path} for label, path in folders.items()}}
    for label, facts in known.items():
        if label in plan.systems and _plain(plan.systems[label]) != _plain(facts):
            raise ValueError(f"{args.out} holds another system named {label!r}; give a --label")
    plan.with_systems(known).save(args.out)
    for label, folder in folders.items():
        collect(plan, args.out, label, Path(folder))
    for one in systems:
        generate(plan, args.out, one, device, args.budget, args.seed)


def _plain(facts: Mapping[str, object]) -> str:
    import json

    return json.dumps(facts, sort_keys=True)


def collect(plan: Plan, out: Path, label: str, folder: Path) -> None:
    """Copy pictures of another program: ``folder``/RESULT of the benchmark's layout, or ``folder``/ID.png."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} (--pictures {label}=DIR)")
    for case in plan.cases:
        target = result_path(out, label, case)
        found = [path for path in (folder / case.result, folder / f"{file_name(case.id)}.png") if path.is_file()]
        if found and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                shutil.copyfile(found[0], partial)


def generate(plan: Plan, out: Path, system: System, device: str, budget: int | None, seed: int) -> None:
    """Compose what is missing. A case with broken sources is listed in failures.jsonl and passed over."""
    missing = [(i, case) for i, case in enumerate(plan.cases) if not result_path(out, system.label, case).exists()]
    if not missing:
        return
    import torch

    from unipic_core.pipeline import UniPicPipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = UniPicPipeline.from_pretrained(system.model, torch_dtype=dtype, device=device)
    if system.lora:
        pipe.load_lora(system.lora)
    failures = LineFile(out / "failures.jsonl")
    for number, (index, case) in enumerate(missing, 1):
        print(f"\r{system.label}: {number} of {len(missing)}", end="", file=sys.stderr, flush=True)
        try:
            images = [load_picture(Path(path)).image for path in case.sources]
        except AnswerError as error:
            failures.add({"system": system.label, "id": case.id, "failure": str(error)})
            continue
        size: tuple[int | None, int | None] = (None, None)
        if plan.bench == "nano" and case.truth:
            with open_picture(case.truth) as truth:
                size = truth.size
        made = pipe(
            images=images,
            prompt=case.instruction,
            width=size[0],
            height=size[1],
            num_inference_steps=system.steps,
            true_cfg_scale=system.cfg,
            sampler=system.sampler,
            seed=seed + index,
            reference_budget=budget,
        )
        path = result_path(out, system.label, case)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            made.images[0].save(partial)
        if plan.bench == "gedit":
            shutil.copyfile(case.sources[0], path.with_name(f"{path.stem}_SRCIMG.png"))
    print(file=sys.stderr)


def described(plan: Plan) -> dict[str, Any]:
    """For the head of a report."""
    return {
        label: {key: value for key, value in facts.items() if key != "files"}
        for label, facts in asdict(plan)["systems"].items()
    }
