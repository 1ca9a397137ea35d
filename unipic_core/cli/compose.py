"""The command `unipic compose`: check the arguments, load, compose, write."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..conditioning.boxes import MAX_TEXT, parse_boxes
from ..conditioning.images import load_image
from ..conditioning.influence import Influence
from ..conditioning.picture_numbers import number_cautions
from ..conditioning.reference_sizes import Size, described_sizes, small_references
from ..errors import UniPicError, one_line, printable
from ..pipeline.loading import OpenedPipeline, memory_plan, open_pipeline
from ..pipeline.loras import AddedLoRAs
from ..pipeline.memory_plan import MemoryPlan
from ..pipeline.offload import check_machine, default_dtype
from ..pipeline.pipeline import UniPicPipeline
from ..replacing import AppearedError, replacing
from ..run.kv_storage import CacheStorage
from ..run.plan import Plan, Request, checked_seed, plan, resolve
from ..weights.lora import LoRA, read_lora
from ..weights.recipe import Recipe
from .outputs import check_outputs, free_path, output_paths
from .sheet import picture_sheet
from .terminal import DEFAULT_MODEL, DTYPES, layers_added, progress_bar


def compose(args: argparse.Namespace) -> None:
    """Run the command: load, compose with a progress bar, write."""
    check_destinations(args)
    images = [load_image(path) for path in args.images]
    if args.model == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise UniPicError("the bundled model is not installed; name a model folder with --model")
    opened = open_checked(args, [image.size for image in images])
    report_references(opened.plan, [image.size for image in images])
    with progress_bar("composing") as advance:  # before loading, since the bar's package may be missing
        pipe = load_pipeline(args, opened)
        steps = opened.plan.settings.steps
        out = pipe.run(images, opened.plan.request, callback=lambda step, *_: advance(step + 1, steps))
    paths = output_paths(args.out, out.seeds[0], len(out.images))
    for image, seed, named in zip(out.images, out.seeds, paths, strict=True):
        print(printable(write_picture(image, named, record(args, seed, image.size, out.settings), args)))
    if args.sheet:
        made = record(args, out.seeds[0], out.images[0].size, out.settings)
        print(printable(write_picture(picture_sheet(images, args.prompt, out.images), args.sheet, made, args)))


def report_references(planned: Plan, sizes: list[Size]) -> None:
    """Print the resized size of each reference; warn of small ones and of picture numbers that do not match."""
    if sizes:
        print(f"references: {described_sizes(sizes, planned.seen)}", file=sys.stderr)
    cautions = small_references(sizes, planned.seen, planned.settings.reference_budget)
    for caution in (*cautions, *number_cautions(planned.request.prompt, len(sizes))):
        warnings.warn(caution, stacklevel=3)


def check_destinations(args: argparse.Namespace) -> None:
    """Raise UniPicError if an output would overwrite an input, or another file without permission."""
    seed, count = checked_seed(args.seed, args.num_images)
    paths = output_paths(args.out, seed, count)
    if args.sheet and args.sheet.resolve() in [path.resolve() for path in paths]:
        raise UniPicError(f"--sheet and --out name the same file {args.sheet}; choose another name for the sheet")
    check_outputs([*paths, *([args.sheet] if args.sheet else [])], files_read(args), args.overwrite)


def files_read(args: argparse.Namespace) -> list[Path]:
    """List the pictures and weight files among the arguments."""
    return [*args.images, *(path for path, _ in args.lora), *([args.transformer] if args.transformer else [])]


def write_picture(image: Image.Image, named: Path, provenance: dict[str, Any], args: argparse.Namespace) -> Path:
    """Write a picture and return its path: `named`, or a free one if a file appeared there."""
    while True:
        path = still_free(named, args)
        try:
            save_image(image, path, provenance, overwrite=args.overwrite and path == named)
        except AppearedError:
            continue
        return path


def still_free(path: Path, args: argparse.Namespace) -> Path:
    """Return the path, or a free name with a warning if a file appeared there after the first check."""
    try:
        check_outputs([path], files_read(args), args.overwrite)
    except UniPicError as error:
        free = free_path(path)
        warnings.warn(f"{error}; it appeared during the run, so the picture is written to {free}", stacklevel=2)
        return free
    return path


@dataclass(frozen=True)
class Opened:
    """Inputs of a run, opened and checked before gigabytes are read."""

    pipeline: OpenedPipeline
    loras: tuple[tuple[LoRA, float], ...]
    plan: Plan
    places: MemoryPlan


def open_checked(args: argparse.Namespace, sizes: list[Size]) -> Opened:
    """Open the weights' headers and check all arguments. sizes: of the references. Raises UniPicError."""
    check_machine(device_name(args), args.attention, args.compile)
    opened = open_pipeline(args.model, args.transformer)
    loras = tuple((read_lora(path, mapped=True), strength) for path, strength in args.lora)
    added = AddedLoRAs()
    for lora, strength in loras:
        added = added.add(lora.path, lora.recipe, strength)
        resolve(added.over(opened.model.recipe))  # the checks of load_lora, LoRA by LoRA
    recipe = added.over(opened.model.recipe)
    places = memory_plan(opened, number_type(args)[1], torch.device(device_name(args)), args.storage, cache_of(args))
    planned = plan(recipe, sizes, request_of(args))
    if unknown(recipe, args):
        name = (args.transformer or args.model).name
        warnings.warn(
            f"{name} has no recipe and its name is of no known kind, so it runs with {planned.settings}; if it is a "
            "few-step model, add --sampler consistency",
            stacklevel=2,
        )
    return Opened(opened, loras, planned, places)


def unknown(recipe: Recipe, args: argparse.Namespace) -> bool:
    """True if neither the recipe nor the arguments determine the number of evaluations of the network."""
    if (recipe.sampler or args.sampler) is not None:
        return False
    return (recipe.steps is None and args.steps is None) or (recipe.guidance is None and args.cfg is None)


def request_of(args: argparse.Namespace) -> Request:
    """Build the Request from the arguments."""
    width, height = args.size or (None, None)
    return Request(
        prompt=args.prompt,
        negative_prompt=args.negative,
        width=width,
        height=height,
        steps=args.steps,
        guidance=args.cfg,
        sampler=args.sampler,
        seed=args.seed,
        num_images=args.num_images,
        reference_budget=args.reference_budget,
        schedule=None if args.schedule == "auto" else args.schedule,
        shift=args.shift,
        share=args.share,
        reference_weights=args.reference_weights,
        aspect=args.aspect,
        influences=influences_of(args),
    )


def influences_of(args: argparse.Namespace) -> list[Influence] | None:
    """Strength, box and time range of each picture; None without any of them. Raises UniPicError."""
    count = len(args.images)
    if args.boxes is None and args.strengths is None and args.ranges is None:
        return None
    strengths, ranges = args.strengths or [1.0] * count, args.ranges or [(0.0, 1.0)] * count
    for name, values in (("strengths", strengths), ("ranges", ranges)):
        if len(values) != count:
            raise UniPicError(f"--{name} must have one value for each of {count} pictures, got {len(values)}")
    regions = parse_boxes(boxes_text(args.boxes), count) if args.boxes is not None else {}
    each = enumerate(zip(strengths, ranges, strict=True), start=1)
    return [Influence(strength, regions.get(i), start, end) for i, (strength, (start, end)) in each]


def boxes_text(boxes: str) -> str:
    """The JSON itself, or the text of the file that is named. Raises UniPicError."""
    if boxes.lstrip()[:1] in ("[", "{", ""):
        return boxes
    try:
        with open(boxes, encoding="utf-8") as file:
            return file.read(MAX_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UniPicError(f"--boxes must be JSON or a file of it, got {boxes[:80]!r}: {one_line(error)}") from error


def load_pipeline(args: argparse.Namespace, opened: Opened) -> UniPicPipeline:
    """Load the pipeline with its LoRAs to the device."""
    from transformers.utils import logging  # takes a second, so after the checks of the arguments

    if not args.debug:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device_name(args)
    name, dtype = number_type(args)
    settings = opened.plan.settings
    remark = f"; {settings.remark}" if settings.remark else ""
    print(f"loading {printable(args.model.name)} on {device} in {name}: {settings}{remark}", file=sys.stderr)
    if note := opened.places.note(opened.pipeline.model.config.num_layers):
        print(note, file=sys.stderr)
    pipe = UniPicPipeline.from_opened(
        opened.pipeline, dtype, device, args.attention, args.compile, args.storage, cache_of(args)
    )
    for (lora, strength), (path, _) in zip(opened.loras, args.lora, strict=True):
        print(layers_added(path, strength, pipe.load_lora(lora, strength)), file=sys.stderr)
    return pipe


def cache_of(args: argparse.Namespace) -> CacheStorage:
    """Place and dtype of cached keys and values. Raises UniPicError for unknown names."""
    return CacheStorage(args.condition_cache, args.cache_dtype)


def number_type(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Dtype to compute in: (its name on the command line, its torch dtype)."""
    name = args.dtype
    if name == "auto":
        name = "fp32" if default_dtype(device_name(args)) is torch.float32 else "bf16"
    return name, getattr(torch, DTYPES[name])


def device_name(args: argparse.Namespace) -> str:
    """Name of the requested device; "auto" is a GPU if there is one, else the CPU."""
    name: str = args.device
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def record(args: argparse.Namespace, seed: int, size: tuple[int, int], settings: object) -> dict[str, Any]:
    """Record of a picture's prompt, inputs and settings, for its file."""
    return {
        "prompt": args.prompt,
        "negative_prompt": args.negative,
        "images": [path.name for path in args.images],
        "seed": seed,
        "size": list(size),
        "model": args.model.resolve().name,
        "transformer": args.transformer and args.transformer.name,
        "lora": [[path.name, strength] for path, strength in args.lora],
        "share": args.share,
        "reference_weights": args.reference_weights,
        "strengths": args.strengths,
        "boxes": args.boxes,
        "ranges": args.ranges,
        "attention": args.attention,
        "recipe": vars(settings),
        "version": __version__,
    }


def save_image(image: Image.Image, path: Path, provenance: dict[str, Any], *, overwrite: bool) -> None:
    """Write a picture atomically. A PNG stores `provenance` as JSON in its text chunk "unipic".

    overwrite: as for `replacing`.
    """
    kind = {"png": "PNG", "webp": "WEBP"}.get(path.suffix.lower()[1:], "JPEG")
    options: dict[str, Any] = {"quality": 95}
    if kind == "PNG":
        info = PngInfo()
        info.add_text("unipic", json.dumps(provenance))
        options = {"pnginfo": info}
    try:
        with replacing(path, overwrite=overwrite) as partial:
            image.save(partial, format=kind, **options)
    except OSError as error:
        raise UniPicError(f"cannot write {path}: {error.strerror or error}") from error
